"""This room holds adapters on disk: PEFT's files, training states, merged models.

Owns: what an adapter looks like as files, folders that are whole or absent, manifests, and what is
refused when files are read.
Does not own: the adapter's vectors and layout (lora), the base model (models), when to save and
what to delete (engine and runs).
Talks to: lora, models and types below; hosting, api, runs, service and cli use it. Only `merged`,
which opens a base, knows torch; import it where it is needed.
"""

from manylora.checkpoint.atomic import clean_strays, write_folder
from manylora.checkpoint.describe import describe
from manylora.checkpoint.manifest import JSON, Manifest, read_manifest, verify
from manylora.checkpoint.peft_files import ImportedAdapter, export_peft, import_peft
from manylora.checkpoint.training_state import (
    SavedState,
    load_state,
    newest_state,
    recorded_format,
    save_state,
)

__all__ = [
    "JSON",
    "ImportedAdapter",
    "Manifest",
    "SavedState",
    "clean_strays",
    "describe",
    "export_peft",
    "import_peft",
    "load_state",
    "newest_state",
    "read_manifest",
    "recorded_format",
    "save_state",
    "verify",
    "write_folder",
]
