"""An engine in a process of its own: the same numbers, and what happens when the process goes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.processes import EngineGroup, RemoteEngine, start_group
from manylora.processes import group as group_module
from manylora.processes import remote_engine as remote
from manylora.types import (
    AdamParams,
    AdapterExists,
    AdapterNotFound,
    AdapterSpec,
    BaseModelError,
    DataError,
    EngineLost,
    ForwardBackward,
    Opening,
    OptimStep,
    Sample,
    SamplingParams,
    TargetError,
    Unsupported,
    causal_datum,
)
from manylora.types.mesh_shape import MeshShape
from tests.family import below, runs
from tests.models import TinyBases

SPEC = AdapterSpec(rank=3, init="gaussian", dropout=0.1, dtype="bf16")


def opening(base: Path | str) -> Opening:
    return Opening(str(base), token_budget=128, device="cpu", threads=1)


@contextmanager
def group_of(base: Path | str, step_seconds: float = 60.0) -> Iterator[EngineGroup]:
    group = EngineGroup(opening(base), step_seconds=step_seconds)
    try:
        yield group
    finally:
        group.close()


def work(name: str, seed: int, length: int = 20) -> ForwardBackward:
    tokens = np.random.default_rng(seed).integers(3, 160, size=length)
    return ForwardBackward(adapter=name, data=[causal_datum(tokens, np.ones(length))])


def member(group: EngineGroup) -> int:
    """The group's one process."""
    [pid] = below(group._launcher.pid)  # type: ignore[attr-defined]
    return pid


def test_the_verbs_give_what_they_give_in_this_process(tiny: TinyBases) -> None:
    base = tiny("qwen3")
    here = Engine(Opening(str(base), token_budget=128, threads=1))
    with group_of(base) as group:
        there = group.open()[0]
        assert there.base.fingerprint == here.base.fingerprint
        assert there.sites == here.sites
        found = []
        for engine in (here, there):
            engine.create("a", SPEC)
            engine.create("b", AdapterSpec(rank=5, targets=("q_proj", "lm_head"), seed=3))
            seen = []
            for step in range(3):
                seen += engine.forward_backward([work("a", step), work("b", step + 9, 50)])
                steps = [OptimStep(adapter=n, params=AdamParams(lr=0.1)) for n in ("a", "b")]
                seen += engine.optim_step(steps)
            engine.forward_backward([work("a", 7)])
            engine.snapshot("a", "frozen")
            samples = [
                Sample(adapter=None, prompts=[[5, 6, 7]], snapshot="frozen"),
                Sample(adapter="b", prompts=[[5]], params=SamplingParams(temperature=1.0, seed=4)),
                Sample(adapter="b", prompts=[]),
                Sample(adapter="c", prompts=[[4]]),
            ]
            verdicts = engine.admit(samples)
            answers = {}
            while engine.decoding:
                answers.update({samples.index(s): a for s, a in engine.decode(1.0)})
            state, frozen = engine.state("a"), engine.snapshot_state("frozen")
            engine.poison("b", "because")
            refused = engine.optim_step([OptimStep(adapter="b", params=AdamParams(lr=0.1))])
            found.append((seen, verdicts, answers, state, frozen, refused))
            engine.unload("a")
            restored = engine.restore("a", state)
            assert restored.layout == state.layout
            engine.install_snapshot("again", frozen)
            assert engine.snapshots["again"].num_bytes == engine.snapshots["frozen"].num_bytes
        mine, theirs = found
        for one, other in zip(mine[0], theirs[0], strict=True):
            assert repr(one) == repr(other)
            for a, b in zip(
                getattr(one, "logprobs", ()), getattr(other, "logprobs", ()), strict=True
            ):
                assert a.tobytes() == b.tobytes()
        assert list(map(repr, mine[1])) == list(map(repr, theirs[1]))
        assert mine[2] == theirs[2]
        for one, other in zip(mine[3:5], theirs[3:5], strict=True):
            for name in ("weights", "exp_avg", "exp_avg_sq", "grad"):
                a, b = getattr(one, name), getattr(other, name)
                assert (a is None) == (b is None)
                assert a is None or a.tobytes() == b.tobytes(), name
            assert (one.step, one.draws, one.poison) == (other.step, other.draws, other.poison)
        assert repr(mine[5]) == repr(theirs[5])


