"""This room says what a run file or a server file may hold, and reads it.

Owns: the pydantic models of run and server files, reading YAML with line numbers, `--set`
overrides, error messages that name file, line and key, the resolved file and the JSON schema.
Does not own: what the settings mean to the engine, reading data, anything of the base model.
Talks to: types below; runs, quickstart and cli use it. No torch.
"""

from manylora.config.data_sources import DATA_SUFFIXES, data_suffix, is_data_file
from manylora.config.load import load_run_file, load_server_file
from manylora.config.render import resolved_yaml, run_json_schema
from manylora.config.rl import KeepRollouts, RlEvalSettings, RlSettings
from manylora.config.run_file import (
    AdapterEntry,
    LoraSettings,
    OptimizerSettings,
    RunFile,
    Schedule,
    SftSettings,
    TrackioSettings,
    WandbSettings,
    is_template,
)
from manylora.config.server_file import Memory, Quotas, RequestLimits, Saving, ServerFile
from manylora.config.settings import MOST_STEPS

__all__ = [
    "DATA_SUFFIXES",
    "MOST_STEPS",
    "AdapterEntry",
    "KeepRollouts",
    "LoraSettings",
    "Memory",
    "OptimizerSettings",
    "Quotas",
    "RequestLimits",
    "RlEvalSettings",
    "RlSettings",
    "RunFile",
    "Saving",
    "Schedule",
    "ServerFile",
    "SftSettings",
    "TrackioSettings",
    "WandbSettings",
    "data_suffix",
    "is_data_file",
    "is_template",
    "load_run_file",
    "load_server_file",
    "resolved_yaml",
    "run_json_schema",
]
