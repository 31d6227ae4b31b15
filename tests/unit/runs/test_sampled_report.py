"""The page of a run that samples: its data, its size, and its program on a document in node."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from manylora.runs import report
from manylora.runs.report import report_data, script_json, thinned_steps, write_report
from manylora.runs.rl.publishes import publishes
from manylora.runs.rl.token_texts import TokenTexts
from manylora.runs.run_folder import RunPaths, write_json
from manylora.runs.sft import SFT_COLUMNS
from tests.unit.runs.sampled_run import (
    COLUMNS,
    WordTokenizer,
    group,
    metrics_row,
    rollout,
    segment,
    step_bytes,
    summary_entry,
    write_run,
    write_step,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\x1b[2J\u202e{x}"
LIMIT = 5_000_000
NODE = Path(__file__).with_name("page_in_node.js")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page")


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> WordTokenizer:
    """The base's tokenizer is one of words."""
    tokenizer = WordTokenizer()
    monkeypatch.setattr(report, "texts_of", lambda paths: TokenTexts(tokenizer))
    return tokenizer


def talk() -> dict[str, Any]:
    """A sample of two turns with a tool's answer between them."""
    first, later = segment([1, 2], [4, 5], 1), segment([8], [5, 6], 2)
    both = {name: first[name] + later[name] for name in ("tokens", "logprobs", "versions")}
    return rollout(1.0, {**both, "sampled": [2, 3, 5, 6]}, turns=2)


def sampled_run(root: Path, *, steps: int = 12) -> RunPaths:
    """Two adapters that sample; of one step a group is silent."""
    paths = write_run(root, ["digits", "vowels"], steps)
    for name in ("digits", "vowels"):
        for step in range(1, steps + 1):
            groups = [
                group(step, 0, 3, [talk(), rollout(0.25 + step / 100), rollout(0.5)]),
                group(step, 1, step, [rollout(0.5), rollout(0.5)]),
            ]
            write_step(paths.adapter(name).rollouts, step, groups)
    return paths


def shown(paths: RunPaths, columns: Any) -> dict[str, Any]:
    """What a person reads on the page."""
    write_report(paths, columns)
    done = subprocess.run(
        ["node", str(NODE), str(paths.report)], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


BOTH = {"digits": COLUMNS, "vowels": COLUMNS}


def test_the_data_have_every_charted_figure_the_versions_and_the_samples(tmp_path: Path):
    data = report_data(sampled_run(tmp_path), BOTH)
    charted = {one.name for one in COLUMNS.step if one.charted}
    wanted = {"reward", "kl", "entropy", "length", "staleness", "logprob_gap", "truncated_share"}
    assert charted >= wanted
    assert set(data["series"]["digits"]) == {"step", *charted}
    assert data["series"]["vowels"]["reward"] == [metrics_row(s, 1)["reward"] for s in range(1, 13)]
    assert data["figures"]["curves"] == ["reward"]
    assert [one["name"] for one in data["figures"]["evaluation"]] == ["reward"]
    assert data["publishes"]["digits"]["version"] == list(range(12))
    assert [one["step"] for one in data["rollouts"]["vowels"]][::7] == [1, 12]
    assert data["samples"]["digits"][0]["after"] == {"text": "a", "exact": None, "reward": 0.5}


def test_a_run_of_fine_tuning_has_the_data_that_it_had(tmp_path: Path):
    paths = RunPaths(tmp_path)
    rows = [
        {"step": s, "loss": 2.0 / s, "lr": 1e-3, "grad_norm": 0.5, "tokens": 9, "seconds": 0.1}
        for s in (1, 2, 3)
    ]
    metrics = paths.adapter("a").metrics
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"prompt": "p", "expected": "e", "answer": "x" * 5000, "exact": False}
    write_json(paths.adapter("a").samples, {"before": [answer], "after": [answer]})
    told = {"status": "completed", "adapters": {"a": {"status": "completed"}}}
    write_json(paths.summary, told)
    paths.run_yaml.write_text("base: b\n")
    side = {"text": "x" * 4000 + " …", "exact": False}
    # Every byte, in this order.
    assert script_json(report_data(paths, {"a": SFT_COLUMNS})) == script_json(
        {
            "title": tmp_path.name,
            "summary": told,
            "run_yaml": "base: b\n",
            "series": {
                "a": {
                    "step": [1, 2, 3],
                    "loss": [2.0, 1.0, 2.0 / 3],
                    "lr": [1e-3] * 3,
                    "grad_norm": [0.5] * 3,
                }
            },
            "samples": {"a": [{"prompt": "p", "expected": "e", "before": side, "after": side}]},
        }
    )


