"""A base's folder is checked by what it says of itself, before anything of it is opened."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from manylora.types import BaseModelError, ManyloraError, Unsupported

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "*.safetensors"
REMEDY = "Name `seedling`, a folder with config.json and safetensors, or a hub id"


def check_folder(name: str, folder: str) -> None:
    """Refuse a folder that cannot be opened as it lies there; a hub id's files come later.

    Raises:
        BaseModelError: a file is missing or unreadable.
        Unsupported: weights in a pickle.
    """
    place = Path(folder)
    if not place.is_dir():
        if place.exists() or place.is_absolute() or folder.startswith("."):
            raise BaseModelError(f"cannot open base {name!r}: {folder} is no folder. {REMEDY}")
        return
    fields = _object(name, place / CONFIG)
    if not isinstance(fields.get("model_type"), str):
        raise BaseModelError(
            f"cannot open base {name!r}: {place / CONFIG} has no `model_type`. {REMEDY}"
        )
    if (place / INDEX).is_file():
        named = _object(name, place / INDEX).get("weight_map")
        shards = set(named.values()) if isinstance(named, dict) else set()
        missing = sorted(str(s) for s in shards if not (place / str(s)).is_file())
        if missing or not shards:
            raise BaseModelError(
                f"cannot open base {name!r}: {place / INDEX} names "
                f"{', '.join(missing) or 'no files'}, which the folder lacks; copy it again"
            )
    elif not any(place.glob(WEIGHTS)):
        if any(place.glob("*.bin")) or any(place.glob("*.pt")) or any(place.glob("*.pth")):
            raise Unsupported(
                f"base {name!r} has its weights in pickles (*.bin), which can run code when they "
                "are read; convert them to safetensors"
            )
        raise BaseModelError(f"cannot open base {name!r}: {folder} has no {WEIGHTS}. {REMEDY}")


def check_config(name: str, config: Any) -> None:
    """Refuse what is no causal LM, and files that are quantised, before they take memory.

    Raises:
        BaseModelError: transformers has no causal LM for this config.
        Unsupported: says how they are quantised.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BaseModelError(
            f"cannot open base {name!r}: its config.json is of {config.model_type!r}, for which "
            "transformers has no causal LM"
        )
    parts = [config, *sub_configs(config)]
    found = [q for part in parts if (q := getattr(part, "quantization_config", None))]
    if found:
        first = found[0] if isinstance(found[0], dict) else vars(found[0])
        method = first.get("quant_method") or first.get("quant_algo") or "an unnamed method"
        method = getattr(method, "value", method)
        raise Unsupported(
            f"the files of base {name!r} are quantised already ({method}); a base is "
            "read from fp32, bf16 or fp16 files: open the original with a `quantization`"
        )


@contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Turn what a library raises while a base is opened into BaseModelError with the library's
    words and the cause."""
    try:
        yield
    except (ManyloraError, MemoryError):
        raise
    except ImportError as error:
        raise BaseModelError(
            f"cannot open base {name!r}: it needs a package that is not installed: {error}"
        ) from error
    except Exception as error:
        if "out of memory" in str(error) or "not enough memory" in str(error):
            raise
        words = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        raise BaseModelError(f"cannot open base {name!r}: {words}. {REMEDY}") from error


def sub_configs(config: Any) -> Iterator[Any]:
    """Return the configs that a config has in it: of its text model, of what reads pictures."""
    for field in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, field, None)
        if part is not None:
            yield part
            yield from sub_configs(part)


def _object(name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(f"cannot open base {name!r}: no {path}. {REMEDY}") from error
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot open base {name!r}: {path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"cannot open base {name!r}: {path} is no JSON object")
    return value
