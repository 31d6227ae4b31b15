"""What the server should answer: the reference engine on the same base, and the loss formulas.

N tokens of a datum, K candidates of a place.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.engine import Engine
from manylora.engine.reference import ReferenceEngine, reference_loss
from manylora.lora.init import fresh_state
from manylora.lora.layout import plan_layout
from manylora.lora.sites import Site, resolve_targets
from manylora.types import AdamParams, AdapterSpec, Datum, Opening

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBED = ("lm_head",)
ALPHA = 32.0

Array = np.ndarray[Any, Any]


@cache
def _sites() -> tuple[Site, ...]:
    return Engine(Opening("seedling", dtype="fp32", device="cpu")).sites


class Oracle:
    """One adapter, made as the wire makes it, and trained one sequence at a time."""

    def __init__(
        self,
        rank: int,
        seed: int,
        *,
        attention: bool = True,
        mlp: bool = True,
        unembed: bool = True,
        base: str | Path = "seedling",
    ) -> None:
        flags = ((attention, ATTENTION), (mlp, MLP), (unembed, UNEMBED))
        spec = AdapterSpec(
            rank=rank,
            alpha=ALPHA,
            targets=tuple(name for on, names in flags if on for name in names),
            seed=seed,
            init="kaiming",
            dtype="fp32",
        )
        layout = plan_layout(spec, resolve_targets(spec, _sites()))
        self.reference = ReferenceEngine(base, fresh_state(spec, layout))

    def logprobs(self, data: Sequence[Datum]) -> list[Array]:
        """log p(target) [N] of each datum under the present weights."""
        with torch.no_grad():
            return [self.reference.logprobs(datum).numpy() for datum in data]

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        repeat: int = 1,
    ) -> tuple[list[Array], float]:
        """Accumulate the gradient of `repeat` times `data`; log-probabilities and summed loss."""
        outputs: list[Array] = []
        total = 0.0
        for datum in data:
            logprobs_N = self.reference.logprobs(datum)
            inputs = {name: torch.from_numpy(value) for name, value in datum.loss_inputs.items()}
            value = repeat * _loss(loss, logprobs_N, inputs, config or {}).sum()
            value.backward()
            outputs.append(logprobs_N.detach().numpy())
            total += value.item()
        return outputs, total

    def step(self, params: AdamParams) -> float:
        """One AdamW step; the gradient's norm before clipping."""
        return self.reference.optim_step(params)

    def factors(self) -> dict[str, tuple[Array, Array]]:
        """A [R, K] and B [N, R] of each adapted layer, by the layer's name."""
        return {
            name: (linear.lora_a.detach().numpy(), linear.lora_b.detach().numpy())
            for name, linear in self.reference.modules.items()
        }


def candidates_as_data(tokens: Array, targets_NK: Array, weights_NK: Array) -> list[Datum]:
    """A top-K distillation datum as K plain ones, whose losses and gradients add up to its own."""
    return [
        Datum(tokens, {"target_tokens": targets_NK[:, k], "weights": weights_NK[:, k]})
        for k in range(targets_NK.shape[1])
    ]


def _loss(
    name: str, logprobs_N: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    if name == "gspo":
        return _gspo(logprobs_N, inputs, config)
    return reference_loss(name, logprobs_N, inputs, config)


def _gspo(logprobs_N: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-Σ min(s A, clip(s) A): one ratio for the sequence, its gradient through each token."""
    mask_N, advantages_N = inputs["sequence_ratio_mask"], inputs["advantages"]
    distance_N = logprobs_N.detach() - inputs["logprobs"]
    ratio = torch.exp((mask_N * distance_N).sum() / mask_N.sum())
    ratio_N = ratio * torch.exp(logprobs_N - logprobs_N.detach())
    clipped_N = ratio_N.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