def test_of_many_versions_some_are_drawn_with_the_first_and_the_last():
    found = publishes([metrics_row(step) for step in range(1, 10_001)])
    kept = thinned_steps(found, 500)
    assert len(kept) <= 501
    assert (kept[0]["version"], kept[-1]["version"]) == (0, 9_999)
    few = publishes([metrics_row(step) for step in (1, 2)])
    assert thinned_steps(few, 500) == list(few.values())


@pytest.mark.parametrize("text", [HOSTILE, "<" * 400])
def test_eight_adapters_of_five_hundred_steps_have_a_page_of_five_megabytes(
    tmp_path: Path, words: WordTokenizer, text: str
):
    words.words = dict.fromkeys(range(10), text)
    names = [f"adapter-{number}" for number in range(8)]
    paths = write_run(tmp_path, names, 500)
    long = rollout(
        1.0,
        segment([1] * 400, [4] * 400),
        segment([1] * 400, [4] * 400),
        parts={f"{text}{n}": 0.123456789 for n in range(9)},
    )
    answers = [
        {"prompt": text * 90, "expected": None, "answer": text * 90, "exact": None, "reward": 0.1}
    ] * 64
    for name in names:
        folder = paths.adapter(name).rollouts
        folder.mkdir()
        for row in range(9):
            groups = [
                group(1, n, row + n, [long, rollout(0.5)], errors=[text * 9] * 9) for n in range(4)
            ]
            (folder / f"step-{row + 1}.jsonl.gz").write_bytes(step_bytes(groups))
        for step in range(10, 501):
            os.link(folder / f"step-{step % 9 + 1}.jsonl.gz", folder / f"step-{step}.jsonl.gz")
        write_json(paths.adapter(name).samples, {"before": answers, "after": answers})
    write_report(paths, dict.fromkeys(names, COLUMNS))
    size = paths.report.stat().st_size
    assert 1_000_000 < size <= LIMIT
    data = paths.report.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    told = json.loads(data)["rollouts"]
    assert all(len(steps) == 8 and len(steps[0]["groups"]) == 3 for steps in told.values())


def test_a_page_does_not_grow_with_the_steps(tmp_path: Path):
    sizes = []
    for steps in (2_000, 10_000):
        paths = write_run(tmp_path / str(steps), ["digits"], steps)
        (paths.adapter("digits").rollouts).mkdir()
        data = report_data(paths, {"digits": COLUMNS})
        assert len(data["series"]["digits"]["step"]) <= 1_002
        assert len(data["publishes"]["digits"]["version"]) <= 1_001
        sizes.append(len(script_json(data)))
    assert max(sizes) < 1.1 * min(sizes) < LIMIT / 8


# --- the page itself --------------------------------------------------------------------------


@needs_node
def test_the_page_draws_reward_first_and_shows_the_samples(tmp_path: Path):
    page = shown(sampled_run(tmp_path), BOTH)
    assert page["heads"][0] == "Reward, in training and on held-out prompts"
    charts = dict(page["charts"])
    assert next(iter(charts)) == "reward" and charts["reward"] == 6  # raw, smoothed, evaluation
    assert {"length", "staleness", "logprob_gap", "entropy", "loss", "lr", "timeline"} <= set(
        charts
    )
    assert "kl" not in charts  # no step has one
    assert all(charts.values()) and page["broken"] == []
    assert "Reward, first → last" in page["columns"]
    assert "Eval reward, before → after" in page["columns"]
    assert "-0.5 → 0.75 ▲" in page["cells"]
    assert page["marks"] == ["zero variance: nothing to learn"]
    first = page["samples"][0]
    assert "Ask me" in first and "reward 1" in first and "2 turns" in first
    assert first.count("Best") == first.count("Worst") == 1
    assert page["given"][0] == " tool:7"
    assert ["Well", "color-mix(in srgb, var(--good) 8%, transparent)"] in page["tokens"]
    assert any("--bad" in tint for _, tint in page["tokens"])
    assert ["Well", "color-mix(in srgb, var(--accent) 18%, transparent)"] in page["tinted"]
    # The prompt of row 3 is in each of the eight steps, with a way to all the others.
    assert sum("row 3 " in text for text in page["all"]) == 8
    assert re.search(r"1: 0\.5867.*12: 0\.6233", first)


