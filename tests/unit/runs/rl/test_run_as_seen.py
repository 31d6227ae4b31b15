"""A small real run of both kinds, as people and programs see it: events, page, rollouts."""

import json
from pathlib import Path

import pytest
import yaml

from manylora.cli import main as cli
from manylora.config import load_run_file
from manylora.runs.rl import rl_course
from manylora.runs.train import train_run_file
from tests.unit.runs.rl.small_runs import entry, write_run


def test_a_run_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(rl_course, "TELL_SECONDS", 0.01)
    path = write_run(
        tmp_path, [entry("slow", "slow", max_steps=3), entry("play", "play", max_steps=3)]
    )
    run = yaml.safe_load(path.read_text())
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a: ", "completion": "b"}\n' * 4)
    sft = {"train": "pairs.jsonl", "batch_size": 2, "max_steps": 2}
    path.write_text(
        yaml.safe_dump(
            {**run, "report": True, "adapters": [*run["adapters"], {"name": "letters", "sft": sft}]}
        )
    )
    assert train_run_file(load_run_file(path), view="json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # The reward sleeps, so a step waits; it says for what, until it has it.
    waits = [one for one in events if one["event"] == "step_waits"]
    assert {one["adapter"] for one in waits} == {"slow", "play"}
    assert all((one["text"], one["total"]) == ("samples", 2) for one in waits)
    assert all(0 <= one["done"] <= 2 for one in waits)

    out = tmp_path / "out"
    page = (out / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert set(data["rollouts"]) == set(data["publishes"]) == {"slow", "play"}
    assert data["figures"]["curves"] == ["reward", "loss"]
    assert set(data["series"]["letters"]) == {"step", "loss", "lr", "grad_norm"}
    assert data["publishes"]["slow"]["version"] == [0, 1, 2]
    (first, *_), (last, *_) = (data["rollouts"]["play"][at]["groups"][0]["shown"] for at in (0, -1))
    for sample in (first, last):
        kinds = ["given" if "given" in span else "sampled" for span in sample["spans"]]
        assert kinds == ["sampled", "given", "sampled"] and sample["turns"] == 2
        assert " = " in sample["spans"][1]["given"]

    for name in ("slow", "play"):
        assert cli.main(["rollouts", str(out), "--adapter", name, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["step"], told["samples"], told["groups"]) == (3, 8, 2)
        assert len(told["best"]) == len(told["worst"]) == 3
        assert told["best"][0]["reward"] == told["reward_max"]
        assert told["best"][0]["prompt"].endswith(": ") and told["best"][0]["spans"]
