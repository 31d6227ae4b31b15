"""A run file may write into a folder only if it is the run that the folder is of."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from manylora.config import AdapterEntry, RunFile, is_data_file, load_run_file, resolved_yaml
from manylora.runs.rl.user_code import code_files
from manylora.runs.run_folder import AdapterPaths, RunPaths, read_json, write_json, write_text
from manylora.runs.saved_states import saved_steps
from manylora.types import ConfigError
from manylora.types.files import tell_shortage_apart

# Settings that change what is shown, or where files lie, but no weight.
_FREE = frozenset(
    {"out", "mesh", "ray", "engine_address", "step_seconds"}
    | {"checkpoints", "report", "tensorboard", "wandb", "trackio"}
)
_SHOWN = 8
# Reading as many takes long enough to be worth telling.
ANNOUNCED_BYTES = 2**30

Inputs = dict[str, dict[str, str | None]]
Hashing = Callable[[str], None]


def claim(
    run: RunFile, paths: RunPaths, *, overwrite: bool = False, hashing: Hashing = lambda _: None
) -> None:
    """Make OUT this run's: begin it, take it up again (it may have become longer), or refuse.

    Args:
        overwrite: delete what another run wrote there (that, and nothing else).
        hashing: told of each big data file that is about to be read through.

    Raises:
        ConfigError: OUT holds another run, or something that is no run.
    """
    names = [entry.name for entry in run.adapters]
    files = (paths.run_yaml, paths.inputs, paths.summary, paths.report)
    reserved = {path.name.lower() for path in files}
    for name in names:
        if name.lower() in reserved:
            raise ConfigError(
                f"adapter name {name!r} is the name of a file of the run; choose another"
            )
    inputs = data_hashes(run, hashing)
    if paths.run_yaml.exists():
        if overwrite:
            paths.delete(sorted({*names, *_names_in(paths.run_yaml)}))
        else:
            inputs = _same_run(run, paths, inputs)
    else:
        _refuse_strange_folders(paths, names)
    write_json(paths.inputs, inputs)
    write_text(paths.run_yaml, resolved_yaml(run))


def data_hashes(run: RunFile, hashing: Hashing = lambda _: None) -> Inputs:
    """Return the SHA-256 of each adapter's data files, and of the files of code that it names;
    None = no such file, or it is on a hub."""

    @cache
    def digest(source: str) -> str | None:
        return _sha256(source, hashing) if is_data_file(source) else None

    def named(entry: AdapterEntry) -> dict[str, str | None]:
        settings = entry.kind_settings
        data = {source: digest(source) for source in settings.sources().values()}
        files = [file for name in settings.code() for file in code_files(name)]
        return data | {str(file): _sha256(str(file), hashing) for file in files}

    return {entry.name: named(entry) for entry in run.adapters}


def _sha256(source: str, hashing: Hashing) -> str | None:
    try:
        with Path(source).open("rb") as file:
            if os.fstat(file.fileno()).st_size > ANNOUNCED_BYTES:
                hashing(source)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        tell_shortage_apart(error, source)
        return None  # the adapter that needs it will say so


def _names_in(run_yaml: Path) -> list[str]:
    try:
        data = yaml.safe_load(run_yaml.read_text(encoding="utf-8"))
        names = [entry["name"] for entry in data["adapters"]]
    except (OSError, yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        tell_shortage_apart(error, run_yaml)
        return []
    # A name is used as a path here, and the file may have been edited.
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def _refuse_strange_folders(paths: RunPaths, names: list[str]) -> None:
    for name in names:
        folder = paths.adapter(name).root
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} exists, and {paths.root} holds no run (there is no run.yaml); "
                "choose another out"
            )


def _same_run(run: RunFile, paths: RunPaths, inputs: Inputs) -> Inputs:
    """Return the inputs to note down, if OUT is of this run; raise ConfigError otherwise."""
    try:
        before = load_run_file(paths.run_yaml)
    except ConfigError as error:
        raise ConfigError(
            f"{paths.run_yaml} cannot be read, so it is not known whether it is this run; choose "
            f"another out, or overwrite it with --overwrite ({error})"
        ) from error
    differences = list(_differences(_comparable(before), _comparable(run)))
    differences += _changed_lengths(before, run, paths)
    noted = read_json(paths.inputs)
    noted = noted if isinstance(noted, dict) else {}
    if not differences:
        differences = list(_changed_data(paths, noted, inputs))
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:_SHOWN])
        more = len(differences) - _SHOWN
        raise ConfigError(
            f"{paths.root} holds another run:{shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nchoose another out, or start afresh with --overwrite"
        )
    _forget_samples(paths, noted, inputs)
    _reopen(before, run, paths)
    return {
        name: {source: digest or noted.get(name, {}).get(source) for source, digest in of.items()}
        for name, of in inputs.items()
    }


def _comparable(run: RunFile) -> dict[str, Any]:
    data = run.model_dump(mode="json")
    # By name: their order in the file changes nothing.
    adapters = {entry["name"]: entry for entry in data.pop("adapters")}
    for entry in run.adapters:
        compared = adapters[entry.name]
        # How long it is; a run that is finished may be made longer.
        for length in entry.kind_settings.LENGTHS:
            del compared[entry.kind][length]
        del compared["checkpoints"]
    return {"adapters": adapters, **{k: v for k, v in data.items() if k not in _FREE}}


def _changed_lengths(before: RunFile, now: RunFile, paths: RunPaths) -> Iterator[str]:
    """Return the lengths that cannot be changed any more, and why."""
    old = {entry.name: entry.kind_settings.length for entry in before.adapters}
    for entry in now.adapters:
        length = entry.kind_settings.length
        if old.get(entry.name, length) == length:
            continue
        (was, count), (name, wanted) = old[entry.name], length
        made = _steps_made(paths.adapter(entry.name))
        if made is None:
            continue  # nothing is trained yet
        change = (
            f"adapters.{entry.name}.{entry.kind}.{name}: {was} {count:,} there, {wanted:,} here; "
        )
        optimizer = entry.optimizer
        if name == was and wanted < count:
            yield f"{change}a run can be made longer, not shorter"
        elif optimizer.schedule != "constant" and made > optimizer.warmup_steps:
            yield (
                f"{change}its schedule is {optimizer.schedule}, which depends on the number of "
                f"all steps, so the {made:,} that it has made would have had other learning rates; "
                "only with schedule: constant can it be made longer. A new run may begin where it "
                f"ended, with lora.init_from: {paths.adapter(entry.name).final}"
            )
        elif not saved_steps(paths.adapter(entry.name).checkpoints):
            yield f"{change}its training states are gone, so it cannot go on"


def _reopen(before: RunFile, now: RunFile, paths: RunPaths) -> None:
    """Have finished adapters go on that are longer now. This comes before run.yaml says so: a run
    that is killed in between is asked again."""
    old = {entry.name: entry.kind_settings.length for entry in before.adapters}
    for entry in now.adapters:
        if old[entry.name] != entry.kind_settings.length:
            paths.adapter(entry.name).result.unlink(missing_ok=True)


def _steps_made(adapter: AdapterPaths) -> int | None:
    """Return the steps behind an adapter with a training state or finished; None for any other."""
    result = read_json(adapter.result)
    finished = result.get("steps") if isinstance(result, dict) else None
    ended = [finished] if isinstance(finished, int) else []
    return max([*saved_steps(adapter.checkpoints), *ended], default=None)


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            path = f"{where}.{key}" if where else str(key)
            if key not in now:
                yield f"{path} is not in this run file"
            elif key not in before:
                yield f"{path} is not in that run"
            else:
                yield from _differences(before[key], now[key], path)
    elif before != now:
        yield f"{where}: {before!r} there, {now!r} here"


def _changed_data(paths: RunPaths, noted: Mapping[str, Any], inputs: Inputs) -> Iterator[str]:
    """Return the data files that an adapter was trained on and that have changed since.

    An adapter that failed before its first checkpoint has nothing to mix up: its data may change.
    """
    for name, source in _changed(noted, inputs):
        if _is_trained(paths.adapter(name)):
            what = "code" if source.endswith(".py") else "data"
            yield f"{what} of adapter {name}: {source} has changed since"


def _forget_samples(paths: RunPaths, noted: Mapping[str, Any], inputs: Inputs) -> None:
    """Delete what was sampled for an adapter that may begin anew with other prompts or rewards."""
    for name, _ in _changed(noted, inputs):
        if not _is_trained(paths.adapter(name)):
            shutil.rmtree(paths.adapter(name).rollouts, ignore_errors=True)


def _changed(noted: Mapping[str, Any], inputs: Inputs) -> Iterator[tuple[str, str]]:
    """Return each adapter's name with each of its files that is another than was noted."""
    for name, of in inputs.items():
        for source, digest in of.items():
            old = noted.get(name, {}).get(source)
            if old and digest and old != digest:
                yield name, source


def _is_trained(adapter: AdapterPaths) -> bool:
    """Return whether there is a state, or more, that earlier data have gone into."""
    return adapter.checkpoints.is_dir() or adapter.final.is_dir()
