"""The softmax is over a vocabulary of which each rank has a part of the logits, or one process all.

c rows of a chunk, n targets of them, r ranks, V tokens of this rank's part.

One small collective serves a chunk. Each rank forms the maximum, the sum of exponentials and the
targets' logits of its own part; those of the whole follow from all ranks' three.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.parallel import Axis


@dataclass(frozen=True, slots=True)
class Mine:
    """A `Mine` has targets as this rank sees them.

    Attributes:
        place: where in the rank's logits; any place where a target is another rank's.
        inside: which of the targets are this rank's; None if all are.
    """

    place: Tensor
    inside: Tensor | None = None

    def only(self, values: Tensor) -> Tensor:
        """Return the values of this rank's targets, zero for the others."""
        return values if self.inside is None else values * self.inside


@dataclass(frozen=True, slots=True)
class Picked:
    """A `Picked` has the logits of some targets of a chunk.

    Attributes:
        targets_n: the targets.
        logits_n: relative to the maximum of this rank's logits, where the target is this rank's.
        rows_n: the row of each; None = one target for every row.
    """

    targets_n: Tensor
    logits_n: Tensor
    rows_n: Tensor | None = None

    def of_rows(self, values_c: Tensor) -> Tensor:
        """Return the value [..., n] of each target's row, of values [..., c]."""
        return values_c if self.rows_n is None else values_c[..., self.rows_n]


@dataclass(frozen=True, slots=True)
class Whole:
    """A `Whole` is the softmax over the whole vocabulary.

    Attributes:
        sum_c1: of the exponentials, relative to this rank's own maximum, as its exponentials are.
        logprobs: of the targets of each `Picked`.
    """

    sum_c1: Tensor
    logprobs: list[Tensor]


class WholeVocabulary:
    """A `WholeVocabulary` is all of the vocabulary, in one process."""

    def __init__(self, vocab: int):
        self.longest = vocab

    def mine(self, targets: Tensor) -> Mine:
        """Find out which of the targets lie here, and where: all."""
        return Mine(targets)

    def whole(self, max_c1: Tensor, sum_c1: Tensor, picked: Sequence[Picked]) -> Whole:
        """Complete what was found; see `VocabularyPart.whole`."""
        log_c = sum_c1.log().view(-1)
        return Whole(sum_c1, [one.logits_n - one.of_rows(log_c) for one in picked])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the parts: it is the only one."""
        return tensor


class VocabularyPart:
    """A `VocabularyPart` is this rank's part of the vocabulary."""

    def __init__(self, axis: Axis, vocab: int):
        self.axis = axis
        self.first, self.last = axis.share(vocab)
        self.longest = -(-vocab // axis.size)

    def mine(self, targets: Tensor) -> Mine:
        """Find out which of the targets lie in this part, and where."""
        inside = (targets >= self.first) & (targets < self.last)
        return Mine((targets - self.first).clamp(0, self.last - self.first - 1), inside)

    def whole(self, max_c1: Tensor, sum_c1: Tensor, picked: Sequence[Picked]) -> Whole:
        """Complete what this rank has found: the largest of the part's logits, the sum of their
        exponentials relative to it, and the targets' logits."""
        lengths = [len(max_c1), len(sum_c1), *(len(one.logits_n) for one in picked)]
        own = torch.cat([max_c1.view(-1), sum_c1.view(-1), *(one.logits_n for one in picked)])
        max_rc, sum_rc, *found = self.axis.gather(own).split(lengths, dim=1)
        top_c = max_rc.amax(dim=0)
        factor_rc = (max_rc - top_c).exp()
        total_c = torch.zeros_like(top_c)
        for part_sum_c, factor_c in zip(sum_rc, factor_rc, strict=True):
            total_c += part_sum_c * factor_c
        log_c = total_c.log()
        logprobs = []
        for one, logits_rn in zip(picked, found, strict=True):
            owner_1n = one.targets_n.view(1, -1) // self.longest
            max_1n = one.of_rows(max_rc).gather(0, owner_1n)
            logits_1n = logits_rn.gather(0, owner_1n) + max_1n - one.of_rows(top_c)
            logprobs.append(logits_1n.view(-1) - one.of_rows(log_c))
        return Whole((total_c / factor_rc[self.axis.index]).unsqueeze(1), logprobs)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the parts, in place."""
        return self.axis.sum_(tensor)
