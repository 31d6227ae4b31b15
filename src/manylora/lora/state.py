"""An adapter's complete training state, detached from any engine.

P parameters of the adapter.
"""

from dataclasses import dataclass

import torch

from manylora.lora.layout import Layout
from manylora.types import AdapterSpec


@dataclass(slots=True)
class AdapterState:
    """Everything that training needs to go on as if it had never stopped (CPU tensors).

    Attributes:
        spec: the adapter's settings.
        layout: where each factor lies in the vectors.
        weights: fp32 [P], the master weights.
        exp_avg, exp_avg_sq: fp32 [P], AdamW's moments; None before the first step.
        grad: fp32 [P], gradient accumulated since the last step; None when there is none.
        step: optimizer steps made.
        draws: pieces of work seen, the position in the adapter's random stream.
        poison: why the gradients of this step must not be used, so that the next optimizer step is
            refused; None when they may. `grad` is None then.
    """

    spec: AdapterSpec
    layout: Layout
    weights: torch.Tensor
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    step: int = 0
    draws: int = 0
    poison: str | None = None
