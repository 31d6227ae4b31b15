"""Adapters are written and read as PEFT's own files, which PEFT, vLLM and SGLang load.

    adapter_model.safetensors   base_model.model.<site>.lora_A.weight [R, K], .lora_B.weight [N, R]
    adapter_config.json         PEFT's LoraConfig
    manylora.json               ours: base, what ends an answer, the SHA-256 of the other files
    chat_template.jinja         only if it was trained with its own template

K input features, N output features, R LoRA rank, P parameters of the adapter.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from manylora.checkpoint.atomic import logger, write_folder
from manylora.checkpoint.manifest import JSON, SIDECAR, read_object, verify
from manylora.checkpoint.peft_config import (
    PeftConfig,
    exact_pattern,
    exact_targets,
    parse_config,
    refuse_lost,
)
from manylora.checkpoint.tensor_files import (
    DTYPES,
    Encoded,
    FileTensor,
    admit_tensors,
    decoded,
    encoded,
    read_tensors,
    rounded,
    write_tensors,
)
from manylora.lora.layout import Factor, Layout, plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import Floats
from manylora.types import (
    AdapterSpec,
    CheckpointDamaged,
    CheckpointMismatch,
    ConfigError,
    NotFinite,
    TextFormat,
    Unsupported,
)
from manylora.types.adapter_spec import DType
from manylora.types.files import tell_shortage_apart

KIND = "peft-adapter"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
# As tokenizers keep it; no template is longer.
TEMPLATE, _LONGEST_TEMPLATE = "chat_template.jinja", 1 << 20

_KEY = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
# PEFT saves the frozen weight along when the output head is a target.
_BASE_COPY = re.compile(r"base_model\.model\.(?P<site>.+)\.base_layer\.weight")


@dataclass(frozen=True, slots=True)
class ImportedAdapter:
    """An `ImportedAdapter` is what `import_peft` read.

    Attributes:
        spec: settings that give the same scale at every site; its targets match the file's modules
            and no other.
        layout: `plan_layout` of that spec.
        weights_P: fp32 [P], exactly the file's numbers.
        base_name: the base that the file names, if any.
        text_format: how the adapter's texts became tokens, as far as the folder tells.
    """

    spec: AdapterSpec
    layout: Layout
    weights_P: Floats
    base_name: str | None
    text_format: TextFormat


def export_peft(
    folder: str | Path,
    spec: AdapterSpec,
    layout: Layout,
    weights_P: Floats,
    *,
    base_name: str,
    sites: Sequence[Site],
    base_fingerprint: str | None = None,
    text_format: TextFormat | None = None,
) -> None:
    """Write an adapter as stock PEFT reads it, in the adapter's own dtype.

    rsLoRA is folded into alpha, because not every consumer of these files reads `use_rslora`.

    Args:
        weights_P: fp32 [P].
        sites: every linear layer of the base, targeted or not, so that the written
            `target_modules` match the adapter's modules and no other.
        text_format: how its texts became tokens: what ends its answers goes beside our own
            fingerprint, its own chat template into a file as tokenizers have it.

    Raises:
        CheckpointMismatch: `weights_P` or `sites` do not belong to `layout`.
        NotFinite: a weight is NaN or Inf, or becomes so in the adapter's dtype.
        Unsupported: PEFT would look for some of its factors under other names.
        SaveFailed: it could not be written.
    """
    if weights_P.shape != (layout.num_params,):
        raise CheckpointMismatch(
            f"weights have shape {list(weights_P.shape)}, the layout needs [{layout.num_params}]"
        )
    unknown = {factor.site for factor in layout.factors} - {site.name for site in sites}
    if unknown:
        raise CheckpointMismatch(f"the base has no linear layers {sorted(unknown)}")
    refuse_lost((factor.site for factor in layout.factors), sites, str(folder))
    # Also a private copy: training may go on while the file is written.
    numbers_P = encoded(weights_P, spec.dtype)
    if not np.isfinite(decoded(numbers_P, spec.dtype)).all():
        raise NotFinite(f"{folder} was not written: the adapter has NaN or Inf in {spec.dtype}")
    tensors: dict[str, Encoded] = {}
    for factor in layout.factors:
        prefix = f"base_model.model.{factor.site}"
        tensors[f"{prefix}.lora_A.weight"] = factor.a(numbers_P)
        tensors[f"{prefix}.lora_B.weight"] = factor.b_transposed(numbers_P).T
    config = _config_json(spec, layout, base_name, sites)
    about: dict[str, JSON] = {
        "base_name": base_name,
        "base_fingerprint": base_fingerprint,
        "use_rslora": spec.use_rslora,
    }
    text_format = text_format or TextFormat()
    about |= _not_in_config(spec, config, text_format)
    with write_folder(folder, kind=KIND, about=about, manifest_name=SIDECAR) as partial:
        if text_format.chat_template is not None:
            (partial / TEMPLATE).write_text(text_format.chat_template, encoding="utf-8")
        write_tensors(partial / WEIGHTS, tensors, spec.dtype, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")


def _not_in_config(
    spec: AdapterSpec, config: Mapping[str, JSON], text_format: TextFormat
) -> dict[str, JSON]:
    """Return the settings that PEFT's own file cannot hold."""
    about: dict[str, JSON] = {}
    if config["lora_dropout"] != spec.dropout:
        about["dropout"] = spec.dropout
    if text_format.stop:
        about["stop"] = list(text_format.stop)
    return about


