"""A merged model is an adapter added to its base and saved as an ordinary model.

K input features, N output features, R LoRA rank, P parameters of the adapter, V vocabulary.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from manylora.checkpoint.atomic import logger, write_folder
from manylora.checkpoint.manifest import JSON, MERGED, SIDECAR
from manylora.lora.layout import Factor, Layout
from manylora.lora.state import Floats
from manylora.types import BaseModelError, CheckpointMismatch, NotFinite, TextFormat, Unsupported
from manylora.types.files import tell_shortage_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_merged(
    folder: str | Path,
    base: str | Path,
    layout: Layout,
    weights_P: Floats,
    *,
    base_fingerprint: str | None = None,
    text_format: TextFormat | None = None,
) -> None:
    """Write base + scale·B·A as a model that needs neither PEFT nor manylora.

    Sums are made in fp32 and rounded once to the base's own dtype. An output head that is tied to
    the embedding and has factors is untied, since the embedding must stay as it is.

    Args:
        weights_P: fp32 [P].
        base: folder or locally cached name of the base, which is loaded anew.
        text_format: the adapter's: the model ends its answers at its stop tokens, and the tokenizer
            has its chat template.

    Raises:
        BaseModelError: the base cannot be opened.
        CheckpointMismatch: the factors do not fit the base.
        Unsupported: a targeted layer is not a plain linear layer (quantised, say).
        NotFinite: a merged weight is NaN or Inf.
        SaveFailed: it could not be written.
    """
    from transformers import AutoModelForCausalLM

    from manylora.models.base import resolve_base

    if weights_P.shape != (layout.num_params,):
        raise CheckpointMismatch(
            f"weights have shape {list(weights_P.shape)}, the layout needs [{layout.num_params}]"
        )
    vector_P = torch.tensor(weights_P, dtype=torch.float32)
    source = resolve_base(base)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as error:
        raise BaseModelError(f"base model {base} cannot be opened: {error}") from error
    _untie_head(model, layout)
    for factor in layout.factors:
        _add(model, factor, vector_P)
    text_format = text_format or TextFormat()
    if text_format.stop:
        model.generation_config.eos_token_id = list(text_format.stop)
    about: dict[str, JSON] = {"base_name": str(base), "base_fingerprint": base_fingerprint}
    with write_folder(folder, kind=MERGED, about=about, manifest_name=SIDECAR) as partial:
        _save_model(model, partial, str(base))
        _save_tokenizer(source, partial, text_format.chat_template)


def _save_model(model: "PreTrainedModel", partial: Path, base: str) -> None:
    from transformers import GenerationConfig

    # Many bases name a temperature without `do_sample`, which transformers reads and will not
    # write; it goes along as it is.
    generation = model.generation_config
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(partial)
        if generation is not None:
            generation.to_json_file(partial / "generation_config.json")
    except OSError:
        raise  # of the disk, which `write_folder` names
    except Exception as error:
        raise Unsupported(
            f"base model {base} cannot be saved by transformers ({type(error).__name__}: {error})"
        ) from error


def _untie_head(model: "PreTrainedModel", layout: Layout) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    if not any(factor.site in names for factor in layout.factors):
        return
    weight_VK = model.get_parameter(f"{names[0]}.weight")
    if weight_VK is embedding.weight:
        assert head is not None
        head.weight = torch.nn.Parameter(weight_VK.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


@torch.no_grad()
def _add(model: "PreTrainedModel", factor: Factor, weights_P: torch.Tensor) -> None:
    try:
        linear = model.get_submodule(factor.site)
    except AttributeError as error:
        raise CheckpointMismatch(f"the base has no module {factor.site}") from error
    if type(linear) is not torch.nn.Linear or not linear.weight.is_floating_point():
        raise Unsupported(
            f"{factor.site} is a {type(linear).__name__}; only plain linear layers can be merged "
            "(merge into the unquantised base)"
        )
    if linear.weight.shape != (factor.out_features, factor.in_features):
        raise CheckpointMismatch(
            f"{factor.site} is {list(linear.weight.shape)} in the base; "
            f"its factors are for [{factor.out_features}, {factor.in_features}]"
        )
    b_NR, a_RK = factor.b_transposed(weights_P).T, factor.a(weights_P)
    merged_NK = linear.weight.float() + factor.scale * (b_NR @ a_RK)
    rounded_NK = merged_NK.to(linear.weight.dtype)
    if not bool(torch.isfinite(rounded_NK).all()):
        raise NotFinite(f"the merged weight of {factor.site} has NaN or Inf")
    linear.weight.copy_(rounded_NK)


def _save_tokenizer(base: str, partial: Path, chat_template: str | None) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        tell_shortage_apart(error, base)
        logger.warning("%s has no tokenizer that can be copied: %s", base, error)
        return
    if tokenizer is not None:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(partial)
