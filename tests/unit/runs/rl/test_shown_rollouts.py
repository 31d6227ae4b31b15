"""The report's samples: the same prompts over steps, best beside worst, within their bytes."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from manylora.runs.report import script_json
from manylora.runs.rl.publishes import publishes
from manylora.runs.rl.shown_rollouts import (
    MOST_PROMPTS,
    MOST_STEPS,
    even_places,
    sample_bytes,
    shown_rollouts,
    within,
)
from manylora.runs.rl.token_texts import TokenTexts
from tests.unit.runs.sampled_run import (
    WordTokenizer,
    group,
    metrics_row,
    rollout,
    segment,
    write_step,
)

TEXTS = TokenTexts(WordTokenizer())
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028&\x00\x9b\u202e🙂"


def written(folder: Path, rows: dict[int, list[int]]) -> Path:
    """Rollouts of these steps, each with groups of these prompts."""
    for step, prompts in rows.items():
        groups = [
            group(step, n, row, [rollout(0.1 * n), rollout(0.2 * n), rollout(0.15 * n)])
            for n, row in enumerate(prompts)
        ]
        write_step(folder, step, groups)
    return folder


def rows_shown(shown: list[dict[str, Any]]) -> dict[int, list[int]]:
    return {one["step"]: [told["row"] for told in one["groups"]] for one in shown}


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 40, 500])
def test_places_are_even_with_the_first_and_the_last(count: int):
    places = even_places(count)
    assert len(places) == min(MOST_STEPS, count) == len(set(places))
    if count:
        assert places[0] == 0 and places[-1] == count - 1
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_same_prompts_are_followed(tmp_path: Path):
    # Each prompt comes back every fourth step, so even places alone would see others each time.
    folder = written(tmp_path, {step: [step % 4, 10 + step % 3] for step in range(1, 101)})
    shown = rows_shown(shown_rollouts(folder, TEXTS, 1000))
    assert min(shown) == 1 and max(shown) == 100 and len(shown) == MOST_STEPS
    steps = sorted(shown)
    assert all(8 <= b - a <= 21 for a, b in pairwise(steps))
    often = [sum(row in rows for rows in shown.values()) for row in range(20)]
    assert max(often) >= MOST_STEPS - 2
    # Without choosing, the most frequent prompt of even places is there far less often.
    even = [[step % 4, 10 + step % 3] for step in (place + 1 for place in even_places(100))]
    assert max(often) > max(sum(row in rows for rows in even) for row in range(20))


def test_prompts_that_never_come_back_are_shown_all_the_same(tmp_path: Path):
    folder = written(tmp_path, {s: list(range(5 * s, 5 * s + 5)) for s in range(1, 30)})
    shown = rows_shown(shown_rollouts(folder, TEXTS, 1000))
    assert len(shown) == MOST_STEPS
    assert all(len(rows) == MOST_PROMPTS for rows in shown.values())


def test_best_and_worst_of_a_group_with_what_it_got(tmp_path: Path):
    rollouts = [
        rollout(0.5),
        rollout(1.0, segment([1, 2], [4, 5], 3), turns=2, stop_reason="length"),
        rollout(-2.0),
    ]
    silent = [rollout(0.25), rollout(0.25)]
    errors = [f"error {n}" for n in range(9)]
    write_step(
        tmp_path,
        5,
        [
            group(5, 0, 3, rollouts, errors=errors),
            group(5, 1, 4, silent),
            group(5, 2, 6, rollouts[:1], advantages=None),
        ],
    )
    ((told, flat, alone),) = [one["groups"] for one in shown_rollouts(tmp_path, TEXTS, 1000)]
    best, worst = told["shown"]
    assert (best["reward"], worst["reward"], told["samples"]) == (1.0, -2.0, 3)
    assert best["advantage"] == pytest.approx(1.0 + 0.5 / 3)
    assert (best["stop"], best["turns"], best["versions"]) == ("length", 2, [3, 3])
    assert best["spans"] == [{"texts": ["Well", ", yes"], "p": [0.607, 0.368]}]
    assert told["prompt"] == "Ask me" and told["reward"] == pytest.approx(-0.5 / 3)
    assert len(told["errors"]) + told["more_errors"] == 9
    assert (told["silent"], flat["silent"], flat["trained"]) == (False, True, True)
    assert (alone["trained"], len(alone["shown"]), alone["shown"][0]["advantage"]) == (
        False,
        1,
        None,
    )


def test_a_group_without_samples_tells_its_errors_and_a_damaged_step_is_left_out(tmp_path: Path):
    write_step(tmp_path, 1, [group(1, 0, 3, [], errors=["it hung"])])
    (tmp_path / "step-2.jsonl.gz").write_bytes(b"no gzip")
    ((told,),) = [one["groups"] for one in shown_rollouts(tmp_path, TEXTS, 1000)]
    assert (told["errors"], told["shown"], told["silent"]) == (["it hung"], [], False)


@pytest.mark.parametrize("most", [300, 4000])
def test_a_sample_stays_within_its_bytes_whatever_it_holds(tmp_path: Path, most: int):
    hostile = TokenTexts(WordTokenizer({4: HOSTILE, 8: "<" * 40}))
    given, drawn = segment([1] * 5000, [4] * 5000), segment([8] * 500, [4] * 500)
    bad = rollout(1.0, given, drawn, parts={HOSTILE * 90: 1.0}, stop_reason=HOSTILE * 90)
    write_step(tmp_path, 1, [group(1, 0, 0, [bad, bad], errors=[HOSTILE * 90] * 50)])
    ((told,),) = [one["groups"] for one in shown_rollouts(tmp_path, hostile, most)]
    for sample in told["shown"]:
        assert len(script_json(sample["spans"]).encode()) <= most + 100
        shown = sum(len(span.get("texts", ())) for span in sample["spans"])
        assert sample["left_out"] == 5000 + 1000 - shown
    assert len(script_json(told).encode()) <= 3 * most + 3000


def test_given_text_that_is_cut_ends_the_sample(tmp_path: Path):
    talk = segment([1], [4])
    later = segment([8] * 100, [5])
    both = {name: talk[name] + later[name] for name in ("tokens", "logprobs", "versions")}
    both["sampled"] = [1, 102]
    write_step(tmp_path, 1, [group(1, 0, 0, [rollout(1.0, both)])])
    ((told,),) = [one["groups"] for one in shown_rollouts(tmp_path, TEXTS, 200)]
    first, given = told["shown"][0]["spans"]
    assert first["texts"] == ["Well"] and given["given"].endswith(" …")
    assert told["shown"][0]["left_out"] == 1


@pytest.mark.parametrize("text", ["", "short", "<" * 500, "🙂" * 300, "\x00" * 200, '"\\' * 99])
@pytest.mark.parametrize("most", [8, 50, 399])
def test_a_text_is_cut_by_its_bytes_in_the_page(text: str, most: int):
    cut = within(text, most)
    assert len(script_json(cut).encode()) <= most
    assert cut == text or (cut.endswith(" …") and text.startswith(cut.removesuffix(" …")))
    if cut != text:  # one more would not fit
        longer = text[: len(cut) - 1]
        assert len(script_json(f"{longer} …").encode()) > most


def test_all_samples_of_a_page_have_room_for_eight_adapters_and_for_a_hundred():
    assert sample_bytes(1) > sample_bytes(8) > 3000
    for adapters in (8, 50, 100):
        texts = adapters * MOST_STEPS * MOST_PROMPTS * 3
        assert texts * sample_bytes(adapters) <= 2_500_000


def test_a_version_has_the_time_at_which_its_step_began():
    rows = [metrics_row(step) for step in (1, 2, 3)]
    parts = ("waiting_seconds", "forward_seconds", "backward_seconds", "publish_seconds")
    for row in rows:
        row |= dict.fromkeys(parts, 1.5)
    rows[1]["forward_seconds"] = rows[1]["staleness_max"] = None
    told = publishes(rows)
    assert [told[step]["seconds"] for step in (1, 2, 3)] == [0.0, 6.0, 10.5]
    assert [told[step]["version"] for step in (1, 2, 3)] == [0, 1, 2]
    assert [told[step]["oldest"] for step in (1, 2, 3)] == [0, None, 1]
    assert publishes([{"step": 1, "loss": 2.0, "seconds": 1.0}]) == {}
    json.dumps(told)
