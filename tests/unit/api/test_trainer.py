"""The Python API: the same numbers as the engine's verbs, in the order of the calls."""

from pathlib import Path

import numpy as np
import pytest
import torch

from manylora import Trainer
from manylora.engine import Engine
from manylora.types import (
    AdamParams,
    AdapterExists,
    AdapterNotFound,
    AdapterSpec,
    Cancelled,
    CheckpointMismatch,
    ConfigError,
    Datum,
    DatumTooLong,
    ForwardBackward,
    Opening,
    OptimStep,
    SamplingParams,
    Scoring,
    StepRefused,
    TargetError,
    TextFormat,
)
from tests.laws.tenants import must, random_data
from tests.threads import SESSION, under

pytestmark = pytest.mark.usefixtures("threads")
GREEDY = SamplingParams(max_tokens=5, stop=())


def batch(seed: int) -> list[Datum]:
    return random_data(np.random.default_rng(seed), 3)


@pytest.fixture
def trainer(tiny):
    with Trainer(tiny("llama"), token_budget=128) as trainer:
        yield trainer


def learn(handle, rounds: int = 3) -> list[tuple[float, float]]:
    futures = []
    for number in range(rounds):
        futures.append(
            (handle.forward_backward(batch(number)), handle.optim_step(lr=1e-2, clip_norm=1.0))
        )
    return [(f.result().loss, s.result().grad_norm) for f, s in futures]


def test_the_api_adds_nothing_of_its_own(trainer, tiny):
    found = learn(trainer.create("a", rank=4, seed=3))
    engine = Engine(Opening(str(tiny("llama")), token_budget=128))
    engine.create("a", AdapterSpec(rank=4, seed=3))
    for number, (loss, norm) in enumerate(found):
        (result,) = must(
            engine.forward_backward([ForwardBackward(adapter="a", data=batch(number))])
        )
        params = AdamParams(lr=1e-2, clip_norm=1.0)
        (step,) = must(engine.optim_step([OptimStep(adapter="a", params=params)]))
        assert (result.loss, step.grad_norm) == (loss, norm)


def test_forward_changes_nothing_and_agrees(trainer):
    adapter = trainer.create("a", rank=4)
    learn(adapter, 1)
    one, two = adapter.forward(batch(0)).result(), adapter.forward_backward(batch(0)).result()
    assert one.loss == two.loss
    assert all(map(np.array_equal, one.logprobs, two.logprobs))


def test_a_handle_describes_its_adapter(trainer):
    adapter = trainer.create("a.b-c_1", AdapterSpec(rank=2, targets=("q_proj",)))
    assert trainer.adapters == {"a.b-c_1": adapter}
    assert adapter.num_params == 3 * 2 * (64 + 64)
    assert repr(adapter) == "<adapter 'a.b-c_1': rank 2, 768 parameters>"
    assert trainer.context_length == 128 and trainer.tokenizer is None
    assert [s.leaf for s in trainer.sites][-1] == "lm_head"


def test_a_snapshot_is_taken_where_it_was_asked_for(trainer):
    """Before and after steps that were queued around it."""
    adapter = trainer.create("a", rank=4)
    learn(adapter, 2)
    snapshot = adapter.snapshot()
    at_snapshot = adapter.sample([[5], [6, 7]], GREEDY)
    for number in range(5):
        adapter.forward_backward(batch(number))
        adapter.optim_step(lr=0.1)
    later = snapshot.sample([[5], [6, 7]], GREEDY).result()
    assert later == at_snapshot.result()
    now = adapter.sample([[5], [6, 7]], GREEDY).result()
    assert [s.logprobs for s in now.sequences] != [s.logprobs for s in later.sequences]
    snapshot.drop().result()
    assert isinstance(snapshot.sample([[5]], GREEDY).exception(), AdapterNotFound)


