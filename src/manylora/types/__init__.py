"""This room defines the words that all rooms share: adapter settings, data, results, errors.

Owns: small frozen classes that cross room boundaries, and the one error tree.
Does not own: database rows, wire messages, tensors.
Talks to: no room; every room may import it. It does not import torch.
"""

from manylora.types.adapter_spec import ALL_LINEAR, AdamParams, AdapterSpec
from manylora.types.data import (
    Datum,
    DeviceTime,
    ForwardBackwardResult,
    OptimStepResult,
    causal_datum,
)
from manylora.types.errors import (
    AdapterExists,
    AdapterNotFound,
    BaseModelError,
    Cancelled,
    CheckpointDamaged,
    CheckpointError,
    CheckpointExists,
    CheckpointMismatch,
    ConfigError,
    Conflict,
    DataError,
    DatumTooLong,
    DoesNotFit,
    EngineLost,
    ManyloraError,
    NotFinite,
    RewardError,
    RolloutFailed,
    SaveFailed,
    StepRefused,
    StoreError,
    StoreTooNew,
    TargetError,
    TooManyFilesOpen,
    Unsupported,
)
from manylora.types.opening import Opening, OpeningOptions
from manylora.types.operations import WANTED, ForwardBackward, OptimStep, Sample, Wanted
from manylora.types.sampling import (
    PromptScores,
    SampledSequence,
    SampleResult,
    SamplingParams,
    Scoring,
    TopK,
)
from manylora.types.text_format import TextFormat

__all__ = [
    "ALL_LINEAR",
    "WANTED",
    "AdamParams",
    "AdapterExists",
    "AdapterNotFound",
    "AdapterSpec",
    "BaseModelError",
    "Cancelled",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointMismatch",
    "ConfigError",
    "Conflict",
    "DataError",
    "Datum",
    "DatumTooLong",
    "DeviceTime",
    "DoesNotFit",
    "EngineLost",
    "ForwardBackward",
    "ForwardBackwardResult",
    "ManyloraError",
    "NotFinite",
    "Opening",
    "OpeningOptions",
    "OptimStep",
    "OptimStepResult",
    "PromptScores",
    "RewardError",
    "RolloutFailed",
    "Sample",
    "SampleResult",
    "SampledSequence",
    "SamplingParams",
    "SaveFailed",
    "Scoring",
    "StepRefused",
    "StoreError",
    "StoreTooNew",
    "TargetError",
    "TextFormat",
    "TooManyFilesOpen",
    "TopK",
    "Unsupported",
    "Wanted",
    "causal_datum",
]
