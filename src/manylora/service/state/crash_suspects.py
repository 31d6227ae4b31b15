"""Operations that were running when an engine was lost are suspects.

Most were there by chance. From then on each of them runs in a batch of its own, so that one that
breaks the engine again is found out, and only its owner hears of it. One that runs to its end is
acquitted.
"""

from collections import Counter
from collections.abc import Iterable

from manylora.scheduler import Operation
from manylora.types import EngineLost, Sample

# An operation is not run again once it was running this often when an engine was lost that said
# why, or this often when one was that did not: the first is its doing, the second more likely
# that of a person who kills processes.
MOST_LOSSES, MOST_SILENT_LOSSES = 3, 6
_SPOKEN = MOST_SILENT_LOSSES // MOST_LOSSES


class CrashSuspects:
    """`CrashSuspects` counts how often each was there. Any thread may call `is_suspect`.
    `completed` counts operations that ran to their end since an engine was lost last."""

    def __init__(self) -> None:
        self.completed = 0
        self._blame: Counter[str] = Counter()

    def note(self, losses: Iterable[tuple[Operation, EngineLost]]) -> None:
        """Note what was running when an engine was lost, and how each was lost."""
        self.completed = 0
        for operation, loss in losses:
            self._blame[_key(operation)] += 1 if loss.silent else _SPOKEN

    def acquit(self, operation: Operation) -> None:
        """Note that an operation ran to its end. What was given up stays so."""
        self._acquit(_key(operation))

    def acquit_numbered(self, adapter: str, seq: int) -> None:
        """Note that an adapter's operation of that number ran to its end."""
        self._acquit(_numbered(adapter, seq))

    def is_suspect(self, operation: Operation) -> bool:
        """Return whether it should run alone."""
        return bool(self._blame) and _key(operation) in self._blame

    def is_given_up(self, operation: Operation) -> bool:
        """Return whether it should not run again."""
        return self._blame[_key(operation)] >= MOST_SILENT_LOSSES

    def is_numbered_given_up(self, adapter: str, seq: int) -> bool:
        """Return whether an adapter's operation of that number should not run again."""
        return self._blame[_numbered(adapter, seq)] >= MOST_SILENT_LOSSES

    def _acquit(self, key: str) -> None:
        if self._blame[key] < MOST_SILENT_LOSSES:
            self.completed += 1
            del self._blame[key]


def _key(operation: Operation) -> str:
    if not isinstance(operation, Sample):
        return _numbered(operation.adapter or "", operation.seq)
    # A request without a seed has one of its own; equal keys only run apart more often.
    return f"{operation.tenant}/{operation.snapshot}/{operation.params.seed}/{operation.num_tokens}"


def _numbered(adapter: str, seq: int) -> str:
    return f"{adapter}:{seq}"