def import_peft(
    folder: str | Path,
    sites: Sequence[Site],
    *,
    seed: int = 0,
    dtype: DType | None = None,
    base_weight: Callable[[str], Floats] | None = None,
) -> ImportedAdapter:
    """Read a PEFT LoRA folder, whichever program wrote it.

    Args:
        sites: every linear layer of the base.
        seed: seed of the adapter from now on (files do not tell).
        dtype: dtype of the adapter from now on; None = the file's, or fp32 where it holds several.
        base_weight: module path → the base's weight [N, K], fp32. A file may hold a copy of the
            output head's frozen weight; with this it is compared, without it a warning is logged.

    Raises:
        Unsupported: it holds something other than plain LoRA factors, which the message names.
        CheckpointMismatch: keys are missing, unexpected or misshapen; all such are named.
        CheckpointDamaged: files are missing, torn or altered, or hold NaN or Inf.
        DoesNotFit: there is no memory for the factors.
    """
    folder = Path(folder)
    if (folder / SIDECAR).is_file():
        _verify_sidecar(folder)
    config = parse_config(read_object(folder / CONFIG, MAX_CONFIG_BYTES), str(folder / CONFIG))
    tensors = _read_tensors(folder)
    factors, copies = _sort_keys(folder, tensors, sites, config)
    for key, tensor in tensors.items():
        if tensor.known is None:
            raise Unsupported(f"{folder / WEIGHTS}: {key} is {tensor.dtype}; only {list(DTYPES)}")
    for site, key in copies.items():
        _check_base_copy(folder, site, tensors[key], base_weight)
    found = {tensors[key].known for key in factors.values()}
    dtype = dtype or (found.pop() if len(found) == 1 else None) or "fp32"
    dropout = _recorded(folder).get("dropout")
    if isinstance(dropout, int | float) and not isinstance(dropout, bool):
        config = replace(config, dropout=dropout)
    spec = _spec_of(folder, config, {site for site, _ in factors}, sites, seed, dtype)
    layout = plan_layout(spec, resolve_targets(spec, sites))
    # One factor is in memory beside the vector.
    admit_tensors(folder / WEIGHTS, (tensors[key] for key in factors.values()))
    weights_P = np.zeros(layout.num_params, np.float32)
    for factor in layout.factors:
        factor.a(weights_P)[...] = tensors[factors[factor.site, "A"]].fp32()
        factor.b_transposed(weights_P)[...] = tensors[factors[factor.site, "B"]].fp32().T
    if not np.isfinite(weights_P).all():
        raise CheckpointDamaged(f"{folder / WEIGHTS} holds NaN or Inf")
    return ImportedAdapter(spec, layout, weights_P, config.base_name, _text_format(folder))


def _recorded(folder: Path) -> dict[str, JSON]:
    """Return what our own file says about the adapter; {} where the file is missing."""
    about = read_object(folder / SIDECAR).get("about") if (folder / SIDECAR).is_file() else None
    return about if isinstance(about, dict) else {}


def _text_format(folder: Path) -> TextFormat:
    stop = _recorded(folder).get("stop")
    template: str | None = None
    path = folder / TEMPLATE
    if path.is_file() and path.stat().st_size <= _LONGEST_TEMPLATE:
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            tell_shortage_apart(error, path)
            raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    return TextFormat.of_json({"stop": stop, "chat_template": template})


