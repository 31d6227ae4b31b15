"""When each version of the weights was published, and how old those were that a step learned from.

A step says how long it waited, trained and published, so the time of an adapter is their sum; the
version that it begins with, and how far behind that the oldest of its tokens is.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

_PARTS = ("waiting_seconds", "forward_seconds", "backward_seconds", "publish_seconds")


def publishes(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return, by step, when its version was published and which the oldest was that it trained on.

    Args:
        rows: the lines of metrics.jsonl, all of them, in order.

    Returns:
        By step: `seconds` of the adapter until then, `version`, and `oldest`, which is None where
        nothing was sampled. Empty for a run that publishes nothing.
    """
    took = (sum(row.get(part) or 0.0 for part in _PARTS) for row in rows)
    began = accumulate(took, initial=0.0)
    return {
        row["step"]: {
            "seconds": round(seconds, 2),
            "version": row["version"],
            "oldest": _oldest(row),
        }
        for row, seconds in zip(rows, began, strict=False)
        if row.get("version") is not None
    }


def _oldest(row: Mapping[str, Any]) -> int | None:
    behind = row.get("staleness_max")
    return None if behind is None else row["version"] - behind
