"""An adapter's training state on disk is everything from which training goes on bit for bit.

    step-7/
        state.safetensors   weights, exp_avg, exp_avg_sq, grad: fp32 [P], absent ones left out;
                            a gradient of several shares is [S, P]
        state.json          the adapter's settings, its counters, why its pending gradients are to
                            be refused, and the client's own notes
        manifest.json       base, layout, and the SHA-256 of the two files above

P parameters of the adapter, S shares of its work.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from manylora.checkpoint.atomic import clean_strays, logger, write_folder
from manylora.checkpoint.manifest import JSON, read_object, verify
from manylora.checkpoint.tensor_files import FileTensor, read_fp32, write_tensors
from manylora.lora.layout import Factor, Layout
from manylora.lora.state import AdapterState, Floats
from manylora.types import (
    AdapterSpec,
    CheckpointDamaged,
    CheckpointMismatch,
    ConfigError,
    SaveFailed,
    TextFormat,
)

KIND = "training-state"
TENSORS, SETTINGS = "state.safetensors", "state.json"

_VECTORS = ("weights", "exp_avg", "exp_avg_sq", "grad")
_STEP = re.compile(r"step-(\d+)")
# The numbers of input groups belong to one opening of a base, not to the vector.
_COMPARED = tuple(field.name for field in fields(Factor) if field.name != "group")
_MOST_DIFFERENCES = 20


@dataclass(frozen=True, slots=True)
class SavedState:
    """A `SavedState` is what `load_state` read and verified.

    Attributes:
        state: the adapter's state, in new arrays.
        client: what the saver put beside it.
        base_name: name of the base that it was trained on.
        base_fingerprint: fingerprint of that base.
        text_format: how its texts became tokens.
    """

    state: AdapterState
    client: dict[str, JSON]
    base_name: str
    base_fingerprint: str
    text_format: TextFormat = field(default_factory=TextFormat)


def save_state(
    folder: str | Path,
    state: AdapterState,
    *,
    base_name: str,
    base_fingerprint: str,
    client: Mapping[str, JSON],
    text_format: TextFormat | None = None,
) -> None:
    """Write `state` so that it is whole on disk when this returns.

    Args:
        folder: usually `step-N`, for `newest_state` to find; replaced if it is there.
        client: the caller's own notes (position in its data, …), plain JSON values.
        text_format: how its texts became tokens, if that is known.

    Raises:
        SaveFailed: it could not be written, or `client` would not come back as it is.
    """
    vectors = _vectors(state)
    _require_json(client, "client")
    settings = {
        "spec": _spec_json(state.spec),
        "step": state.step,
        "draws": state.draws,
        "poison": state.poison,
        "client": dict(client),
    }
    if text_format is not None and text_format != TextFormat():
        settings["text_format"] = text_format.to_json()
    factors: list[JSON] = [dict[str, JSON](asdict(factor)) for factor in state.layout.factors]
    about: dict[str, JSON] = {
        "base_name": base_name,
        "base_fingerprint": base_fingerprint,
        "layout": {"num_params": state.layout.num_params, "factors": factors},
    }
    with write_folder(folder, kind=KIND, about=about) as partial:
        write_tensors(partial / TENSORS, vectors, "fp32")
        (partial / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_state(
    folder: str | Path,
    *,
    layout: Layout | None = None,
    base_fingerprint: str | None = None,
    spec: AdapterSpec | None = None,
) -> SavedState:
    """Read a training state, after checking every byte of it.

    Args:
        layout, base_fingerprint, spec: what the caller needs the state's to be; None = any.

    Raises:
        CheckpointDamaged: it is torn, truncated or altered; the message names the files.
        TooManyFilesOpen: no descriptor is left, so it could not be read.
        CheckpointMismatch: its rank, alpha, dtype, layout or base is another; both are named.
    """
    folder = Path(folder)
    if not folder.exists():  # perhaps it was being replaced when its writer was killed
        clean_strays(folder.parent, folder.name)
    manifest = verify(folder, kind=KIND)
    settings = read_object(folder / SETTINGS)
    try:
        saved_layout = _layout_of(manifest.about["layout"])
        saved_spec = _spec_of(settings["spec"])
        step, draws, client = settings["step"], settings["draws"], settings["client"]
        poison = settings.get("poison")  # older states have none
        base_name = str(manifest.about["base_name"])
        fingerprint = str(manifest.about["base_fingerprint"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointDamaged(f"{folder}: a field is missing or wrong: {error}") from error
    if not (
        isinstance(step, int)
        and isinstance(draws, int)
        and isinstance(client, dict)
        and isinstance(poison, str | None)
    ):
        raise CheckpointDamaged(
            f"{folder / SETTINGS}: step, draws, client or poison is of a wrong type"
        )
    differences: list[str] = []
    if base_fingerprint not in (None, fingerprint):
        differences.append(
            f"it was trained on base {base_name} ({fingerprint}), here is base {base_fingerprint}"
            " (another dtype or quantization of a base is another base)"
        )
    differences += _spec_differences(saved_spec, spec) if spec else []
    differences += _layout_differences(saved_layout, layout) if layout else []
    if differences:
        raise CheckpointMismatch(f"{folder} does not fit: {_listed(differences)}")
    vectors = _read_vectors(folder / TENSORS, saved_layout.num_params)
    state = AdapterState(
        saved_spec, layout or saved_layout, **vectors, step=step, draws=draws, poison=poison
    )
    text_format = TextFormat.of_json(settings.get("text_format"))  # older states have none
    return SavedState(state, client, base_name, fingerprint, text_format)


def recorded_format(folder: Path) -> TextFormat:
    """Read from a training state how its adapter's texts became tokens; older ones say nothing.

    Raises:
        CheckpointDamaged: the settings are missing or cannot be read.
        TooManyFilesOpen: no descriptor is left.
    """
    return TextFormat.of_json(read_object(folder / SETTINGS).get("text_format"))


def newest_state(parent: str | Path) -> Path | None:
    """Return the whole folder `step-N` with the highest N; None if there is none.

    What killed writers left is cleaned up first. Damaged and half-written folders are skipped with
    a warning.

    Raises:
        CheckpointMismatch: a newer state is there, but of a format that this version cannot read.
            Going on from an older one would silently lose work.
        TooManyFilesOpen: the newest one could not be read. Going on from an older one would
            silently lose work.
    """
    parent = Path(parent)
    if not parent.is_dir():
        return None
    clean_strays(parent)
    numbered = [(int(m[1]), path) for path in parent.iterdir() if (m := _STEP.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        try:
            verify(path, kind=KIND)
        except CheckpointDamaged as error:
            logger.warning("skipped: %s", error)
        else:
            return path
    return None


def _vectors(state: AdapterState) -> dict[str, Floats]:
    vectors: dict[str, Floats] = {}
    for name in _VECTORS:
        vector: Floats | None = getattr(state, name)
        if vector is None:
            continue
        wanted = _wanted_shape(name, vector.shape, state.layout.num_params)
        if vector.dtype != np.float32 or vector.shape != wanted:
            raise SaveFailed(
                f"{name} is {vector.dtype} {list(vector.shape)}; "
                f"a training state has float32 {list(wanted)}"
            )
        # One share is written as the vector that it is.
        vectors[name] = vector[0] if name == "grad" and len(vector) == 1 else vector
    return vectors


def _read_vectors(path: Path, num_params: int) -> dict[str, Floats]:
    def check(tensors: Mapping[str, FileTensor]) -> None:
        if "weights" not in tensors or set(tensors) - set(_VECTORS):
            raise CheckpointMismatch(f"{path} holds {sorted(tensors)}; expected some of {_VECTORS}")
        for name, tensor in tensors.items():
            wanted = _wanted_shape(name, tensor.shape, num_params)
            # One share is written as the vector that it is.
            if tensor.shape != wanted and not (name == "grad" and tensor.shape == wanted[1:]):
                raise CheckpointMismatch(
                    f"{path}: {name} is {list(tensor.shape)}, its layout needs {list(wanted)}"
                )

    vectors = read_fp32(path, check)
    if "grad" in vectors and vectors["grad"].ndim == 1:
        vectors["grad"] = vectors["grad"][None]
    return vectors


def _wanted_shape(name: str, shape: tuple[int, ...], num_params: int) -> tuple[int, ...]:
    """Return [P]; for a gradient [S, P], with as many shares as it has, but at least one."""
    if name != "grad":
        return (num_params,)
    return max(1, shape[0] if len(shape) == 2 else 1), num_params


def _require_json(value: object, where: str) -> None:
    """Refuse by name what JSON would give back as something else: tuples and integer keys."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SaveFailed(f"{where} has the key {key!r}; JSON keys are strings")
            _require_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise SaveFailed(f"{where} is a {type(value).__name__}; it must be a plain JSON value")


