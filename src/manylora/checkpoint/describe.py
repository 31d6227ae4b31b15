"""An adapter's folder is described by its headers and JSON, and verified where it can be."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from manylora.checkpoint import peft_files, training_state
from manylora.checkpoint.manifest import JSON, MANIFEST, MERGED, SIDECAR, read_object, verify
from manylora.checkpoint.tensor_files import read_tensors
from manylora.types import CheckpointDamaged, CheckpointError
from manylora.types.files import tell_shortage_apart

# A report has all of these; those that do not apply are None.
_FIELDS = (
    *("base", "base_fingerprint", "rank", "ranks", "alpha", "alphas", "use_rslora", "targets"),
    *("parameters", "dtype", "step", "bytes", "verified", "reason"),
)


def describe(folder: str | Path) -> dict[str, JSON]:
    """Describe what `folder` holds; damage is part of the answer, not an error.

    Returns:
        kind: `training-state`, `peft-adapter`, `merged-model` or `model`.
        folder, base, base_fingerprint: where it is and what it belongs to.
        rank, alpha: the common ones.
        ranks, alphas: all that occur.
        targets: the targets as the settings have them.
        parameters: their number; of a training state, those of the adapter itself.
        dtype: dtype of the adapter's factors, or of the model's weights.
        step: optimizer steps made (training states only).
        bytes: bytes of all files.
        verified: whether every file is there with the right SHA-256.
        reason: why it is not verified.

    Raises:
        CheckpointDamaged: the folder holds none of the above.
        TooManyFilesOpen: no descriptor is left, so its files could not be read.
    """
    folder = Path(folder)
    report: dict[str, JSON] = {"kind": None, "folder": str(folder)}
    report |= dict.fromkeys(_FIELDS)
    if (folder / training_state.SETTINGS).is_file() or (folder / MANIFEST).is_file():
        report["kind"], name, fill = training_state.KIND, MANIFEST, _fill_state
    elif (folder / peft_files.CONFIG).is_file() or (folder / peft_files.WEIGHTS).is_file():
        report["kind"], name, fill = peft_files.KIND, SIDECAR, _fill_peft
    elif (folder / "config.json").is_file():
        merged_here = (folder / SIDECAR).is_file()
        report["kind"] = MERGED if merged_here else "model"
        name, fill = SIDECAR, _fill_model
    else:
        raise CheckpointDamaged(f"{folder} holds no adapter, no training state and no model")
    report["bytes"] = _bytes_below(folder)
    report["verified"], report["reason"] = _verified(folder, name)
    try:
        fill(folder, report)
    except (CheckpointError, KeyError, TypeError) as error:
        report["verified"] = False
        report["reason"] = report["reason"] or f"{type(error).__name__}: {error}"
    return report


def _bytes_below(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        tell_shortage_apart(error, folder)
        raise


def _verified(folder: Path, name: str) -> tuple[bool, str | None]:
    if name == SIDECAR and not (folder / name).is_file():
        return False, f"there is no {name} to hold the files against"
    try:
        verify(folder, name)
    except CheckpointError as error:
        return False, str(error)
    return True, None


def _fill_state(folder: Path, report: dict[str, JSON]) -> None:
    settings = read_object(folder / training_state.SETTINGS)
    spec = _object(settings["spec"])
    report.update({key: spec[key] for key in ("rank", "alpha", "use_rslora", "targets", "dtype")})
    report["step"] = settings["step"]
    about = _object(read_object(folder / MANIFEST)["about"])
    report["base"], report["base_fingerprint"] = about["base_name"], about["base_fingerprint"]
    layout = _object(about["layout"])
    report["parameters"] = layout["num_params"]
    factors = layout["factors"]
    if isinstance(factors, list):
        _fill_factors(report, [_object(factor) for factor in factors])


def _fill_factors(report: dict[str, JSON], factors: Iterable[Mapping[str, JSON]]) -> None:
    ranks = {rank for factor in factors if isinstance(rank := factor["rank"], int)}
    alphas = {float(a) for factor in factors if isinstance(a := factor["alpha"], int | float)}
    report["ranks"] = list[JSON](sorted(ranks))
    report["alphas"] = list[JSON](sorted(alphas))


def _fill_peft(folder: Path, report: dict[str, JSON]) -> None:
    config = read_object(folder / peft_files.CONFIG, peft_files.MAX_CONFIG_BYTES)
    report["base"] = config.get("base_model_name_or_path")
    report["rank"], report["alpha"] = config.get("r"), config.get("lora_alpha")
    report["use_rslora"] = config.get("use_rslora", False)
    report["targets"] = config.get("target_modules")
    if (folder / SIDECAR).is_file():
        about = _object(read_object(folder / SIDECAR)["about"])
        report["base_fingerprint"] = about["base_fingerprint"]
    if not (folder / peft_files.WEIGHTS).is_file():
        raise CheckpointDamaged(f"{folder} is incomplete: {peft_files.WEIGHTS} is missing")
    header = _header(folder / peft_files.WEIGHTS)
    _fill_tensors(report, header.values())
    ranks = {shape[0] for key, (_, shape) in header.items() if ".lora_A." in key and shape}
    report["ranks"] = list[JSON](sorted(ranks))
    patterns = _object(config.get("alpha_pattern") or {}).values()
    alphas = {float(a) for a in (report["alpha"], *patterns) if isinstance(a, int | float)}
    report["alphas"] = list[JSON](sorted(alphas))


def _fill_model(folder: Path, report: dict[str, JSON]) -> None:
    if (folder / SIDECAR).is_file():
        about = _object(read_object(folder / SIDECAR)["about"])
        report["base"], report["base_fingerprint"] = about["base_name"], about["base_fingerprint"]
    headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))]
    if not headers:
        raise CheckpointDamaged(f"{folder} has a config.json and no *.safetensors")
    _fill_tensors(report, [tensor for header in headers for tensor in header.values()])


def _fill_tensors(report: dict[str, JSON], tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    tensors = list(tensors)
    report["parameters"] = sum(math.prod(shape) for _, shape in tensors)
    names = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    report["dtype"] = "+".join(sorted({names.get(dtype, dtype) for dtype, _ in tensors}))


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return key → (dtype, shape) of a safetensors file, without reading its tensors."""
    return {key: (tensor.dtype, tensor.shape) for key, tensor in read_tensors(path).items()}


def _object(value: JSON) -> dict[str, JSON]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.40} is not an object")
    return value
