"""The softmax over a vocabulary of which each rank has a part of the logits.

c rows of a chunk, m targets beyond the first of each row, r ranks, V tokens of this rank's part.

One small collective serves a chunk. Each rank forms the maximum, the sum of exponentials and the
targets' logits of its own part; those of the whole follow from all ranks' three.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.parallel import Axis


@dataclass(frozen=True, slots=True)
class Mine:
    """Targets as this rank sees them: places in its part, any place where they are another's."""

    place: Tensor
    inside: Tensor

    def only(self, values: Tensor) -> Tensor:
        """The values of this rank's targets, zero for the others."""
        return values * self.inside


@dataclass(frozen=True, slots=True)
class Whole:
    """The softmax over the whole vocabulary.

    Attributes:
        sum_c1: of the exponentials, relative to this rank's own maximum, as its exponentials are.
        log_c1: logarithm of the sum, relative to the whole maximum.
        target_c1: the targets' logits, relative to the whole maximum.
        more_m: those of the targets beyond the first.
    """

    sum_c1: Tensor
    log_c1: Tensor
    target_c1: Tensor
    more_m: Tensor


class VocabularyPart:
    """This rank's part of the vocabulary."""

    def __init__(self, axis: Axis, vocab: int):
        self.axis = axis
        self.first, self.last = axis.share(vocab)
        self.longest = -(-vocab // axis.size)

    def mine(self, targets: Tensor) -> Mine:
        """Which of the targets lie in this part, and where."""
        inside = (targets >= self.first) & (targets < self.last)
        return Mine((targets - self.first).clamp(0, self.last - self.first - 1), inside)

    def whole(
        self,
        max_c1: Tensor,
        sum_c1: Tensor,
        target_c1: Tensor,
        targets_c1: Tensor,
        more_m: Tensor,
        rows_m: Tensor,
        targets_m: Tensor,
    ) -> Whole:
        """Complete what this rank has found.

        Args:
            max_c1, sum_c1: of the part's logits, and of their exponentials relative to it.
            target_c1, more_m: logits of the targets relative to the part's maximum, where the
                target is this part's.
            targets_c1, targets_m: the targets. rows_m: the rows of those beyond the first.
        """
        rows = len(max_c1)
        own = torch.cat([max_c1.view(-1), sum_c1.view(-1), target_c1.view(-1), more_m])
        all_r = self.axis.gather(own)
        max_rc, sum_rc, target_rc, more_rm = all_r.split([rows, rows, rows, len(more_m)], dim=1)
        top_c = max_rc.amax(dim=0)
        factor_rc = (max_rc - top_c).exp()
        total_c = torch.zeros_like(top_c)
        for part_sum_c, factor_c in zip(sum_rc, factor_rc, strict=True):
            total_c += part_sum_c * factor_c
        owner_1c = targets_c1.view(1, -1) // self.longest
        target_1c = target_rc.gather(0, owner_1c) + max_rc.gather(0, owner_1c) - top_c
        owner_1m = targets_m.view(1, -1) // self.longest
        max_rm = max_rc[:, rows_m]
        more_1m = more_rm.gather(0, owner_1m) + max_rm.gather(0, owner_1m) - top_c[rows_m]
        own_factor_c = factor_rc[self.axis.index]
        return Whole(
            sum_c1=(total_c / own_factor_c).unsqueeze(1),
            log_c1=total_c.log().unsqueeze(1),
            target_c1=target_1c.view(-1, 1),
            more_m=more_1m.view(-1),
        )
