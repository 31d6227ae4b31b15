"""Operations that were running when an engine was lost.

Most were there by chance. From then on each of them runs in a batch of its own, so that one that
breaks the engine again is found out, and only its owner hears of it.
"""

from collections import Counter
from collections.abc import Iterable

from manylora.scheduler import Operation
from manylora.types import Sample

# An operation that was running so often when an engine was lost is not run again.
MOST_LOSSES = 3


class Breakages:
    """How often each operation was there. `is_suspect` may be called from any thread."""

    def __init__(self) -> None:
        self._losses: Counter[str] = Counter()

    def note(self, operations: Iterable[Operation]) -> None:
        """These were running when the engine was lost."""
        self._losses.update(_key(operation) for operation in operations)

    def is_suspect(self, operation: Operation) -> bool:
        """Whether it should run alone."""
        return bool(self._losses) and _key(operation) in self._losses

    def is_given_up(self, operation: Operation) -> bool:
        """Whether it should not run again."""
        return self._losses[_key(operation)] >= MOST_LOSSES

    def is_numbered_given_up(self, adapter: str, seq: int) -> bool:
        """The same of an adapter's operation of that number."""
        return self._losses[_numbered(adapter, seq)] >= MOST_LOSSES


def _key(operation: Operation) -> str:
    if not isinstance(operation, Sample):
        return _numbered(operation.adapter or "", operation.seq)
    # A request without a seed has one of its own; equal keys only run apart more often.
    return f"{operation.tenant}/{operation.snapshot}/{operation.params.seed}/{operation.num_tokens}"


def _numbered(adapter: str, seq: int) -> str:
    return f"{adapter}:{seq}"
