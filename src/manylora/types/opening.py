"""The settings with which a base is opened are given once, and passed on as one value."""

from dataclasses import KW_ONLY, dataclass, field
from typing import TypedDict

from manylora.types.errors import ConfigError
from manylora.types.mesh_shape import MeshShape


@dataclass(frozen=True, slots=True)
class Opening:
    """An `Opening` says how a base is opened, in one process or in several.

    Attributes:
        base: `seedling`, a folder, or a hub id of any Hugging Face causal LM.
        token_budget: tokens of one packed micro-batch; a longer sequence runs alone.
        dtype: dtype of the base: `auto` (as stored), `fp32`, `bf16`, `fp16`.
        device: `auto` (CUDA if there is one), `cpu`, `cuda:1`, …
        quantization: `nf4` or `int8` for the base's linear layers; None = they are in `dtype`.
        activation_checkpointing: recompute each block in the backward: less memory for a third more
            time.
        threads: CPU threads of one operation, for the whole process; None = torch's choice.
        mesh: processes that share the work.

    Raises:
        ConfigError: a setting is out of range.
    """

    base: str
    _: KW_ONLY
    token_budget: int = 4096
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    activation_checkpointing: bool = False
    threads: int | None = None
    mesh: MeshShape = field(default_factory=MeshShape)

    def __post_init__(self) -> None:
        if self.token_budget < 1:
            raise ConfigError(f"token_budget is {self.token_budget}; it must be ≥ 1")


class OpeningOptions(TypedDict, total=False):
    """`OpeningOptions` are an `Opening`'s settings beside its base and its mesh."""

    token_budget: int
    dtype: str
    device: str
    quantization: str | None
    activation_checkpointing: bool
    threads: int | None