def _config_json(
    spec: AdapterSpec, layout: Layout, base_name: str, sites: Sequence[Site]
) -> dict[str, JSON]:
    weights = {site.name: f"{site.name}.weight" for site in sites if site.naming == "parameter"}
    keys = {f.site: weights.get(f.site, f.site) for f in layout.factors}
    rank, rank_pattern = exact_pattern({keys[f.site]: f.rank for f in layout.factors})
    alpha, alpha_pattern = exact_pattern(
        {keys[f.site]: _plain_alpha(spec, f) for f in layout.factors}
    )
    parameters = sorted(weights[f.site] for f in layout.factors if f.site in weights)
    modules = {f.site for f in layout.factors} - set(weights)
    # An empty list would be taken for the family's usual modules.
    targets = exact_targets(modules, sites) if modules or not parameters else ()
    return {
        "alpha_pattern": dict(alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        # PEFT has no dropout on parameters; our own file says what it was.
        "lora_dropout": 0.0 if parameters else spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(rank_pattern),
        "revision": None,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        **({"target_parameters": list[JSON](parameters)} if parameters else {}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _plain_alpha(spec: AdapterSpec, factor: Factor) -> int | float:
    """Return the alpha for which alpha / rank is the factor's scale, as an int if it is whole."""
    alpha = factor.alpha
    if spec.use_rslora:
        near = factor.scale * factor.rank
        # The product is rounded; one of its neighbours may give the scale back to the last bit.
        exact = (near, math.nextafter(near, 0.0), math.nextafter(near, math.inf))
        alpha = next((a for a in exact if a / factor.rank == factor.scale), near)
    return int(alpha) if float(alpha).is_integer() else alpha


def _verify_sidecar(folder: Path) -> None:
    try:
        verify(folder, SIDECAR, kind=KIND)
    except CheckpointDamaged as error:
        raise CheckpointDamaged(
            f"{error} (if the change was meant, delete {folder / SIDECAR})"
        ) from error


def _read_tensors(folder: Path) -> dict[str, FileTensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise Unsupported(
                f"{folder} has its weights in adapter_model.bin, a pickle, which can run code when "
                "it is read; save the adapter as safetensors"
            )
        raise CheckpointDamaged(f"{folder} is incomplete: {WEIGHTS} is missing")
    return read_tensors(path)


def _sort_keys(
    folder: Path, tensors: Mapping[str, FileTensor], sites: Sequence[Site], config: PeftConfig
) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Return (site, "A" or "B") → key, and site → key of a copy of the base's weight. Raises
    CheckpointMismatch: keys are missing, unexpected or of a wrong shape; all such are named."""
    known = {site.name: site for site in sites}
    adapted = {site.name for site in sites if config.adapts(site)}
    factors: dict[tuple[str, str], str] = {}
    copies: dict[str, str] = {}
    faults: list[str] = []
    for key, tensor in tensors.items():
        match, copy = _KEY.fullmatch(key), _BASE_COPY.fullmatch(key)
        name = match["site"] if match else copy["site"] if copy else ""
        if name not in known:
            faults.append(f"unexpected {key} (not a factor of a linear layer of this base)")
        elif config.targets is not None and name not in adapted:
            faults.append(f"unexpected {key} (the config does not target this layer)")
        elif match and (name, match["factor"]) in factors:
            faults.append(f"unexpected {key} (a second one for the same factor)")
        else:
            if match:
                factors[name, match["factor"]] = key
            else:
                copies[name] = key
            site, rank = known[name], config.rank_of(name)
            shape = [site.out_features, site.in_features]
            if match:
                shape = [rank, shape[1]] if match["factor"] == "A" else [shape[0], rank]
            if list(tensor.shape) != shape:
                faults.append(f"misshapen {key} (it is {list(tensor.shape)}, not {shape})")
    if config.targets is None:  # an old file: what it holds is all that tells
        adapted = {name for name, _ in factors}
    faults += [
        f"missing base_model.model.{site.name}.lora_{factor}.weight"
        for site in sites
        for factor in "AB"
        if site.name in adapted and (site.name, factor) not in factors
    ]
    if not factors:
        faults.append("it has no factors at all")
    if faults:
        listed = "\n  ".join(faults)
        raise CheckpointMismatch(f"{folder / WEIGHTS} does not fit this base:\n  {listed}")
    return factors, copies


def _check_base_copy(
    folder: Path, site: str, copy: FileTensor, base_weight: Callable[[str], Floats] | None
) -> None:
    if base_weight is None:
        logger.warning("%s: its copy of the base's %s was not compared with the base", folder, site)
        return
    copy_NK, weight_NK = copy.fp32(), base_weight(site)
    # Either side may have been rounded to the other's dtype; the base's does not show in fp32.
    if not (
        any(np.array_equal(rounded(copy_NK, dtype), weight_NK) for dtype in DTYPES)
        or np.array_equal(rounded(weight_NK, copy.known or "fp32"), copy_NK)
    ):
        raise CheckpointMismatch(f"{folder} holds another {site} weight than this base has")


def _spec_of(
    folder: Path,
    config: PeftConfig,
    chosen: set[str],
    sites: Sequence[Site],
    seed: int,
    dtype: DType,
) -> AdapterSpec:
    rank, rank_pattern = exact_pattern({name: config.rank_of(name) for name in sorted(chosen)})
    alpha, alpha_pattern = exact_pattern({name: config.alpha_of(name) for name in sorted(chosen)})
    try:
        return AdapterSpec(
            rank=rank,
            alpha=alpha,
            targets=exact_targets(chosen, sites),
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            use_rslora=config.use_rslora,
            dropout=config.dropout,
            dtype=dtype,
            seed=seed,
        )
    except ConfigError as error:
        raise Unsupported(f"{folder / CONFIG}: {error}") from error
