"""What was sampled is read again: in order, whole, as the text that it was."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from manylora.models.base import resolve_base
from manylora.runs.rl.kept_rollouts import (
    groups_of,
    is_silent,
    kept_steps,
    ranked,
    rows_of,
    samples_of,
)
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.rollout_record import RolloutRecord
from manylora.runs.rl.token_texts import TokenTexts, texts_of
from manylora.runs.run_folder import RunPaths
from manylora.types import DataError
from tests.unit.runs.sampled_run import WordTokenizer, group, rollout, segment, write_step

TEXTS = TokenTexts(WordTokenizer())


def test_what_a_record_wrote_is_read(tmp_path: Path):
    plain = group(3, 0, 17, [rollout(0.5, segment([1, 2], [4, 5, 6], 2)), rollout(1.0)])
    advantages = plain.pop("advantages")
    written = SampleGroup.of_json(plain)
    record = RolloutRecord(tmp_path, None, 0)
    record.write_step(3, [{**written.to_json(), "advantages": advantages}])
    record.close()
    assert kept_steps(tmp_path) == [3] and rows_of(tmp_path, 3) == [17]
    best, worst = ranked(samples_of(groups_of(tmp_path, 3)))
    assert (best.reward, best.number, best.advantage) == (1.0, 1, 0.25)
    assert (worst.num_sampled, worst.versions) == (3, (2, 2))
    assert best.prompt(TEXTS) == "Ask me"
    assert [(drawn, start, stop) for _, drawn, start, stop in best.spans()] == [(True, 2, 5)]


def test_steps_are_in_order_and_other_files_are_none(tmp_path: Path):
    for step in (10, 9, 100):
        write_step(tmp_path, step, [group(step, 0, 1, [rollout(1.0)])])
    for name in ("pending.jsonl", "step-x.jsonl.gz", ".step-3.jsonl.gz.tmp"):
        (tmp_path / name).write_text("")
    assert kept_steps(tmp_path) == [9, 10, 100]
    assert kept_steps(tmp_path / "nowhere") == [] and groups_of(tmp_path, 8) == []


def test_equals_stay_in_order_and_a_group_of_one_reward_is_silent():
    groups = [
        group(1, 0, 5, [rollout(0.5), rollout(0.5)]),
        group(1, 1, 6, [rollout(0.5), rollout(0.75)]),
        group(1, 2, 7, []),
    ]
    found = [(sample.group["row"], sample.number) for sample in ranked(samples_of(groups))]
    assert found == [(6, 1), (5, 0), (5, 1), (6, 0)]
    assert [is_silent(one) for one in groups] == [True, False, True]


def test_turns_are_told_apart_and_a_second_segment_has_its_own_prompt():
    talk = segment([1, 2], [4, 5])
    later = segment([8], [5, 6])
    first = {name: talk[name] + later[name] for name in ("tokens", "logprobs", "versions")}
    first["sampled"] = [2, 3, 5, 6]
    (sample,) = samples_of([group(1, 0, 0, [rollout(1.0, first, segment([1, 3], [6]))])])
    told = [
        (drawn, TEXTS.whole(of["tokens"][start:stop])) for of, drawn, start, stop in sample.spans()
    ]
    assert told == [
        (True, "Well, yes"),
        (False, " tool:7"),
        (True, ", yes<end>"),
        (False, "Ask more"),
        (True, "<end>"),
    ]
    assert sample.prompt(TEXTS) == "Ask me"


@pytest.mark.parametrize("damage", ["cut", "text", "json"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str):
    write_step(tmp_path, 4, [group(4, n, n, [rollout(0.1 * n)] * 4) for n in range(9)])
    path = tmp_path / "step-4.jsonl.gz"
    data = path.read_bytes()
    if damage == "json":
        path.write_bytes(gzip.compress(b'{"step": 4, '))
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no gzip at all")
    with pytest.raises(DataError, match=r"step-4\.jsonl\.gz is damaged"):
        groups_of(tmp_path, 4)
    assert set(rows_of(tmp_path, 4)) <= set(range(9))


# --- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["green: five", "naïve 日本 🙂🙂 end", " two  blanks \n\t", "🙂"])
def test_pieces_make_the_whole_text(text: str):
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_base("seedling"))
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(text)
    pieces = texts.pieces(ids, 0, len(ids))
    assert "".join(pieces) == texts.whole(ids) == text and len(pieces) == len(ids)
    for start in range(1, len(ids)):
        before = texts.whole(ids[:start])
        if not before.endswith("\N{REPLACEMENT CHARACTER}"):
            assert before + "".join(texts.pieces(ids, start, len(ids))) == text


def test_bytes_that_are_no_character_do_not_swallow_what_follows():
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_base("seedling"))
    texts = TokenTexts(tokenizer)
    smile = tokenizer.encode("🙂")
    assert len(smile) > 1
    ids = [*smile[:1] * 9, *tokenizer.encode("well")]
    pieces = texts.pieces(ids, 0, len(ids))
    assert len(pieces) == len(ids) and "".join(pieces).endswith("well")
    # Nor do they wait for it: four bytes at most make a character.
    assert [piece for piece in pieces[:4] if "\N{REPLACEMENT CHARACTER}" in piece]


class Stripping(WordTokenizer):
    """Loses the blank before a text, as tokenizers do that mark the begin of words."""

    def decode(self, ids: object, *, skip_special_tokens: bool) -> str:
        return super().decode(ids, skip_special_tokens=skip_special_tokens).removeprefix(" ")  # type: ignore[arg-type]


def test_the_blank_before_a_word_is_its_own():
    texts = TokenTexts(Stripping())
    assert texts.pieces([1, 2, 3], 0, 3) == ["Ask", " me", " more"]
    assert texts.pieces([1, 2, 3], 1, 3) == [" me", " more"]


def test_without_a_tokenizer_there_are_ids(tmp_path: Path):
    for content in (None, "- nothing", "base: {a: 1", f"base: {tmp_path}"):
        if content is not None:
            (tmp_path / "run.yaml").write_text(content)
        texts = texts_of(RunPaths(tmp_path))
        assert texts.whole([4, 17]) == "4 17" and texts.pieces([4, 17], 1, 2) == ["17 "]
