"""What an adapter is measured by is never trained on, and what it is trained on is all there.

The two files have not a row in common, so that one datum in the wrong place is seen for certain.
"""

from pathlib import Path
from typing import Any

import pytest

from manylora.config import RunFile
from manylora.types import Datum
from tests.unit.runs.driving.conftest import train, write_lines
from tests.unit.runs.driving.fake_client import FakeAdapter, FakeClient

NAMES = ("alpha", "beta")
TRAINED, HELD_OUT = 7, 3


class WatchedClient(FakeClient):
    """Notes each datum that an adapter is given, by what is done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def create(self, name: str, *arguments: Any, **settings: Any) -> FakeAdapter:
        adapter = super().create(name, *arguments, **settings)

        def watch(verb: str) -> None:
            act = getattr(adapter, verb)

            def watched(data: list[Datum], **options: Any) -> Any:
                noted = self.seen.setdefault((name, verb), [])
                noted += [_whole(datum) for datum in data]
                return act(data, **options)

            setattr(adapter, verb, watched)

        watch("forward")
        watch("forward_backward")
        return adapter


def _whole(datum: Datum) -> tuple[int, ...]:
    return (*datum.tokens.tolist(), int(datum.loss_inputs["target_tokens"][-1]))


def rows(name: str, which: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {which} {i}=", "completion": f"{i}"} for i in range(count)]


def encoded(name: str, which: str, count: int) -> set[tuple[int, ...]]:
    """By hand: a token for each character, then the end."""
    return {(*map(ord, row["prompt"] + row["completion"]), 0) for row in rows(name, which, count)}


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_row_of_one_file_is_used_as_one_of_the_other(tmp_path: Path, shuffle: bool) -> None:
    adapters = []
    for name in NAMES:
        files = {
            which: str(write_lines(tmp_path / f"{name}_{which}.jsonl", rows(name, which, count)))
            for which, count in (("train", TRAINED), ("eval", HELD_OUT))
        }
        sft = {**files, "batch_size": 2, "epochs": 3, "shuffle": shuffle}
        adapters.append({"name": name, "sft": sft})
    content = {"base": "fake", "out": tmp_path / "out", "tensorboard": False, "adapters": adapters}
    client = WatchedClient()
    assert train(RunFile.model_validate(content), client) == 0
    for name in NAMES:
        trained = client.seen[name, "forward_backward"]
        assert set(trained) == encoded(name, "train", TRAINED)
        assert len(trained) == 3 * TRAINED
        # Before and after training.
        measured = client.seen[name, "forward"]
        assert set(measured) == encoded(name, "eval", HELD_OUT)
        assert len(measured) == 2 * HELD_OUT
