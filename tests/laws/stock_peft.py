"""One adapter trained by stock PEFT: its layers, plain autograd, torch's AdamW, nothing of ours.

P parameters of an adapter, N tokens of a datum.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from manylora.engine.reference import reference_loss
from manylora.lora.layout import Layout
from manylora.lora.state import AdapterState
from manylora.types import AdamParams, AdapterSpec, ForwardBackward


def peft_config(spec: AdapterSpec) -> LoraConfig:
    """The same settings in PEFT's words."""
    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyrefly: ignore[bad-argument-type] - PEFT takes floats too
        target_modules=targets,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        use_rslora=spec.use_rslora,
        lora_dropout=spec.dropout,
        task_type="CAUSAL_LM",
    )


def wrapped(model: Any, config: LoraConfig) -> Any:
    """PEFT's model; whatever else it warns of is an error."""
    with warnings.catch_warnings():
        # Said of every adapter on a tied head; the embedding is meant to stay as it is.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return get_peft_model(model, config)


class StockPeft:
    """An adapter in PEFT, begun from `state`."""

    def __init__(self, base: Path, state: AdapterState, **loading: Any):
        # Eager: transformers' sdpa leaves out Gemma 2's softcap.
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", **loading)
        self.model = wrapped(model, peft_config(state.spec)).eval()
        self.layout: Layout = state.layout
        adapted = {n for n, m in self._modules().items() if hasattr(m, "lora_A")}
        assert adapted == {factor.site for factor in self.layout.factors}
        with torch.no_grad():
            for factor, a, b in self._factors():
                a.copy_(torch.tensor(factor.a(state.weights)))
                b.copy_(torch.tensor(factor.b_transposed(state.weights)).t())
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1.0)

    def forward_backward(self, work: ForwardBackward) -> list[Tensor]:
        """Add the gradients of one operation; log p(target) of each datum, as its targets are."""
        found = []
        for datum in work.data:
            logits_NV = self.model(input_ids=torch.from_numpy(datum.tokens)[None]).logits[0]
            targets = torch.from_numpy(datum.loss_inputs["target_tokens"])
            logprobs_NV = torch.log_softmax(logits_NV, dim=1)
            logprobs_N = logprobs_NV.gather(1, targets.view(len(datum), -1)).view(targets.shape)
            inputs = {name: torch.from_numpy(value) for name, value in datum.loss_inputs.items()}
            reference_loss(work.loss, logprobs_N, inputs, work.config).sum().backward()
            found.append(logprobs_N.detach())
        return found

    def optim_step(self, params: AdamParams) -> float:
        """Clip and step; the gradient's norm before clipping."""
        self.optimizer.param_groups[0].update(
            lr=params.lr,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        limit = params.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def weights(self) -> Tensor:
        """All factors [P] in the layout's order."""
        return self._vector([(f, a, b) for f, a, b in self._factors()])

    def gradient(self) -> Tensor:
        """All gradients [P] in the layout's order."""
        return self._vector([(f, a.grad, b.grad) for f, a, b in self._factors()])

    def _modules(self) -> dict[str, Any]:
        return dict(self.model.get_base_model().named_modules())

    def _factors(self) -> list[tuple[Any, Any, Any]]:
        modules = self._modules()
        return [
            (
                factor,
                modules[factor.site].lora_A["default"].weight,
                modules[factor.site].lora_B["default"].weight,
            )
            for factor in self.layout.factors
        ]

    def _vector(self, parts: Sequence[tuple[Any, Any, Any]]) -> Tensor:
        vector_P = torch.zeros(self.layout.num_params)
        for factor, a_RK, b_NR in parts:
            factor.a(vector_P).copy_(a_RK.detach())
            factor.b_transposed(vector_P).copy_(b_NR.detach().t())
        return vector_P
