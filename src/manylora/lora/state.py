"""An adapter's training state is complete, and detached from any engine.

S shares of an adapter's work (1 unless the work was spread over several processes), P parameters of
the adapter.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from manylora.lora.layout import Layout
from manylora.types import AdapterSpec

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(slots=True)
class AdapterState:
    """A state has all that training needs to go on as if it had never stopped (numpy arrays).

    Attributes:
        spec: the adapter's settings.
        layout: where each factor lies in the vectors.
        weights: fp32 [P], the master weights.
        exp_avg: fp32 [P], AdamW's first moment; None before the first step.
        exp_avg_sq: fp32 [P], the second.
        grad: fp32 [S, P], gradient accumulated since the last step, which is the sum of its rows
            (see `sharding.Part.pending`); None when there is none.
        step: optimizer steps made.
        draws: pieces of work seen, the position in the adapter's random stream.
        poison: why the gradients of this step must not be used, so that the next optimizer step is
            refused; None when they may. `grad` is None then.
    """

    spec: AdapterSpec
    layout: Layout
    weights: Floats
    exp_avg: Floats | None = None
    exp_avg_sq: Floats | None = None
    grad: Floats | None = None
    step: int = 0
    draws: int = 0
    poison: str | None = None
