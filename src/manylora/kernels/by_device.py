"""Each kind of device has its low-rank operation.

A kernel for one kind stands here beside its twin, the plain loop, which serves all others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.kernels.lowrank import Columns, SegmentWork, shrink_expand, shrink_expand_backward

Columned = Columns | None
Work = Sequence[SegmentWork]
Slopes = Sequence[Tensor | None]
Forward = Callable[[Tensor, Sequence[Tensor], list[int], Work, Columned], list[Tensor]]
Backward = Callable[
    [Tensor, Slopes, Tensor | None, list[int], Work, Sequence[Tensor], Columned], None
]


@dataclass(frozen=True, slots=True)
class LowRank:
    """A `LowRank` has the operation's two halves; `lowrank` describes their arguments."""

    shrink_expand: Forward
    shrink_expand_backward: Backward


PLAIN = LowRank(shrink_expand, shrink_expand_backward)
LOWRANK: Mapping[str, LowRank] = {"cpu": PLAIN, "cuda": PLAIN}


def low_rank_on(device: torch.device) -> LowRank:
    """Look up what layers on `device` call; they do so when they are built.

    The plain loop serves devices that are not in the table, such as the meta device of a plan.
    """
    return LOWRANK.get(device.type, PLAIN)
