"""A base model is open, and has an output head.

T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manylora.models.fully_sharded import Shared, forget_forward
from manylora.models.loading_in_parts import SAMPLED, sampled_fingerprint, sampling_stride
from manylora.models.splitting import SplitLinear
from manylora.models.stream import PackedStream, packed, padded_rows
from manylora.parallel import Axis, Mesh
from manylora.types import Unsupported
from manylora.types.weight_forms import Quantization

SEEDLING = "seedling"


@dataclass(slots=True)
class Head:
    """The frozen output head gives logits = softcap·tanh(factor·(h Wᵀ + bias) / softcap).

    On a mesh a rank has the logits of its part of the vocabulary, and the weight is read while
    `gathered` is open.

    Attributes:
        layer: the linear layer.
        softcap: None where there is none: logits = factor·(h Wᵀ + bias).
        factor: by which the family multiplies its logits (`agreement.logit_factor`), mostly 1.
        axis: the ranks that have the other parts of the vocabulary; None where there is no mesh.
    """

    layer: nn.Linear
    softcap: float | None
    name: str
    axis: Axis | None = None
    shared: Shared = field(default_factory=Shared)
    factor: float = 1.0

    @property
    def weight_VH(self) -> Tensor:
        return self.layer.weight

    @property
    def bias_V(self) -> Tensor | None:
        return self.layer.bias

    @property
    def vocab(self) -> int:
        """The whole vocabulary has this many tokens, V."""
        layer = self.layer
        return layer.whole_out if isinstance(layer, SplitLinear) else layer.out_features

    @property
    def tokens(self) -> tuple[int, int]:
        """This rank's logits are of this part [first, last) of the vocabulary."""
        return (0, self.vocab) if self.axis is None else self.axis.share(self.vocab)

    def scaled_(self, raw_TV: Tensor) -> Tensor:
        """Make logits [T, V] of what the layer gives (with the adapters' part), in place."""
        if self.factor != 1.0:
            raw_TV.mul_(self.factor)
        if self.softcap is not None:
            raw_TV.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw_TV

    def cap_slope(self, logits_TV: Tensor) -> Tensor | None:
        """Return the softcap's derivative at logits of `scaled_`; None without a softcap."""
        if self.softcap is None:
            return None
        return (logits_TV / self.softcap).square_().neg_().add_(1.0)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While this is open the weight may be read; every rank opens it at the same point."""
        with self.shared.gathered():
            yield


@dataclass(slots=True)
class BaseModel:
    """A `BaseModel` is frozen, and ready for packed streams.

    Attributes:
        name: as the user gave it; written into exported adapters.
        folder: where its files are; the name itself for a hub id.
        model: the whole causal LM.
        backbone: all of the model but the head.
        tokenizer: None if the folder has none.
        context_length: longest sequence.
        eos_token_ids: tokens that end an answer: the model's and the tokenizer's.
        fingerprint: tells whether a checkpoint belongs to these weights.
        quantization: how the weights of its linear layers are kept; None = in `dtype`.
    """

    name: str
    folder: str
    model: Any
    backbone: nn.Module
    head: Head
    tokenizer: Any
    context_length: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    mesh: Mesh
    quantization: Quantization | None = None

    def hidden(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """Return the last hidden states [T, H] of the stream that is open (see `packed`)."""
        output = self.backbone(
            input_ids=tokens_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False
        )
        if not torch.is_grad_enabled():
            forget_forward(self.backbone)
        return output.last_hidden_state[0]

    @torch.no_grad()
    def run_nothing(self) -> None:
        """Run a forward of padding rows: every rank of a mesh runs as many as the others."""
        zeros_T = torch.zeros(padded_rows(1), dtype=torch.long, device=self.device)
        with packed(PackedStream([], len(zeros_T))):
            self.hidden(zeros_T, zeros_T)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Return logits [T, V] in fp32; adapters act on the head if a routing table is open.

        Under tensor parallelism the ranks' parts are gathered: for a bounded number of rows.
        """
        with self.head.gathered():
            logits_TV = self.model.get_output_embeddings()(hidden_TH).float()
        return self.head.scaled_(self.joined(logits_TV))

    def joined(self, part_TV: Tensor) -> Tensor:
        """Put the ranks' parts of the vocabulary side by side, [T, V]."""
        axis = self.head.axis
        if axis is None:
            return part_TV
        longest = -(-self.vocab_size // axis.size)
        part_TV = functional.pad(part_TV, (0, longest - part_TV.shape[1]))
        every_TV = axis.gather(part_TV.contiguous()).transpose(0, 1).flatten(1)
        return every_TV[:, : self.vocab_size].contiguous()


def resolve_base(name: str | Path) -> str:
    """Return the folder (or hub id) behind a base's name."""
    if str(name) == SEEDLING:
        return str(files("manylora.models") / SEEDLING)
    return str(name)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over every parameter's name, shape, dtype and some of its values.

    It reads a few hundred values of each tensor, so it costs milliseconds at any size.
    """
    values = {}
    for name, value in model.state_dict(keep_vars=True).items():
        flat = value.detach().reshape(-1)
        sample = flat[:: sampling_stride(flat.numel())][: SAMPLED + 1]
        values[name] = (tuple(value.shape), value.dtype, sample)
    return sampled_fingerprint(values)


def checkpoint_activations(base: BaseModel) -> None:
    """Recompute each block in the backward instead of storing its activations. Raises Unsupported:
    the architecture has no checkpointing in transformers."""
    if not getattr(base.model, "supports_gradient_checkpointing", False):
        raise Unsupported(f"base {base.name!r} has no activation checkpointing in transformers")
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in base.backbone.modules():
        # The block itself asks `self.training`; its children must stay in evaluation mode.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def find_head(model: Any, axis: Axis | None, shared: Shared) -> Head:
    """Return the output head of a causal LM; its factor is not known yet. Raises Unsupported: it is
    not one linear layer."""
    layer = model.get_output_embeddings()
    if type(layer) not in (nn.Linear, SplitLinear):
        raise Unsupported(
            f"the output head is a {type(layer).__name__}; only nn.Linear is supported"
        )
    name = next(n for n, module in model.named_modules() if module is layer)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(layer, None if softcap is None else float(softcap), name, axis, shared)


def find_backbone(model: Any) -> Any:
    """Return all of a causal LM but its head. Raises Unsupported: the model does not tell them
    apart."""
    if model.base_model is not model:
        return model.base_model
    # Llama 4's does not say where its text model is: it is all that there is beside the head.
    others = [part for part in model.children() if part is not model.get_output_embeddings()]
    if len(others) != 1:
        raise Unsupported(f"{type(model).__name__} does not tell its backbone from its head")
    return others[0]
