"""One number of threads holds wherever bits are computed that several tests share."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from tests.threads import SESSION, check_expected


@pytest.fixture(scope="module")
def shared() -> int:
    """The number under which a shared fixture computes."""
    return torch.get_num_threads()


@pytest.mark.parametrize("threads", [SESSION + 1, SESSION + 2], indirect=True)
def test_a_shared_fixture_computes_under_the_sessions_number_whoever_asks_first(
    request: pytest.FixtureRequest, threads: int
) -> None:
    assert torch.get_num_threads() == threads != SESSION
    assert request.getfixturevalue("shared") == SESSION
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("_", range(2))
def test_what_a_test_leaves_behind_reaches_nobody(_: int) -> None:
    assert torch.get_num_threads() == SESSION
    torch.set_num_threads(SESSION + 1)
    with pytest.raises(AssertionError, match=f"{SESSION} are expected"):
        check_expected()


@pytest.mark.parametrize("turn", range(2))
def test_what_another_thread_leaves_behind_reaches_no_new_thread(turn: int) -> None:
    """As an engine does that is opened beside this thread with a number of threads of its own."""
    found: list[int] = []
    in_thread(lambda: found.append(torch.get_num_threads()))
    assert found == [SESSION]
    in_thread(lambda: torch.set_num_threads(SESSION + 1))
    assert torch.get_num_threads() == SESSION


def in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_processes_that_tests_start_have_it_too() -> None:
    assert os.environ["OMP_NUM_THREADS"] == str(SESSION)
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert int(subprocess.run(command, capture_output=True, check=True).stdout) == SESSION
