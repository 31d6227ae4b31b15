"""Pending groups are forgotten once a training state covers them, and no others."""

from pathlib import Path

import numpy as np

from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.runs.rl.rollout_record import PENDING, RolloutRecord


def group(step: int, number: int, text: str = "a\u2028b\x85c\n") -> SampleGroup:
    ids_N, sampled_N = np.array([5, 6, 7], np.int32), np.array([False, True, True])
    segment = RolloutSegment(
        ids_N, sampled_N, np.array([0, -0.5, -1.25], np.float32), np.array([-1, 3, 3], np.int32)
    )
    rollout = Rollout(segments=(segment,), reward=0.5, parts={"digits": 0.5}, text=text)
    return SampleGroup(step=step, number=number, row=2, version=3, rollouts=(rollout,))


def test_covering_keeps_the_lines_of_later_steps_and_their_bytes(tmp_path: Path):
    record = RolloutRecord(tmp_path, None, 0)
    # As they come: those of later steps may be there before those of earlier ones.
    for step, number in ((1, 0), (12, 0), (2, 1), (10, 0), (2, 0)):
        record.add(group(step, number))
    before = (tmp_path / PENDING).read_bytes().splitlines(keepends=True)
    record.cover(2)
    assert (tmp_path / PENDING).read_bytes().splitlines(keepends=True) == [before[1], before[3]]
    record.add(group(11, 0))
    record.close()
    found = RolloutRecord(tmp_path, None, 2)
    found.close()
    assert list(found.found) == [(12, 0), (10, 0), (11, 0)]
    assert found.found[10, 0].to_json() == group(10, 0).to_json()


def test_a_torn_line_is_of_no_step(tmp_path: Path):
    record = RolloutRecord(tmp_path, None, 0)
    record.add(group(3, 0))
    with (tmp_path / PENDING).open("a") as file:
        file.write('{"st')
    record.cover(1)
    record.close()
    assert (tmp_path / PENDING).read_bytes().count(b"\n") == 1
    assert not (tmp_path / PENDING).read_bytes().endswith(b'{"st')