@needs_node
def test_hostile_samples_are_text_and_nothing_else(tmp_path: Path, words: WordTokenizer):
    harmless = shown(sampled_run(tmp_path / "harmless"), BOTH)
    words.words = dict.fromkeys(range(10), HOSTILE)
    paths = sampled_run(tmp_path / "hostile")
    bad = rollout(0.75, parts={HOSTILE: 1.0}, stop_reason=HOSTILE, text=HOSTILE)
    for name in BOTH:
        groups = [group(12, 0, 3, [bad, talk(), bad], errors=[HOSTILE])]
        write_step(paths.adapter(name).rollouts, 12, groups)
    page = shown(paths, BOTH)
    assert set(page["made"]) <= set(harmless["made"])
    assert not {"script", "img", "iframe"} & set(page["made"])
    text = paths.report.read_text(encoding="utf-8")
    assert "<img" not in text and text.count("<script") == 2
    assert "\x1b" not in text and "\u2028" not in text
    assert any(HOSTILE in one for one in page["samples"])


@needs_node
def test_both_kinds_of_run_have_one_page(tmp_path: Path):
    paths = sampled_run(tmp_path)
    told = json.loads(paths.summary.read_text())
    entry = summary_entry(3)
    entry = {name: value for name, value in entry.items() if "reward" not in name}
    entry |= {"first_loss": 2.0, "last_loss": 1.0, "evaluations": []}
    entry |= {"eval_before": {"loss": 3.0, "exact_match": 0.125}, "eval_after": None}
    write_json(paths.summary, {**told, "adapters": {"letters": entry, **told["adapters"]}})
    metrics = paths.adapter("letters").metrics
    metrics.parent.mkdir()
    rows = [{"step": s, "loss": 2.0 / s, "lr": 1e-3, "grad_norm": 0.5} for s in (1, 2, 3)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = shown(paths, {"letters": SFT_COLUMNS, **BOTH})
    charts = dict(page["charts"])
    assert (charts["reward"], charts["loss"], charts["lr"]) == (6, 6, 3)
    assert page["broken"] == [] and "Curve" in page["columns"]
    assert [text for text in page["columns"] if "→" in text] == [
        "Loss, first → last",
        "Reward, first → last",
        "Eval loss, before → after",
        "Exact match, before → after",
        "Eval reward, before → after",
    ]
    row = page["cells"][: len(page["columns"])]
    assert row[4:9] == ["2 → 1 ▼", "–", "3", "13%", "–"]


@needs_node
def test_a_page_of_fine_tuning_is_as_it_was(tmp_path: Path):
    paths = RunPaths(tmp_path)
    entry = summary_entry(3)
    entry = {name: value for name, value in entry.items() if "reward" not in name}
    entry |= {"first_loss": 2.0, "last_loss": 1.0, "eval_after": {"loss": 1.5, "exact_match": 0.5}}
    entry["eval_before"] = {"loss": 3.0, "exact_match": 0.125}
    write_json(paths.summary, {"status": "completed", "adapters": {"letters": entry}})
    metrics = paths.adapter("letters").metrics
    metrics.parent.mkdir()
    rows = [{"step": s, "loss": 2.0 / s, "lr": 1e-3, "grad_norm": 0.5} for s in (1, 2, 3)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = shown(paths, {"letters": SFT_COLUMNS})
    assert page["heads"][:3] == ["Training loss", "Learning rate", "Gradient norm before clipping"]
    assert page["charts"] == [["loss", 2], ["lr", 1], ["grad_norm", 2], ["timeline", 0]]
    assert page["columns"][2:8] == [
        "Loss curve",
        "Steps",
        "Loss, first → last",
        "Eval loss, before → after",
        "Exact match, before → after",
        "Trained tokens",
    ]
    assert page["cells"][4:7] == ["2 → 1 ▼", "3 → 1.5 ▼", "13% → 50% ▲"]
    assert page["broken"] == [] and "Samples of training" not in page["heads"]
