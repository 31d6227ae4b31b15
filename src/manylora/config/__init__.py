"""What a run file may say, and how it is read.

Owns: the pydantic models of a run file, reading YAML with line numbers, `--set` overrides, error
messages that name file, line and key, the resolved file and the JSON schema.
Does not own: what the settings mean to the engine, reading data, anything of the base model.
Talks to: types below; runs, quickstart and cli use it. No torch.
"""

from manylora.config.load import load_run_file
from manylora.config.render import resolved_yaml, run_json_schema
from manylora.config.run_file import (
    AdapterEntry,
    LoraSettings,
    OptimizerSettings,
    RunFile,
    Schedule,
    SftSettings,
    TrackioSettings,
    WandbSettings,
    is_data_file,
)

__all__ = [
    "AdapterEntry",
    "LoraSettings",
    "OptimizerSettings",
    "RunFile",
    "Schedule",
    "SftSettings",
    "TrackioSettings",
    "WandbSettings",
    "is_data_file",
    "load_run_file",
    "resolved_yaml",
    "run_json_schema",
]
