"""An adapter's files are found in the folder that a user named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manylora.types import CheckpointDamaged, CheckpointError, ConfigError
from manylora.types.files import tell_shortage_apart

PEFT_CONFIG, STATE_MANIFEST = "adapter_config.json", "manifest.json"


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An `AdapterFolder` is an adapter on disk.

    Attributes:
        kind: `peft` (PEFT's files) or `state` (a training state `step-N`).
        folder: where the files themselves are.
        base: the base that it names; None if it names none.
        label: what to call it beside others.
    """

    kind: Literal["peft", "state"]
    folder: Path
    base: str | None
    label: str


def find_adapter(folder: Path) -> AdapterFolder:
    """Return the adapter in `folder`: PEFT files, a training state, or an adapter's run folder.

    Of the latter, the finished adapter is taken if there is one, else the newest training state.

    Raises:
        CheckpointError: there is none; the message says what would be one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    label = _label(folder.resolve())
    for place in (folder, folder / "final"):
        if (place / PEFT_CONFIG).is_file():
            base = _read_json(place / PEFT_CONFIG).get("base_model_name_or_path")
            return AdapterFolder("peft", place, base or None, label)
        if (place / STATE_MANIFEST).is_file():
            return _state(place, label)
    for parent in (folder / "checkpoints", folder):
        newest = _newest_state(parent)
        if newest is not None:
            return _state(newest, label)
    inside = sorted(
        child.name for child in folder.iterdir() if (child / "final").is_dir() or _is_adapter(child)
    )
    listed = f"; perhaps one of those in it: {', '.join(inside)}" if inside else ""
    raise CheckpointError(
        f"{folder}: is no adapter; name a PEFT folder (with {PEFT_CONFIG}), a training state "
        f"step-N, or an adapter's folder of a run{listed}"
    )


def find_checkpoint(path: str, data_dir: Path, database: str | None) -> Path:
    """Return the folder of a checkpoint, of any owner, in a server's data folder.

    Raises:
        CheckpointError: there is none.
        StoreError: the database cannot be read.
    """
    from manylora.store import DATABASE, Store

    if database is None and not (data_dir / DATABASE).is_file():
        raise CheckpointError(f"{data_dir}: is no data folder of a server (there is no {DATABASE})")
    with Store.in_folder(data_dir, database) as store:
        row = store.checkpoints.anybodys(path)
    if row is None or not (data_dir / row.folder).is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint in {data_dir}")
    return data_dir / row.folder


def common_base(adapters: list[AdapterFolder], given: str | None) -> str:
    """Return the base that all adapters share, or the one that the user gave. Raises ConfigError if
    none is named, or several are."""
    if given is not None:
        return given
    named = {adapter.base for adapter in adapters if adapter.base}
    if len(named) == 1:
        return str(named.pop())
    if not named:
        raise ConfigError("no base is named; give --base, such as --base seedling")
    raise ConfigError(
        f"the adapters name different bases ({', '.join(sorted(named))}); give --base, or sample "
        "them one by one"
    )


def open_adapter(trainer: Any, name: str, adapter: AdapterFolder) -> Any:
    """Give `trainer` (a `manylora.api.Trainer`) the adapter of a folder."""
    if adapter.kind == "state":
        restored, _ = trainer.restore(name, adapter.folder)
        return restored
    return trainer.create(name, init_from=adapter.folder)


def _label(folder: Path) -> str:
    """Return `reverse` for `reverse/final`, `reverse@50` for `reverse/checkpoints/step-50`."""
    name = folder.name
    if name == "final":
        return folder.parent.name
    if name.startswith("step-") and folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}@{name.removeprefix('step-')}"
    return name


def _is_adapter(folder: Path) -> bool:
    return (folder / PEFT_CONFIG).is_file() or (folder / STATE_MANIFEST).is_file()


def _newest_state(parent: Path) -> Path | None:
    if not parent.is_dir():
        return None
    numbered = [
        (int(child.name.removeprefix("step-")), child)
        for child in parent.glob("step-*")
        if child.name.removeprefix("step-").isdecimal() and (child / STATE_MANIFEST).is_file()
    ]
    return max(numbered)[1] if numbered else None


def _state(folder: Path, label: str) -> AdapterFolder:
    about = _read_json(folder / STATE_MANIFEST).get("about")
    base = about.get("base_name") if isinstance(about, Mapping) else None
    return AdapterFolder("state", folder, base or None, label)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        tell_shortage_apart(error, path)
        raise CheckpointDamaged(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{path}: does not hold a JSON object")
    return value
