"""The oracle trains one adapter by single sequences, plain modules, autograd and torch's AdamW.

Nothing here is shared with the engine but the layout, so that the two can be compared.

N tokens of a datum, K input features (or targets of each position), N_out output features, R rank,
V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from manylora.lora.state import AdapterState
from manylora.models.base import resolve_base
from manylora.types import AdamParams, Datum, Wanted


class ReferenceLinear(nn.Module):
    """The layer gives y = x Wᵀ + scale · (x Aᵀ) Bᵀ, with A and B as ordinary parameters."""

    def __init__(self, base: nn.Linear, a_RK: Tensor, b_NR: Tensor, scale: float):
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(a_RK.clone())
        self.lora_b = nn.Parameter(b_NR.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        delta = (x.to(self.lora_a.dtype) @ self.lora_a.t()) @ self.lora_b.t()
        return self.base(x) + (self.scale * delta).to(x.dtype)


class ReferenceEngine:
    """A reference engine is one adapter on its own copy of the base."""

    def __init__(self, base: str | Path, state: AdapterState):
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            resolve_base(base),
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
        )
        self.model.eval().requires_grad_(False)
        self.state = state
        self.modules: dict[str, ReferenceLinear] = {}
        for factor in state.layout.factors:
            a_RK = torch.tensor(factor.a(state.weights))
            b_NR = torch.tensor(factor.b_transposed(state.weights).T)
            base_linear = self.model.get_submodule(factor.site)
            linear = ReferenceLinear(base_linear, a_RK, b_NR, factor.scale)
            self.model.set_submodule(factor.site, linear)
            self.modules[factor.site] = linear
        parameters = [p for m in self.modules.values() for p in (m.lora_a, m.lora_b)]
        self.optimizer = torch.optim.AdamW(parameters, lr=1.0)

    def distributions(self, datum: Datum, temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities [N, V] of all tokens at the positions of one datum."""
        logits_NV = self.model(
            input_ids=torch.from_numpy(datum.tokens)[None], use_cache=False
        ).logits[0]
        return torch.log_softmax(logits_NV.float() / temperature, dim=-1)

    def logprobs(self, datum: Datum, temperature: float = 1.0) -> Tensor:
        """Return log p(target) of one datum, [N] or [N, K] as its targets are."""
        logprobs_NV = self.distributions(datum, temperature)
        targets = torch.from_numpy(datum.loss_inputs["target_tokens"])
        return logprobs_NV.gather(1, targets.view(len(datum), -1)).view(targets.shape)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        wanted: Wanted = "all",
        temperature: float = 1.0,
    ) -> tuple[list[Tensor], float]:
        """Accumulate gradients; return what is wanted of each datum, and the summed loss."""
        logprobs: list[Tensor] = []
        total = 0.0
        for datum in data:
            logprobs_N = self.logprobs(datum, temperature)
            inputs = {k: torch.from_numpy(v) for k, v in datum.loss_inputs.items()}
            value = reference_loss(loss, logprobs_N, inputs, config or {}).sum()
            value.backward()
            rows = trained_rows(loss, inputs) if wanted == "trained" else slice(None)
            logprobs.append(logprobs_N.detach()[rows])
            total += value.item()
        return logprobs, total

    def optim_step(self, params: AdamParams) -> float:
        """Clip and step; return the gradient's norm before clipping."""
        group = self.optimizer.param_groups[0]
        group.update(
            lr=params.lr,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        limit = params.clip_norm if params.clip_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(group["params"], limit).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self) -> Tensor:
        """Return all factors as one vector in the layout's order."""
        return self._vector(lambda p: p)

    def gradient(self) -> Tensor:
        """Return all gradients as one vector in the layout's order."""
        return self._vector(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)

    def _vector(self, read: Any) -> Tensor:
        vector_P = torch.zeros(self.state.layout.num_params)
        for factor in self.state.layout.factors:
            module = self.modules[factor.site]
            factor.a(vector_P).copy_(read(module.lora_a).detach())
            factor.b_transposed(vector_P).copy_(read(module.lora_b).detach().t())
        return vector_P


def trained_rows(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the positions [n] on which a datum's loss depends."""
    if name == "cross_entropy":
        weights = inputs["weights"]
        return weights.view(len(weights), -1).abs().sum(dim=1).nonzero()[:, 0]
    if name == "dro":
        return torch.arange(len(inputs["advantages"]))
    counts = inputs["advantages"].abs()
    if name == "gspo":
        counts = counts + inputs["sequence_ratio_mask"]
    if "kl_weights" in inputs:
        counts = counts + inputs["kl_weights"].abs()
    return counts.nonzero()[:, 0]


def reference_loss(
    name: str, logprobs_N: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Return each token's loss [N] (or [N, K]), written as the formulas stand, for autograd."""
    if "kl_weights" in inputs:
        without = {key: value for key, value in inputs.items() if key != "kl_weights"}
        log_ratio_N = logprobs_N - inputs["reference_logprobs"]
        kl_N = {
            1.0: log_ratio_N,
            2.0: 0.5 * log_ratio_N**2,
            3.0: torch.exp(-log_ratio_N) + log_ratio_N - 1,
        }[config.get("kl_estimator", 3.0)]
        return reference_loss(name, logprobs_N, without, config) + inputs["kl_weights"] * kl_N
    if name == "cross_entropy":
        return -inputs["weights"] * logprobs_N
    advantages_N, sampler_N = inputs["advantages"], inputs["logprobs"]
    ratio_N = torch.exp(logprobs_N - sampler_N)
    low = config.get("clip_low_threshold", 0.0 if name == "cispo" else 0.8)
    high = config.get("clip_high_threshold", 4.0 if name == "cispo" else 1.2)
    if name == "importance_sampling":
        return -(ratio_N * advantages_N)
    if name == "ppo":
        return -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    if name == "cispo":
        return -(ratio_N.clamp(low, high).detach() * logprobs_N * advantages_N)
    if name == "gspo":
        mask_N = inputs["sequence_ratio_mask"]
        ratio = torch.exp(((logprobs_N.detach() - sampler_N) * mask_N).sum() / mask_N.sum())
        ratio_N = ratio * torch.exp(logprobs_N - logprobs_N.detach())
        return -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    if name == "dro":
        distance_N = logprobs_N - sampler_N
        return -(logprobs_N * advantages_N - 0.5 * config["beta"] * distance_N**2)
    raise ValueError(f"no reference for loss {name!r}")
