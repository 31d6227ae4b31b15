"""What a step was trained on is read again, for people: prompts, answers, rewards.

Everything here is of plain data, as `rollout_record.py` wrote it; nothing of the base is needed.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.runs.rl.rollout_record import read_step
from manylora.runs.rl.token_texts import TokenTexts
from manylora.types import DataError

_FILE = re.compile(r"step-(\d+)\.jsonl\.gz")
# As `SampleGroup.to_json` writes it, at the beginning of a line.
_ROW = re.compile(r'"row": (\d+)')
_HEAD = 200
_DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, ValueError)

Group = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KeptSample:
    """A `KeptSample` is one sample of a group, as a step's file has it.

    Attributes:
        group: what its file says of the group.
        number: of the sample in its group, 0, 1, …
    """

    group: Group
    number: int

    @property
    def rollout(self) -> Mapping[str, Any]:
        """What its file says of the sample."""
        rollout: Mapping[str, Any] = self.group["rollouts"][self.number]
        return rollout

    @property
    def reward(self) -> float:
        """The weighted sum of its parts."""
        return float(self.rollout["reward"])

    @property
    def advantage(self) -> float | None:
        """What the step trained it with; None = it did not train on this group."""
        advantages = self.group["advantages"]
        return None if advantages is None else float(advantages[self.number])

    @property
    def num_sampled(self) -> int:
        """So many tokens were drawn."""
        return sum(len(segment["sampled"]) for segment in self.rollout["segments"])

    @property
    def versions(self) -> tuple[int, int]:
        """The oldest and the newest weights that drew a token of it."""
        drawn = [v for segment in self.rollout["segments"] for v in segment["versions"]]
        version = self.group["version"]
        return (min(drawn), max(drawn)) if drawn else (version, version)

    def prompt(self, texts: TokenTexts) -> str:
        """Return the text before the first token that was drawn."""
        for first in self.rollout["segments"][:1]:
            return texts.whole(first["tokens"][: _begin(first)])
        return ""

    def spans(self) -> Iterator[tuple[Mapping[str, Any], bool, int, int]]:
        """Return segment, whether it was drawn, begin and end of each run of tokens after the
        prompt."""
        for number, segment in enumerate(self.rollout["segments"]):
            for drawn, start, stop in _runs(segment):
                if number or start:
                    yield segment, drawn, start, stop


def kept_steps(folder: Path) -> list[int]:
    """Return the steps of which there are rollouts, in order."""
    found = (_FILE.fullmatch(path.name) for path in folder.glob("step-*.jsonl.gz"))
    return sorted(int(match[1]) for match in found if match)


def groups_of(folder: Path, step: int) -> list[Group]:
    """Return the groups of a step. Raises DataError if its file is damaged."""
    try:
        return list(read_step(folder, step))
    except _DAMAGE as error:
        raise DataError(
            f"{folder}/step-{step}.jsonl.gz is damaged ({error}); look at another step"
        ) from error


def rows_of(folder: Path, step: int) -> list[int]:
    """Return the rows of the prompts of a step without reading what was answered; none of a file
    that is damaged."""
    try:
        with gzip.open(folder / f"step-{step}.jsonl.gz", "rt", encoding="utf-8") as file:
            found = [_ROW.search(line, 0, _HEAD) for line in file]
    except (OSError, *_DAMAGE):
        return []
    return [int(match[1]) for match in found if match]


def samples_of(groups: Sequence[Group]) -> list[KeptSample]:
    """Return all samples of the groups, in their order."""
    return [KeptSample(group, n) for group in groups for n in range(len(group["rollouts"]))]


def ranked(samples: Sequence[KeptSample]) -> list[KeptSample]:
    """Return the samples from the best to the worst reward; among equals, in their order."""
    return sorted(samples, key=lambda sample: -sample.reward)


def is_silent(group: Group) -> bool:
    """Return whether all rewards of a group are the same, so that nothing is learned from it."""
    return len({rollout["reward"] for rollout in group["rollouts"]}) < 2


def _begin(segment: Mapping[str, Any]) -> int:
    return segment["sampled"][0] if segment["sampled"] else len(segment["tokens"])


def _runs(segment: Mapping[str, Any]) -> Iterator[tuple[bool, int, int]]:
    """Return the runs of tokens that were drawn, and those between them."""
    drawn = set(segment["sampled"])
    start, size = 0, len(segment["tokens"])
    while start < size:
        stop = start + 1
        while stop < size and (stop in drawn) == (start in drawn):
            stop += 1
        yield start in drawn, start, stop
        start = stop
