"""A program for test_crashes: saves states, is killed, and looks at what is left.

    crashing_saver.py kill FOLDER       20 savers, each killed with SIGKILL at a random moment
    crashing_saver.py calls FOLDER      one saver for every system call of a save, dying before it

It forks, so it must be a program of its own with a single thread. Prints the number of strays that
the dead left behind; fails by an exception.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from manylora.checkpoint import load_state, newest_state, save_state
from tests.unit.checkpoint.states import state_of

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock"}


def save(folder: Path, step: int) -> None:
    state = state_of(step=step)
    state.weights.fill(step)
    save_state(folder, state, base_name="t", base_fingerprint="f", client={"step": step})


def check(folder: Path, acknowledged: int) -> int:
    """The step in `folder`, which must be whole and not older than what was acknowledged."""
    saved = load_state(folder)
    step = saved.state.step
    assert step >= acknowledged, f"{folder}: step {step}, but {acknowledged} was acknowledged"
    assert saved.client == {"step": step}
    assert np.array_equal(saved.state.weights, np.full_like(saved.state.weights, step))
    return step


def strays(parent: Path) -> int:
    return sum(path.name.startswith(".") for path in parent.iterdir())


def save_for_ever(parent: Path, step: int, acknowledge: int) -> None:
    while True:
        step += 1
        save(parent / f"step-{step}", step)
        save(parent / "latest", step)
        os.write(acknowledge, step.to_bytes(8, "little"))


def kill_at_random(parent: Path, times: int = 20) -> int:
    save(parent / "latest", 0)
    step, acknowledged, left = 0, 0, 0
    chance = random.Random(1)
    for _ in range(times):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(parent, step, writer)
        os.close(writer)
        time.sleep(chance.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        if told:
            acknowledged = int.from_bytes(told[-8:], "little")
        left += strays(parent)
        newest = newest_state(parent)
        if acknowledged:
            assert newest is not None, "the newest state is gone"
        step = check(newest, acknowledged) if newest else 0
        assert newest is None or newest.name == f"step-{step}"
        check(parent / "latest", acknowledged)
        assert strays(parent) == 0
    assert step > 0
    return left


def die_before_call(number: int) -> None:
    count = 0

    def hook(event: str, _: tuple[object, ...]) -> None:
        nonlocal count
        if event in CALLS:
            count += 1
            if count == number:
                os._exit(1)

    sys.addaudithook(hook)


def die_at_every_call(parent: Path) -> int:
    """Replace `latest` again and again, dying one call later each time, until a save is through."""
    save(parent / "latest", 1)
    left, number = 0, 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            die_before_call(number)
            save(parent / "latest", 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left += strays(parent)
        through = os.waitstatus_to_exitcode(status) == 0
        check(parent / "latest", 2 if through else 1)
        save(parent / "latest", 1)
        assert strays(parent) == 0
        if through:
            assert number > 10, "the hook saw too few calls"
            return left


if __name__ == "__main__":
    run = {"kill": kill_at_random, "calls": die_at_every_call}[sys.argv[1]]
    print(run(Path(sys.argv[2])))
