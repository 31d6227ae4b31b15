"""What a server has on its disk, while it can open no more files: nothing of it is lost or gone.

Faults that were planted and seen to fail here: each call of `tell_shortage_apart` that these reach
taken out, and `TooManyFilesOpen` answered as an error of the client.
"""

import json
from pathlib import Path

import pytest

from manylora.cli.adapter_folder import find_adapter
from manylora.journal.journal import Journal
from manylora.journal.recovery import segments
from manylora.runs.sources import read_source
from manylora.service.http_errors import answer_to
from manylora.service.state.replay import saved_position
from manylora.service.state.result_files import Results
from manylora.types import SaveFailed, TooManyFilesOpen
from tests.descriptors import descriptors_left, told_or_done


def test_a_state_is_not_lost(tmp_path: Path):
    (tmp_path / "state.json").write_text(json.dumps({"client": {"seq": 7}}))
    told_or_done(lambda: saved_position(tmp_path), 2)


def test_a_result_is_not_gone(tmp_path: Path):
    results = Results(tmp_path, 1000.0, memory_bytes=0)
    results.put("r", "ann", "application/json", b"{}")
    told_or_done(lambda: results.get("r"), 2)


def test_a_journal_is_not_empty(tmp_path: Path):
    (tmp_path / "00000001.journal").write_bytes(b"")
    told_or_done(lambda: segments(tmp_path), 2)
    for count in range(4):
        with descriptors_left(count), pytest.raises(SaveFailed):
            Journal(tmp_path).close()
            raise SaveFailed("there were enough")
    Journal(tmp_path).close()  # and whoever could not start holds no lock


def test_data_are_not_wrong(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    told_or_done(lambda: len(read_source(str(path)).examples), 2)


def test_an_adapters_folder_is_not_damaged(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    told_or_done(lambda: find_adapter(tmp_path).folder, 2)


def test_a_client_is_told_to_come_again():
    answer = answer_to(TooManyFilesOpen("x cannot be read now"), "r")
    assert (answer.status, answer.category) == (503, "server")
    assert "try again" in answer.message
