"""From a run file's entry to batches, learning rates, and evaluation prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.config import AdapterEntry
from manylora.lora.sites import Site
from manylora.models.vocabulary import Vocabulary
from manylora.runs.course import refuse_unwritable
from manylora.runs.sft import SftCourse, mean_weights
from manylora.runs.sft_data import MAX_SAMPLES, prepare_sft
from manylora.types import DataError, DatumTooLong, Unsupported, causal_datum
from tests.unit.runs.driving.conftest import write_lines
from tests.unit.runs.driving.fake_client import FakeClient, FakeTokenizer


def prepared(
    tmp_path: Path, rows: list[Any], client: FakeClient | None = None, **sft: Any
) -> SftCourse:
    data = write_lines(tmp_path / "rows.jsonl", rows)
    entry = AdapterEntry.model_validate(
        {"name": "a", "sft": {"train": str(data), "eval": str(data), "batch_size": 2, **sft}}
    )
    return prepare_sft(entry, client or FakeClient(), lambda *_: None)


ROWS = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(5)]


def test_batches_are_a_pure_function_of_the_step(tmp_path: Path):
    first, second = prepared(tmp_path, ROWS, epochs=2), prepared(tmp_path, ROWS, epochs=2)
    assert first.steps == 6
    for step in (6, 1, 3):
        for one, other in zip(first.batch(step), second.batch(step), strict=True):
            assert np.array_equal(one.tokens, other.tokens)
    epoch = [d.tokens.tobytes() for step in (1, 2, 3) for d in first.batch(step)]
    assert len(set(epoch)) == 5


def test_the_learning_rate_begins_at_the_first_step_and_moves_in_the_last(tmp_path: Path):
    run = prepared(tmp_path, ROWS, epochs=2)
    rates = [run.adam(step).lr for step in range(1, 7)]
    assert rates[0] == 2e-4 and rates[-1] > 0 and rates == sorted(rates, reverse=True)


def test_evaluation_prompts_are_cut_out_of_what_is_trained(tmp_path: Path):
    evals = prepared(tmp_path, ROWS).evals
    assert [p.expected for p in evals.prompts] == [f"answer {i}" for i in range(5)]
    assert bytes(evals.prompts[3].tokens).decode() == "q3" == evals.prompts[3].text
    assert evals.max_tokens == len("answer 0") + 1 + 8


def test_samples_are_capped_and_the_loss_is_not(tmp_path: Path):
    rows = [{"prompt": "q", "completion": str(i)} for i in range(MAX_SAMPLES + 9)]
    evals = prepared(tmp_path, rows).evals
    assert len(evals.prompts) == MAX_SAMPLES and len(evals.data) == MAX_SAMPLES + 9


def test_text_has_a_loss_but_no_prompt(tmp_path: Path):
    evals = prepared(tmp_path, [{"text": "all of it"}]).evals
    assert len(evals.data) == 1 and not evals.prompts


def test_an_example_that_does_not_fit_is_named_before_the_first_step(tmp_path: Path):
    rows = [*ROWS, {"prompt": "x" * 60, "completion": "long"}]
    prepared(tmp_path, rows, FakeClient(context_length=64))
    with pytest.raises(DatumTooLong, match=r"rows\.jsonl:6: has 65 tokens.*holds 63"):
        prepared(tmp_path, rows, FakeClient(context_length=63))


def test_weights_of_a_batch_sum_to_one():
    batch = [causal_datum([1, 2, 3], [0, 1, 1]), causal_datum([4, 5], [0, 1])]
    scaled, trained = mean_weights(batch)
    assert trained == 3
    assert sum(float(d.loss_inputs["weights"].sum()) for d in scaled) == pytest.approx(1)
    assert batch[0].loss_inputs["weights"].tolist() == [1, 1]  # the data are not touched


def test_a_batch_without_anything_to_learn_is_refused():
    with pytest.raises(DataError, match="no token to train on"):
        mean_weights([causal_datum([1, 2], [0, 0])])


class ChatTokenizer(FakeTokenizer):
    """`<role|content|>`, and an answer begins with a thought that is not in the data."""

    all_special_ids = (ord("|"),)
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012 - as the library has it
    chat_template = "given by apply_chat_template"

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        thought = {"assistant": "hm."}
        text = "".join(f"<{t['role']}:{thought.get(t['role'], '')}{t['content']}|" for t in turns)
        return text + ("<assistant:" if add_generation_prompt else "")


def test_a_conversation_is_asked_for_its_last_answer(tmp_path: Path):
    turns = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "22")]
    client = FakeClient(context_length=99)
    client.tokenizer = ChatTokenizer()
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    (prompt,) = prepared(tmp_path, rows, client).evals.prompts
    asked = "<user:one?|<assistant:hm.1|<user:two?|<assistant:"
    assert bytes(prompt.tokens).decode() == asked
    assert prompt.text == "user: one?\nassistant: 1\nuser: two?"
    assert prompt.expected == "hm.22|"


def test_what_ends_an_answer_is_recorded_and_disagreement_told(tmp_path: Path):
    client = FakeClient()
    client.vocabulary = Vocabulary(128, (7, 9), "generation_config.json")
    run = prepared(tmp_path, ROWS, client)
    assert run.text_format.stop == run.evals.stop == (0, 7, 9)
    (note,) = run.notes
    assert "tokenizer_config.json" in note and "generation_config.json" in note
    assert "sft.eos" in note
    chosen = prepared(tmp_path, ROWS, client, eos="~")
    assert chosen.text_format.stop == (0, 7, 9, ord("~")) and chosen.notes == []
    assert chosen.batch(1)[0].loss_inputs["target_tokens"][-1] == ord("~")


def test_a_base_s_own_end_serves_a_tokenizer_without_one(tmp_path: Path):
    client = FakeClient()
    client.tokenizer.eos_token_id = None
    client.vocabulary = Vocabulary(128, (9,), "config.json")
    run = prepared(tmp_path, ROWS, client)
    assert run.text_format.stop == (9,) and run.notes == []
    client.vocabulary = Vocabulary(128, (), "")
    with pytest.raises(DataError, match=r"no end-of-sequence token.*name one with sft\.eos"):
        prepared(tmp_path, ROWS, client)


def test_layers_that_could_not_be_written_at_the_end_are_refused_at_the_start(tmp_path: Path):
    client = FakeClient()
    client.sites = (Site("layers.0.up", 4, 4, 0, naming="lost"), Site("layers.0.down", 4, 4, 1))
    with pytest.raises(Unsupported, match=r"adapter 'a'.*layers\.0\.up under.*leave these"):
        prepared(tmp_path, [{"text": "abc"}], client)
    entry = {"name": "a", "lora": {"targets": ["down"]}, "sft": {"train": "rows.jsonl"}}
    refuse_unwritable(AdapterEntry.model_validate(entry), client.sites)
