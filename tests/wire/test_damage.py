"""A damaged journal, a lost state, a full disk: who is concerned gets an error, others go on."""

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.journal.record_format import Found, read_segment
from manylora.types import AdamParams
from tests.wire.data import FIRST_PLAIN_TOKEN, assert_same_bits, outputs, random_data
from tests.wire.forked import ForkedServer
from tests.wire.raw import RawClient

pytestmark = pytest.mark.usefixtures("nursery")

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 3)
PROMPT = tuple(range(FIRST_PLAIN_TOKEN, FIRST_PLAIN_TOKEN + 6))
PAIRS, MORE = 4, 2
NAMES = "abc"
HARMED = 1  # whose things are damaged
NEVER = ("--set", "saving.every_steps=100000", "--set", "saving.every_seconds=100000")
ALWAYS = ("--set", "saving.every_steps=1", "--set", "saving.every_seconds=0.2")
LAST = 2 * PAIRS  # of the operations before the damage


class Learner:
    """A client whose adapter learns one fixed thing."""

    def __init__(self, server: ForkedServer, number: int) -> None:
        self.raw = RawClient(server)
        self.raw.open_session()
        self.number = number
        self.model = self.raw.new_model(0, rank=2 + number, seed=number)

    def submit(self, seq: int) -> Any:
        """Odd numbers are data, even ones steps."""
        if seq % 2:
            return self.raw.forward_backward(
                self.model, seq, random_data(100 * self.number + seq, 3)
            )
        return self.raw.optim_step(self.model, seq, STEP)

    def learn(self, first: int, last: int) -> None:
        for seq in range(first, last + 1):
            self.raw.ok(self.submit(seq))
        for seq in range(first, last + 1):
            answer = self.raw.result(f"{self.model}:{seq}")
            assert isinstance(answer, bytes) or "error" not in answer, answer

    def probe(self, seq: int) -> list[np.ndarray]:
        answer = self.raw.ok(self.raw.forward_backward(self.model, seq, PROBE, forward_only=True))
        return outputs(self.raw.losses(answer["request_id"]))

    def is_told(self, seq: int, *words: str) -> None:
        """The request failed, with these words."""
        answer = self.raw.result(f"{self.model}:{seq}")
        assert isinstance(answer, dict), answer
        assert answer["category"] == "server", answer
        assert all(word in answer["error"] for word in words), answer


@pytest.fixture(scope="module")
def calm(nursery, tmp_path_factory: pytest.TempPathFactory) -> list[list[np.ndarray]]:
    """What each learner has in the end where nothing breaks."""
    with ForkedServer(tmp_path_factory.mktemp("calm")) as server:
        learners = [Learner(server, number) for number in range(len(NAMES))]
        for learner in learners:
            learner.learn(1, LAST + 2 * MORE)
        return [learner.probe(LAST + 2 * MORE + 1) for learner in learners]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@contextmanager
def learned(folder: Path, options: tuple[str, ...]) -> Iterator[tuple[ForkedServer, list[Learner]]]:
    """Three learners half way; the server has been killed."""
    with ForkedServer(folder, *options) as server:
        learners = [Learner(server, number) for number in range(len(NAMES))]
        for learner in learners:
            learner.learn(1, LAST)
        if options is ALWAYS:
            wait_until(lambda: all(states(folder, learner.model) for learner in learners))
            time.sleep(1.5)  # the last state of each
        server.kill()
        yield server, learners


def go_on(learners: list[Learner], calm: list[list[np.ndarray]]) -> None:
    """Those that nothing happened to learn the rest, and are what they are in the calm."""
    for number, learner in enumerate(learners):
        if number != HARMED:
            learner.learn(LAST + 1, LAST + 2 * MORE)
            assert_same_bits(learner.probe(LAST + 2 * MORE + 1), calm[number])


def is_useless(learner: Learner) -> None:
    """New operations fail at once; and so they do after another start."""
    began = time.monotonic()
    for seq in (LAST + 1, LAST + 2, LAST + 9):
        learner.raw.ok(learner.submit(seq))
        learner.is_told(seq, learner.model, "can no longer be used")
    assert time.monotonic() - began < 20


def records(folder: Path) -> list[tuple[Path, Found]]:
    segments = sorted((folder / "journal").glob("*.log"))
    return [(path, found) for path in segments for found in read_segment(path)]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


def states(folder: Path, model: str) -> list[Path]:
    return list((folder / "adapters" / model.replace(":", "_")).glob("*"))


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("read", [True, False], ids=["results kept", "results gone"])
@pytest.mark.parametrize("where", ["body", "header"])
def test_a_flipped_bit_in_the_journals_middle(
    folder: Path, calm: list[list[np.ndarray]], where: str, read: bool
):
    lost = 5
    with learned(folder, NEVER) as (server, learners):
        harmed = learners[HARMED]
        for path, found in records(folder):
            record = found.record
            if record is not None and (record.stream, record.seq) == (harmed.model, lost):
                flip(path, found.offset + (found.size - 1 if where == "body" else 32))
        if not read:
            shutil.rmtree(folder / "results")
        server.start()
        assert any("journal is damaged" in line for line in server.log)
        go_on(learners, calm)
        if where == "body":  # the header says whose it was, so nobody has to ask for it first
            harmed.is_told(lost + 1, "was lost")
        if not read:
            harmed.is_told(lost, f"operation {lost} was lost")
        harmed.is_told(lost + 1, "was lost")
        is_useless(harmed)
        server.restart()
        is_useless(harmed)


