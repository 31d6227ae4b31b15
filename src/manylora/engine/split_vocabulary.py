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


@dataclass(slots=True)
class Whole:
    """A `Whole` is the softmax over the whole vocabulary.

    Attributes:
        sum_c1: of the exponentials, relative to this rank's own maximum, as its exponentials are.
        logprobs: of the targets of each `Picked`.
        entropy_c: in nats; None if it was not asked.
    """

    sum_c1: Tensor
    logprobs: list[Tensor]
    entropy_c: Tensor | None = None


class WholeVocabulary:
    """A `WholeVocabulary` is all of the vocabulary, in one process."""

    def __init__(self, vocab: int):
        self.longest = vocab

    def mine(self, targets: Tensor) -> Mine:
        """Find out which of the targets lie here, and where: all."""
        return Mine(targets)

    def whole(
        self,
        max_c1: Tensor,
        sum_c1: Tensor,
        picked: Sequence[Picked],
        weighted_c1: Tensor | None = None,
    ) -> Whole:
        """Complete what was found; see `VocabularyPart.whole`."""
        log_c = sum_c1.log().view(-1)
        whole = Whole(sum_c1, [one.logits_n - one.of_rows(log_c) for one in picked])
        if weighted_c1 is not None:
            whole.entropy_c = log_c - (weighted_c1 / sum_c1).view(-1)
        return whole

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

    def whole(
        self,
        max_c1: Tensor,
        sum_c1: Tensor,
        picked: Sequence[Picked],
        weighted_c1: Tensor | None = None,
    ) -> Whole:
        """Complete what this rank has found.

        Args:
            max_c1: the largest of the part's logits.
            sum_c1: of the logits' exponentials relative to it.
            picked: the targets.
            weighted_c1: the sum of the logits relative to it, each times its exponential, where the
                entropy is asked: H = log Z - sum(exp(z - max)·(z - max)) / Z, with Z the sum of the
                exponentials.
        """
        parts = [max_c1.view(-1), sum_c1.view(-1), *(one.logits_n for one in picked)]
        if weighted_c1 is not None:
            parts.append(weighted_c1.view(-1))
        lengths = [len(part) for part in parts]
        max_rc, sum_rc, *found = self.axis.gather(torch.cat(parts)).split(lengths, dim=1)
        weighted_rc = None if weighted_c1 is None else found.pop()
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
        whole = Whole((total_c / factor_rc[self.axis.index]).unsqueeze(1), logprobs)
        if weighted_rc is not None:
            # Relative to the whole's maximum, as `total_c` is.
            weighted_rc = (weighted_rc + (max_rc - top_c) * sum_rc) * factor_rc
            whole.entropy_c = log_c - weighted_rc.sum(dim=0) / total_c
        return whole

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the parts, in place."""
        return self.axis.sum_(tensor)
