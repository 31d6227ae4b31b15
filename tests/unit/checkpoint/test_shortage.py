"""Files that cannot be opened because too many are open: said so, and never taken for damaged, lost
or missing.

Faults that were planted and seen to fail here: each call of `tell_shortage_apart` in this room that
reads an adapter taken out, and the library that says "No such file" of every file that it cannot
open believed.
"""

import errno
import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manylora.checkpoint import (
    clean_strays,
    describe,
    export_peft,
    import_peft,
    load_state,
    newest_state,
    save_state,
    verify,
)
from manylora.types import SaveFailed, TextFormat, TooManyFilesOpen
from tests.descriptors import descriptors_left, told_or_done
from tests.unit.checkpoint.states import SITES, state_of

Read = Callable[[Path], Any]

READS: dict[str, Read] = {
    "state": lambda f: load_state(f / "step-4").state.weights.tobytes(),
    "newest": newest_state,
    "manifest": lambda f: verify(f / "step-4"),
    "adapter": lambda f: import_peft(f / "peft", SITES).weights_P.tobytes(),
    "template": lambda f: import_peft(f / "peft", SITES).text_format,
    "description": lambda f: describe(f / "step-4"),
    "description of an adapter": lambda f: describe(f / "peft"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (3, 4):
        save_state(
            tmp_path / f"step-{step}", state_of(step=step), base_name="tiny",
            base_fingerprint="f00d", client={},
        )  # fmt: skip
    state = state_of()
    export_peft(
        tmp_path / "peft", state.spec, state.layout, state.weights, base_name="tiny", sites=SITES,
        text_format=TextFormat.of_json({"stop": [1], "chat_template": "{{ messages }}"}),
    )  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_what_is_whole_is_never_called_damaged(folder: Path, read: Read, caplog):
    caplog.set_level(logging.WARNING)
    told_or_done(lambda: read(folder))
    assert not caplog.records  # nothing was skipped


@dataclass
class Calls:
    """How often a file was opened, and which time that fails (0 = never)."""

    made: int = 0
    failing: int = 0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_neither_limit_is_damage(
    folder: Path, read: Read, number: int, monkeypatch: pytest.MonkeyPatch
):
    """Each call that opens a file fails in its turn: the first, the second, …"""
    expected = read(folder)
    real, calls = io.open, Calls()

    def limited(*args: Any, **given: Any) -> Any:
        calls.made += 1
        if calls.made == calls.failing:
            raise OSError(number, os.strerror(number), str(args[0]))
        return real(*args, **given)

    monkeypatch.setattr(io, "open", limited)
    assert read(folder) == expected
    told = 0
    for failing in range(1, calls.made + 1):
        calls.made, calls.failing = 0, failing
        try:
            assert read(folder) == expected  # it can do without
        except TooManyFilesOpen:
            told += 1
    assert told > 1
    calls.failing = 0
    assert read(folder) == expected


def test_a_folder_that_a_killed_save_left_aside_is_not_lost(folder: Path):
    aside = folder / ".step-4.old-00000000"
    (folder / "step-4").rename(aside)
    with descriptors_left(0), pytest.raises(TooManyFilesOpen):
        load_state(folder / "step-4")
    with descriptors_left(0), pytest.raises(TooManyFilesOpen):
        clean_strays(folder)
    assert aside.is_dir()
    for number in range(3):  # which other killed saves began
        (folder / f".step-4.partial-0000000{number}").mkdir()
    with descriptors_left(2), pytest.raises(TooManyFilesOpen):
        load_state(folder / "step-4")
    assert aside.is_dir()
    assert load_state(folder / "step-4").state.step == 4


def test_what_cannot_be_saved_now_is_a_save_that_failed(folder: Path):
    for count in range(4):
        with descriptors_left(count), pytest.raises(SaveFailed, match="open"):
            save_state(
                folder / "step-4", state_of(seed=9), base_name="tiny", base_fingerprint="f00d",
                client={},
            )  # fmt: skip
            raise SaveFailed("there were enough descriptors open")
    assert load_state(folder / "step-4").state.weights.tobytes() in (
        state_of(step=4).weights.tobytes(), state_of(seed=9).weights.tobytes(),
    )  # fmt: skip
