"""`manylora rollouts`: which step of whom, best and worst, and nothing that steers a terminal."""

import json
from pathlib import Path
from typing import Any

import pytest

from manylora.cli import main as cli
from manylora.runs.rl import token_texts
from manylora.runs.rl.token_texts import TokenTexts
from tests.unit.runs.sampled_run import WordTokenizer, group, rollout, segment, write_step

HOSTILE = "\x1b[2J\x9b31m\u202egone\r\nforged: line"


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> WordTokenizer:
    tokenizer = WordTokenizer()
    monkeypatch.setattr(token_texts, "texts_of", lambda paths: TokenTexts(tokenizer))
    return tokenizer


@pytest.fixture
def run(tmp_path: Path, words: WordTokenizer) -> Path:
    """Steps 1, 2, 3 and 7 of `digits`; of the last one eight samples in two groups."""
    folder = tmp_path / "digits" / "rollouts"
    for step in (1, 2, 3):
        write_step(folder, step, [group(step, 0, 9, [rollout(0.0), rollout(1.0)])])
    many = [rollout(n / 8, text=f"answer {n}", stop_reason="length") for n in range(1, 7)]
    flat = [rollout(0.5), rollout(0.5)]
    errors = ["RolloutFailed: it hung"]
    groups = [group(7, 0, 12, many, errors=errors), group(7, 1, 4, flat, advantages=None)]
    write_step(folder, 7, groups)
    return tmp_path


def called(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main(["rollouts", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_newest_step_of_the_only_adapter(run: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = called(capsys, run, "--best", 2, "--worst", 1)
    assert code == 0
    assert "digits, step 7: 8 samples, groups: 2; reward 0.4531 (0.125 to 0.75)" in out
    assert "groups of one reward: 1; errors: 1" in out
    best, worst = out.split("\nbest\n")[1].split("\nworst\n")
    first, second = (line for line in best.splitlines() if "reward" in line)
    assert "reward 0.75, advantage +0.312, row 12, group 0, sample 5, version 0" in first
    assert "3 tokens, 1 turn, ended by length" in first and "reward 0.625" in second
    assert "parts   digits 0.75" in best and "prompt  Ask me" in best and "answer  answer 6" in best
    assert "reward 0.125" in worst and "answer  answer 1" in worst
    assert "row 12, group 0: RolloutFailed: it hung" in worst


def test_as_json(run: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = called(capsys, run, "--adapter", "digits", "--step", 7, "--json")
    told = json.loads(out)
    assert code == 0 and (told["adapter"], told["step"], told["samples"]) == ("digits", 7, 8)
    assert [one["reward"] for one in told["best"]] == [0.75, 0.625, 0.5]
    # The worst one first; of equals the later one.
    assert [one["reward"] for one in told["worst"]] == [0.125, 0.25, 0.375]
    assert told["best"][0] == {
        "row": 12,
        "group": 0,
        "sample": 5,
        "reward": 0.75,
        "parts": {"digits": 0.75},
        "advantage": 0.3125,
        "length": 3,
        "stop_reason": "length",
        "version": 0,
        "oldest_version": 0,
        "turns": 1,
        "metrics": {},
        "seconds": 1.5,
        "prompt": "Ask me",
        "answer": "answer 6",
        "spans": [{"sampled": True, "text": "Well, yes<end>"}],
    }
    assert told["errors"] == [{"group": 0, "row": 12, "error": "RolloutFailed: it hung"}]


def test_no_sample_is_told_twice(run: Path, capsys: pytest.CaptureFixture[str]):
    for best, worst in ((3, 3), (1, 5), (0, 1), (2, 0)):
        told = json.loads(
            called(capsys, run, "--step", 1, "--best", best, "--worst", worst, "--json")[1]
        )
        found = [one["sample"] for which in ("best", "worst") for one in told[which]]
        assert len(found) == len(set(found)) == min(2, best + worst)


def test_turns_of_a_conversation(run: Path, capsys: pytest.CaptureFixture[str]):
    first, later = segment([1, 2], [4, 5], 1), segment([8], [5, 6], 3)
    both = {name: first[name] + later[name] for name in ("tokens", "logprobs", "versions")}
    sample = rollout(1.0, {**both, "sampled": [2, 3, 5, 6]}, turns=2)
    write_step(run / "digits" / "rollouts", 8, [group(8, 0, 1, [sample])])
    _, out, _ = called(capsys, run)
    assert "versions 1 to 3" in out and "2 turns" in out
    turns = [line.strip() for line in out.splitlines() if line.startswith("    ")][-4:]
    assert turns == ["prompt  Ask me", "sampled Well, yes", "given    tool:7", "sampled , yes<end>"]


@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_text_does_not_reach_the_terminal(
    run: Path, words: WordTokenizer, capsys: pytest.CaptureFixture[str], as_json: bool
):
    words.words = {1: HOSTILE, 4: HOSTILE, 8: HOSTILE}
    odd = {"parts": {HOSTILE: 1.0}, "metrics": {HOSTILE: 2.0}, "stop_reason": HOSTILE}
    bad = rollout(1.0, text=HOSTILE, **odd)
    talk = rollout(0.5, segment([1], [4]), segment([8], [4]), **odd)
    groups = [group(9, 0, 1, [bad, talk], errors=[HOSTILE])]
    write_step(run / "digits" / "rollouts", 9, groups)
    _, out, _ = called(capsys, run, *(["--json"] if as_json else []))
    assert all(c.isprintable() or c == "\n" for c in out)
    if as_json:
        assert json.loads(out)["best"][0]["answer"] == HOSTILE
    else:
        # A line of a sample cannot look like one of ours.
        assert "\n            forged: line" in out and "\nforged" not in out


def test_what_is_not_there_is_said_with_what_is(run: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = called(capsys, run, "--step", 5)
    assert code == 2 and "'digits' has no rollouts of step 5; there are those of 1–3, 7" in err
    code, _, err = called(capsys, run, "--adapter", "nobody")
    assert code == 2 and "adapter 'nobody' has no rollouts here; there are digits" in err
    write_step(run / "vowels" / "rollouts", 1, [group(1, 0, 0, [rollout(1.0)])])
    code, _, err = called(capsys, run)
    assert code == 2 and "--adapter" in err and "digits, vowels" in err
    code, _, err = called(capsys, run / "nowhere")
    assert code == 2 and "there is no such folder" in err
    (run / "empty").mkdir()
    code, _, err = called(capsys, run / "empty")
    assert code == 2 and "no adapter here has rollouts" in err


def test_a_damaged_file_and_a_step_without_samples(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "digits" / "rollouts" / "step-8.jsonl.gz").write_bytes(b"\x1f\x8bno")
    code, _, err = called(capsys, run)
    assert code == 1 and "step-8.jsonl.gz is damaged" in err
    write_step(run / "digits" / "rollouts", 9, [group(9, 0, 1, [], errors=["it hung"])])
    code, out, _ = called(capsys, run)
    assert code == 0 and "0 samples, groups: 1; reward – (– to –)" in out and "it hung" in out