def test_save_and_restore_go_on_to_the_bit(trainer, tmp_path: Path):
    adapter = trainer.create("a", rank=4, dropout=0.2)
    learn(adapter, 2)
    adapter.forward_backward(batch(9))  # pending, and saved as such
    adapter.save(tmp_path / "state", {"note": [1, "x"]}).result()
    expected = (adapter.optim_step(lr=1e-2).result(), learn(adapter))
    adapter.unload().result()
    again, client = trainer.restore("a", tmp_path / "state")
    assert client == {"note": [1, "x"]} and again.spec == adapter.spec
    assert (again.optim_step(lr=1e-2).result(), learn(again)) == expected
    with pytest.raises(CheckpointMismatch):
        trainer.restore("b", tmp_path / "state", spec=AdapterSpec(rank=5))


def test_exported_files_start_new_adapters(trainer, tmp_path: Path):
    adapter = trainer.create("a", rank=4, targets=("q_proj", "down_proj"))
    learn(adapter)
    expected = adapter.forward(batch(7)).result().loss
    adapter.export(tmp_path / "peft").result()
    warm = trainer.create("warm", init_from=tmp_path / "peft")
    assert warm.forward(batch(7)).result().loss == expected
    same = trainer.create("same", adapter.spec, init_from=tmp_path / "peft")
    assert same.spec == adapter.spec
    with pytest.raises(CheckpointMismatch, match="does not fit"):
        trainer.create("other", rank=8, init_from=tmp_path / "peft")
    adapter.export(tmp_path / "merged", merged=True).result()
    with Trainer(tmp_path / "merged") as merged:
        loss = merged.create("none").forward(batch(7)).result().loss
    assert loss == pytest.approx(expected, rel=1e-5)


def test_names_and_settings_are_checked_at_once(trainer):
    trainer.create("a")
    for name, settings, error in [
        ("a", {}, AdapterExists),
        ("a/b", {}, ConfigError),
        ("", {}, ConfigError),
        ("b", {"rank": 0}, ConfigError),
        ("b", {"targets": ("query",)}, TargetError),
    ]:
        with pytest.raises(error):
            trainer.create(name, **settings)
    with pytest.raises(ConfigError, match="not both"):
        trainer.create("b", AdapterSpec(), rank=3)
    assert list(trainer.adapters) == ["a"]


def test_a_failed_call_fails_its_future_and_the_next_step(trainer):
    adapter, other = trainer.create("a"), trainer.create("b")
    learn(adapter, 1)
    zeros = np.zeros(129, np.int64)
    failed = adapter.forward_backward([Datum(zeros, {"target_tokens": zeros, "weights": zeros})])
    refused, fine = adapter.optim_step(lr=1.0), other.optim_step(lr=1.0)
    assert isinstance(failed.exception(), DatumTooLong)
    assert isinstance(refused.exception(), StepRefused)
    assert fine.result().step == 1
    assert learn(adapter, 1)


def test_unloading_frees_the_name(trainer):
    adapter = trainer.create("a", rank=2)
    learn(adapter)
    adapter.unload().result()
    assert trainer.adapters == {}
    assert isinstance(adapter.forward(batch(0)).exception(), AdapterNotFound)
    assert trainer.create("a", rank=3).forward_backward(batch(0)).result()


def test_leaving_runs_what_is_queued(tiny):
    with Trainer(tiny("llama")) as trainer:
        adapter = trainer.create("a")
        futures = [adapter.forward_backward(batch(i)) for i in range(5)]
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(Cancelled):
        adapter.forward(batch(0))


def test_leaving_by_an_error_drops_what_waits(tiny):
    with pytest.raises(KeyError, match="mine"), Trainer(tiny("llama"), token_budget=8) as trainer:
        adapter = trainer.create("a")
        futures = [adapter.forward_backward(batch(i)) for i in range(50)]
        raise KeyError("mine")
    assert all(future.done() for future in futures)
    assert isinstance(futures[-1].exception(), Cancelled)