@pytest.mark.parametrize("read", [True, False], ids=["results kept", "results gone"])
def test_a_journal_whose_tail_is_cut(folder: Path, calm: list[list[np.ndarray]], read: bool):
    """Nobody can see of the file that something was acknowledged, but its client knows."""
    with ForkedServer(folder, *NEVER) as server:
        learners = [Learner(server, number) for number in range(len(NAMES))]
        for number, learner in enumerate(learners):
            if number != HARMED:
                learner.learn(1, LAST)
        harmed = learners[HARMED]
        harmed.learn(1, LAST)  # the last ones in the file
        server.kill()
        path, found = records(folder)[-1]
        assert found.record is not None and found.record.seq == LAST
        os.truncate(path, found.offset + found.size // 2)
        if not read:
            shutil.rmtree(folder / "results")
        server.start()
        go_on(learners, calm)
        if not read:
            harmed.is_told(LAST, f"operation {LAST} was lost")
        is_useless(harmed)


def test_what_was_never_acknowledged_is_missed_by_nobody(
    folder: Path, calm: list[list[np.ndarray]]
):
    with learned(folder, NEVER) as (server, learners):
        path, found = records(folder)[-1]
        whole = path.read_bytes()
        path.write_bytes(whole + whole[found.offset : found.offset + found.size // 2])
        server.start()
        for number, learner in enumerate(learners):
            learner.learn(LAST + 1, LAST + 2 * MORE)
            assert_same_bits(learner.probe(LAST + 2 * MORE + 1), calm[number])


def test_a_lost_sample_is_told(folder: Path):
    with ForkedServer(folder, *NEVER) as server:
        raw = RawClient(server)
        raw.open_session()
        sampler = raw.ok(raw.new_sampler(0))["sampling_session_id"]
        ids = [raw.ok(raw.sample(sampler, n, PROMPT))["request_id"] for n in range(3)]
        before = [raw.result(id) for id in ids]
        server.kill()
        shutil.rmtree(folder / "results")
        found_of = {f.record.request_id: (p, f) for p, f in records(folder) if f.record}
        for number, place in ((0, -1), (1, 32)):  # one in the body, one in the header
            path, found = found_of[ids[number]]
            flip(path, found.offset + (found.size + place if place < 0 else place))
        server.start()
        for number in (0, 1):
            answer = raw.result(ids[number])
            assert "lost" in answer["error"] and answer["category"] == "server", answer
        assert raw.result(ids[2]) == before[2]
        assert raw.poll(f"{sampler[:-1]}7:0").status_code == 404


@pytest.mark.parametrize("how", ["deleted", "damaged", "description damaged"])
def test_one_adapters_state_is_lost(folder: Path, calm: list[list[np.ndarray]], how: str):
    with learned(folder, ALWAYS) as (server, learners):
        harmed = learners[HARMED]
        files = states(folder, harmed.model)
        assert files
        if how == "deleted":
            shutil.rmtree(files[0].parent)
            for path in (folder / "journal").glob("*.log"):
                path.unlink()
        elif how == "damaged":
            largest = max(files, key=lambda file: file.stat().st_size)
            flip(largest, largest.stat().st_size - 100)
        else:
            (files[0].parent / "state.json").write_text("{")
        server.start()
        go_on(learners, calm)
        harmed.raw.ok(harmed.submit(LAST + 1))
        harmed.is_told(LAST + 1)
        is_useless(harmed) if how != "damaged" else None
        server.restart()
        go_on_again = learners[0].probe(LAST + 2 * MORE + 2)
        assert_same_bits(go_on_again, calm[0])
        harmed.raw.ok(harmed.submit(LAST + 20))
        harmed.is_told(LAST + 20, "can no longer be used")


def test_a_lost_state_is_made_again_while_the_journal_has_all_of_it(
    folder: Path, calm: list[list[np.ndarray]]
):
    with learned(folder, ALWAYS) as (server, learners):
        shutil.rmtree(states(folder, learners[HARMED].model)[0].parent)
        server.start()
        for number, learner in enumerate(learners):
            learner.learn(LAST + 1, LAST + 2 * MORE)
            assert_same_bits(learner.probe(LAST + 2 * MORE + 1), calm[number])


@contextmanager
def full_disk(server: ForkedServer) -> Iterator[None]:
    """No file of the server's can grow."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


def test_a_full_disk_refuses_and_goes_on(folder: Path, calm: list[list[np.ndarray]]):
    with ForkedServer(folder, *ALWAYS) as server:
        learners = [Learner(server, number) for number in range(len(NAMES))]
        learners[0].learn(1, LAST)
        for learner in learners[1:]:
            for seq in range(1, LAST + 1):
                learner.raw.ok(learner.submit(seq))
        with full_disk(server):
            # What was accepted has results, in memory only.
            for learner in learners[1:]:
                for seq in range(1, LAST + 1):
                    answer = learner.raw.result(f"{learner.model}:{seq}")
                    assert isinstance(answer, bytes) or "error" not in answer, answer
            for learner in learners:
                for _ in range(2):
                    refused = learner.submit(LAST + 1)
                    assert refused.status_code == 503, refused.text
                    assert refused.json()["category"] == "server"
            refused = learners[0].raw.create_model(5)
            assert refused.status_code == 503, refused.text
            assert RawClient(server).post("create_session", tags=[]).status_code == 503
            time.sleep(2.5)  # some rounds of upkeep
        for number, learner in enumerate(learners):
            learner.learn(LAST + 1, LAST + 2 * MORE)
            assert_same_bits(learner.probe(LAST + 2 * MORE + 1), calm[number])
        time.sleep(2.5)
        server.restart()
        for number, learner in enumerate(learners):
            for seq in range(1, LAST + 1):
                answer = learner.raw.result(f"{learner.model}:{seq}")
                assert isinstance(answer, bytes) or "error" not in answer, answer
            assert_same_bits(learner.probe(LAST + 2 * MORE + 2), calm[number])