def test_errors_of_one_command_leave_the_rest_alone(tiny: TinyBases) -> None:
    with group_of(tiny("qwen3")) as group:
        engine = group.open()[0]
        engine.create("a", SPEC)
        with pytest.raises(AdapterExists):
            engine.create("a", SPEC)
        with pytest.raises(TargetError):
            engine.create("b", AdapterSpec(targets=("nothing",)))
        with pytest.raises(AdapterNotFound):
            engine.state("b")
        [refused] = engine.forward_backward([work("a", 0, length=500)])
        assert isinstance(refused, DataError)
        with pytest.raises(RuntimeError, match="failed in the engine's process"):
            engine.base_weight("no.such.site")
        assert engine.lost is None


def test_a_process_that_goes_takes_the_engine_with_it_and_another_comes(tiny: TinyBases) -> None:
    reasons: list[str] = []
    with group_of(tiny("qwen3")) as group:
        first = group.open(reasons.append)[0]
        first.create("a", SPEC)
        os.kill(member(group), signal.SIGKILL)
        with pytest.raises(EngineLost) as caught:
            first.forward_backward([work("a", 0)])
        assert caught.value.silent
        with pytest.raises(EngineLost):
            first.create("b", SPEC)
        assert len(reasons) == 1
        began = time.monotonic()
        second = group.open()[0]
        assert time.monotonic() - began < 15.0
        second.create("a", SPEC)
        assert not isinstance(second.forward_backward([work("a", 0)])[0], Exception)


@pytest.mark.parametrize("fatal", [signal.SIGSEGV, signal.SIGABRT])
def test_a_process_that_breaks_down_says_where_it_stood(tiny: TinyBases, fatal: int) -> None:
    with group_of(tiny("qwen3")) as group:
        engine = group.open()[0]
        os.kill(member(group), fatal)
        with pytest.raises(EngineLost, match="broke down") as caught:
            engine.create("a", SPEC)
        assert not caught.value.silent
        assert "Fatal Python error" in group.stacks()


