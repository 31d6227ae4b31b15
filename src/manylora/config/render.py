"""A run file is written out: with every default filled in, and as a JSON schema."""

from typing import Any

import yaml

from manylora.config.run_file import RunFile
from manylora.config.yaml_text import CoreDumper


def resolved_yaml(run: RunFile) -> str:
    """Return the whole run file with every default; `load_run_file` reads it back unchanged."""
    data = run.model_dump(mode="json")
    return yaml.dump(data, Dumper=CoreDumper, sort_keys=False, allow_unicode=True)


def run_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a run file, for editors and other programs."""
    schema = RunFile.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "manylora run file",
    }
