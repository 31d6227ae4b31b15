"""A mesh has a shape: how many ranks lie along which axes, and how many such meshes exist."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from manylora.types.errors import ConfigError, Unsupported

AXES = ("replicas", "dp", "tp")

# Sizes of a base that `tp` has to divide, and what they are called.
SPLIT_SIZES = {
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key-value heads",
    "intermediate_size": "intermediate_size",
}

# How a linear layer is split over `tp`: by its outputs, by its inputs, or not at all.
Split = Literal["whole", "column", "row"]


@dataclass(frozen=True, slots=True)
class MeshShape:
    """A `MeshShape` counts the ranks of each axis.

    The world rank is (replica · dp + dp index) · tp + tp index.

    Attributes:
        replicas: engines that share nothing, each with its own adapters on a mesh of dp · tp.
        dp: data parallel: tokens are dealt out, and the base's parameters are held in shares.
        tp: tensor parallel: the base's matrices are split.

    Raises:
        ConfigError: an axis has less than one rank.
    """

    dp: int = 1
    tp: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1:
                raise ConfigError(f"mesh: {axis} is {size}; an axis has at least one rank")

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Read a text such as `dp=2,tp=2`, in any order; an axis that is not named has one rank.
        Raises ConfigError: the text is anything else."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if found is None or found[1] not in AXES or found[1] in sizes:
                raise ConfigError(
                    f"mesh {text!r}: {part.strip()!r} is not a new axis and its size; write "
                    f"`dp=2,tp=2`, each of {', '.join(AXES)} at most once"
                )
            sizes[found[1]] = int(found[2])
        return cls(**sizes)

    @property
    def axes(self) -> dict[str, int]:
        """Each axis of one replica's mesh has its size; neighbouring ranks differ in the last."""
        return {"dp": self.dp, "tp": self.tp}

    @property
    def size(self) -> int:
        """All replicas together have this many ranks."""
        return self.replicas * math.prod(self.axes.values())

    @property
    def one(self) -> "MeshShape":
        """The mesh of one replica has this shape."""
        return replace(self, replicas=1)

    def check_split(self, sizes: Mapping[str, Any], base: str) -> None:
        """Refuse a base that `tp` cannot split, judged by the sizes in its config alone.

        Args:
            sizes: the fields of its text config; those that are missing are not checked.
            base: what a message calls it.

        Raises:
            Unsupported: `tp` does not divide one of them; the message names the values that do.
        """
        found = {
            words: sizes[field]
            for field, words in SPLIT_SIZES.items()
            if isinstance(sizes.get(field), int) and sizes[field] > 0
        }
        if all(count % self.tp == 0 for count in found.values()):
            return
        common = math.gcd(*found.values())
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        told = ", ".join(f"{count:,} {words}" for words, count in found.items())
        wrong = next(words for words, count in found.items() if count % self.tp)
        raise Unsupported(
            f"base {base}: tp={self.tp} does not divide its {wrong} (it has {told}); a tp that "
            f"fits is one of {fitting}; take dp for the other ranks"
        )

    def __str__(self) -> str:
        replicas = {"replicas": self.replicas} if self.replicas > 1 else {}
        return ",".join(f"{axis}={size}" for axis, size in (replicas | self.axes).items())
