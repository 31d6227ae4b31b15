"""Where TRL has the same options, its formulas give the same loss; see make_trl_losses.py."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from manylora.runs.rl import advantages
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rollout import Rollout, RolloutSegment, SampleGroup
from manylora.types.data import Array
from tests.unit.runs.rl.make_trl_losses import FILE, arrays, cases, loss
from tests.unit.runs.rl.toy_policy import engine_loss, settings

STORED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PROMPT = 2


def stored(name: str) -> list[Array]:
    """The numbers of each sample's own tokens."""
    mask = np.array(STORED["mask"], dtype=bool)
    return [values[own] for values, own in zip(np.array(STORED[name]), mask, strict=True)]


def groups() -> list[SampleGroup]:
    rollouts: list[Rollout] = []
    for q_n, reward in zip(stored("q"), STORED["rewards"], strict=True):
        size = PROMPT + len(q_n)
        sampled, logprobs = np.arange(size) >= PROMPT, np.zeros(size, np.float32)
        logprobs[PROMPT:] = q_n
        versions = np.where(sampled, 0, -1).astype(np.int32)
        segment = RolloutSegment(np.arange(size, dtype=np.int32), sampled, logprobs, versions)
        rollouts.append(Rollout(segments=(segment,), reward=reward))
    size = STORED["group_size"]
    return [
        SampleGroup(
            step=1, number=number, row=0, version=0, rollouts=tuple(rollouts[start : start + size])
        )
        for number, start in enumerate(range(0, len(rollouts), size))
    ]


@pytest.mark.parametrize("number", range(len(STORED["cases"])))
def test_trl_gives_the_same_loss(number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advantages, "EPSILON", 1e-4)  # TRL's
    case, high = STORED["cases"][number], STORED["high"]
    low = 1.0 if case["loss"] == "cispo" else STORED["low"]
    rl = settings(
        groups=2,
        sampling={"max_tokens": STORED["max_tokens"]},
        advantage={"kind": case["advantage"], "scale": case["scale"]},
        loss={
            "kind": case["loss"],
            "clip_low": low,
            "clip_high": high,
            "aggregate": case["aggregate"],
            "updates": 2,
        },
        kl={"coef": case["beta"]},
        off_policy={"correct": case["correct"], "max": STORED["max"]},
    )
    objective = Objective(rl)
    batch = objective.batch(groups())
    # Both groups have rewards that differ, so every sample is a datum.
    (minibatch,) = batch.minibatches(
        stored("p"), stored("ref") if objective.needs_reference else None
    )
    total = 0.0
    for datum, index in zip(minibatch.data, minibatch.sequences, strict=True):
        logprobs_T = torch.zeros(len(datum), dtype=torch.float64)
        logprobs_T[batch.sequences[index].positions] = torch.from_numpy(stored("l")[index])
        total += float(engine_loss(objective, logprobs_T, datum)[0].sum())
    assert total == pytest.approx(case["value"], rel=1e-5, abs=1e-6)


def test_the_file_is_what_its_script_makes():
    given = arrays()
    assert [{k: v for k, v in case.items() if k != "value"} for case in STORED["cases"]] == cases()
    assert [case["value"] for case in STORED["cases"]] == pytest.approx(
        [loss(case, given) for case in cases()]
    )
    assert {name: STORED[name] for name in given} == {k: v.tolist() for k, v in given.items()}