def test_a_process_that_the_kernel_kills_for_its_memory_is_not_taken_for_anothers_victim(
    tiny: TinyBases, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = [7]
    monkeypatch.setattr(remote, "oom_kills", lambda: kills[0])
    with group_of(tiny("qwen3")) as group:
        engine = group.open()[0]
        os.kill(member(group), signal.SIGKILL)
        kills[0] += 1
        with pytest.raises(EngineLost) as caught:
            engine.create("a", SPEC)
        assert not caught.value.silent


def test_one_process_of_several_that_is_killed_is_why_the_others_fail(tiny: TinyBases) -> None:
    both = replace(opening(tiny("qwen3")), mesh=MeshShape(dp=2))
    group = EngineGroup(both, step_seconds=60.0)
    try:
        engine = group.open()[0]
        engine.create("a", SPEC)
        killing = threading.Timer(0.3, os.kill, (below(group._launcher.pid)[1], signal.SIGKILL))  # type: ignore[attr-defined]
        killing.start()
        with pytest.raises(EngineLost) as caught:
            for seed in range(1000):
                engine.forward_backward([work("a", seed + n, length=100) for n in range(40)])
        assert caught.value.silent
        killing.join()
    finally:
        group.close()


def test_a_process_that_is_told_to_end_does_so_within_its_command(tiny: TinyBases) -> None:
    with group_of(tiny("qwen3")) as group:
        engine = group.open()[0]
        engine.create("a", SPEC)
        ending = threading.Timer(0.3, os.kill, (member(group), signal.SIGTERM))
        ending.start()
        with pytest.raises(EngineLost):
            for seed in range(1000):
                engine.forward_backward([work("a", seed + n, length=100) for n in range(40)])
        ending.join()


def test_a_command_that_takes_too_long_ends_the_process_which_says_where_it_stood(
    tiny: TinyBases,
) -> None:
    with group_of(tiny("qwen3"), step_seconds=0.05) as group:
        engine = group.open()[0]
        with pytest.raises(EngineLost) as caught:
            engine.create("a", SPEC)
            for seed in range(100):
                engine.forward_backward([work("a", seed + n, length=100) for n in range(40)])
        assert not caught.value.silent
        assert "process 0:" in group.stacks()
        assert "member.py" in group.stacks()
        assert isinstance(group.open()[0], RemoteEngine)


def test_a_process_that_cannot_even_end_itself_is_killed(
    tiny: TinyBases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GRACE_SECONDS", 0.5)
    with group_of(tiny("qwen3"), step_seconds=0.5) as group:
        engine = group.open()[0]
        os.kill(member(group), signal.SIGSTOP)
        with pytest.raises(EngineLost, match="timed out"):
            engine.create("a", SPEC)
        assert isinstance(group.open()[0], RemoteEngine)


def test_who_waits_for_an_engine_that_is_given_up_is_told(tiny: TinyBases) -> None:
    """In the midst of a command, and for ever after."""
    with group_of(tiny("qwen3")) as group:
        engine, pid = group.open()[0], member(group)
        engine.create("a", SPEC)
        os.kill(pid, signal.SIGSTOP)
        giving_up = threading.Timer(0.3, group.give_up)
        giving_up.start()
        with pytest.raises(EngineLost):
            engine.forward_backward([work("a", 1)])
        giving_up.join()
        with pytest.raises(EngineLost, match="nobody waits"):
            group.open()
        group.close()
        until_gone([pid])


def test_an_opening_can_be_given_up(tiny: TinyBases) -> None:
    with group_of(tiny("qwen3")) as group:
        group.open()
        pid = member(group)
        os.kill(pid, signal.SIGSTOP)
        giving_up = threading.Timer(0.3, group.give_up)
        giving_up.start()
        members, group._engines = group._members, ()  # as if it had not opened the base yet
        with pytest.raises(EngineLost, match="went while it opened"):
            group._opened(members)
        giving_up.join()


def test_a_base_that_cannot_be_opened_is_an_error_of_its_own(tmp_path: Path) -> None:
    with (
        group_of(tmp_path / "nothing") as group,
        pytest.raises(BaseModelError, match="cannot open"),
    ):
        group.open()[0]


CONTROL = """
import os, sys, time
from manylora.processes import EngineGroup
from manylora.types import Opening
opening = Opening(sys.argv[1], token_budget=128, device="cpu", threads=1)
group = EngineGroup(opening, step_seconds=60.0)
group.open()[0]
print("open", flush=True)
time.sleep(600)
"""


def test_no_process_outlives_the_one_that_it_serves(tiny: TinyBases) -> None:
    control = subprocess.Popen(
        [sys.executable, "-c", CONTROL, str(tiny("qwen3"))], stdout=subprocess.PIPE, text=True
    )
    assert control.stdout is not None
    with control.stdout:
        assert control.stdout.readline() == "open\n"
        family = below(control.pid)
        assert len(family) >= 2
        control.kill()
        control.wait()
    until_gone(family)


@pytest.mark.parametrize("nested", [False, True])
def test_a_tp_that_does_not_fit_starts_nothing(tmp_path: Path, monkeypatch, nested: bool):
    def never(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(group_module, "launch_here", never)
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3}
    # No weights lie there: they are not looked for.
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes} if nested else sizes))
    opening = Opening(str(tmp_path), device="cpu", mesh=MeshShape(tp=2))
    with pytest.raises(Unsupported, match=r"9 query heads, 3 key-value heads.*one of 1, 3;"):
        start_group(opening, step_seconds=60.0)


def until_gone(pids: list[int]) -> None:
    """The kernel takes its time with a process that was killed."""
    end = time.monotonic() + 60.0
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