def test_threads_and_budget(tiny):
    with pytest.raises(ConfigError, match="token_budget is 0"):
        Trainer(tiny("llama"), token_budget=0)
    other = SESSION + 1
    with under(SESSION), Trainer(tiny("llama"), threads=other):
        assert torch.get_num_threads() == other


def test_a_step_waits_for_samples_of_the_living_weights(trainer):
    """What was asked before a step is answered by the weights before it, whatever runs when."""
    adapter, other = trainer.create("a", rank=4), trainer.create("b", rank=4)
    learn(adapter, 1)
    expected = adapter.sample([[5], [6, 7]], GREEDY).result()
    long = SamplingParams(max_tokens=100, stop=())
    asked = adapter.sample([[5]], long)
    steps = [learn_ahead(adapter, number) for number in range(3)]
    assert learn(other, 2)  # goes on meanwhile
    found = asked.result().sequences[0]
    assert found.tokens[:5] == expected.sequences[0].tokens
    assert found.logprobs[:5] == expected.sequences[0].logprobs
    assert [step.result().step for step in steps] == [2, 3, 4]


def learn_ahead(handle, number: int):
    handle.forward_backward(batch(number))
    return handle.optim_step(lr=1e-2)


def test_training_has_the_same_bits_while_others_sample(tiny):
    def train(busy: bool) -> list[tuple[float, float]]:
        with Trainer(tiny("llama"), token_budget=128) as trainer:
            adapter, other = trainer.create("a", rank=4), trainer.create("b", rank=8)
            sampled = [
                other.sample([[5] * n], SamplingParams(max_tokens=90, temperature=1.0, seed=n))
                for n in range(1, 9 if busy else 1)
            ]
            found = learn(adapter, 6)
            assert all(future.result() for future in sampled)
            return found

    assert train(busy=True) == train(busy=False)


def test_several_answers_scores_and_giving_up(trainer):
    adapter = trainer.create("a", rank=4)
    params = SamplingParams(max_tokens=5, temperature=1.0, stop=())
    wanted = Scoring(prompt=True, topk_sampled=2)
    for owner in (trainer, adapter, adapter.snapshot()):
        result = owner.sample([[5, 6], [7]], params, num_samples=3, scoring=wanted).result()
        assert len(result.sequences) == 6 and len({s.tokens for s in result.sequences}) > 1
        assert [len(s.logprobs) for s in result.prompts] == [2, 1]
        assert all(s.topk is not None and s.topk.tokens.shape == (5, 2) for s in result.sequences)
    endless = adapter.sample([[5]] * 200, SamplingParams(max_tokens=120, stop=()), num_samples=20)
    step = adapter.optim_step(lr=1e-2)
    assert endless.cancel()
    assert step.result(20).step == 1  # the lane goes on at once
    assert trainer._engine.decoding == 0


def test_an_adapter_s_answers_end_where_its_files_say(trainer, tmp_path: Path):
    one = trainer.create("a", rank=4)
    free = SamplingParams(max_tokens=5, stop=())
    answer = one.sample([[1, 2, 3]], free).result().sequences[0].tokens
    assert len(answer) == 5
    one.text_format = TextFormat((answer[1],), "{{ messages }}")
    state, folder = tmp_path / "step-1", tmp_path / "peft"
    one.save(state).result(), one.export(folder).result()
    restored, _ = trainer.restore("b", state)
    for handle in (one, restored, trainer.create("c", init_from=folder), restored.snapshot()):
        assert handle.text_format == one.text_format
        ended = handle.sample([[1, 2, 3]], SamplingParams(max_tokens=5)).result().sequences[0]
        assert ended.tokens == answer[: answer.index(answer[1]) + 1]
        assert ended.stop_reason == "stop"
        assert handle.sample([[1, 2, 3]], free).result().sequences[0].tokens == answer