def _spec_json(spec: AdapterSpec) -> dict[str, JSON]:
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    if isinstance(spec.targets, tuple):
        values["targets"] = list(spec.targets)
    # The order of patterns counts (the first match wins); JSON objects keep it.
    values["rank_pattern"] = dict(spec.rank_pattern)
    values["alpha_pattern"] = dict(spec.alpha_pattern)
    return values


def _spec_of(value: JSON) -> AdapterSpec:
    if not isinstance(value, dict):
        raise TypeError("spec is not an object")
    targets = value.get("targets")
    values: dict[str, object] = dict(value)
    if isinstance(targets, list):
        values["targets"] = tuple(str(target) for target in targets)
    return AdapterSpec(**values)  # pyrefly: ignore[bad-argument-type]


def _layout_of(value: JSON) -> Layout:
    if not isinstance(value, dict):
        raise TypeError("layout is not an object")
    factors, num_params = value["factors"], value["num_params"]
    if not isinstance(factors, list) or not isinstance(num_params, int):
        raise TypeError("layout has no factors or no num_params")
    found = tuple(Factor(**factor) for factor in factors)  # pyrefly: ignore
    return Layout(found, num_params)


def _spec_differences(saved: AdapterSpec, wanted: AdapterSpec) -> list[str]:
    return [
        f"its {field.name} is {getattr(saved, field.name)!r}, here {getattr(wanted, field.name)!r}"
        for field in fields(wanted)
        if getattr(saved, field.name) != getattr(wanted, field.name)
    ]


def _layout_differences(saved: Layout, wanted: Layout) -> list[str]:
    mine = {factor.site: factor for factor in saved.factors}
    theirs = {factor.site: factor for factor in wanted.factors}
    found = [
        f"it has factors for {site}, here there are none" for site in mine if site not in theirs
    ]
    found += [
        f"it has no factors for {site}, here there are" for site in theirs if site not in mine
    ]
    for site, factor in mine.items():
        found += [
            f"{site}: its {name} is {getattr(factor, name)}, here {getattr(theirs[site], name)}"
            for name in _COMPARED
            if site in theirs and getattr(factor, name) != getattr(theirs[site], name)
        ]
    # Offsets follow from the rest; name them only when nothing else tells the two apart.
    return [text for text in found if "_start is" not in text] or found


def _listed(differences: list[str]) -> str:
    shown, more = differences[:_MOST_DIFFERENCES], len(differences) - _MOST_DIFFERENCES
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
