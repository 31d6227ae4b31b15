"""A fault belongs to one adapter: typed errors as values, and neighbours that keep every bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from manylora.engine import Engine
from manylora.types import (
    AdamParams,
    AdapterExists,
    AdapterNotFound,
    AdapterSpec,
    DataError,
    Datum,
    DatumTooLong,
    ForwardBackward,
    ForwardBackwardResult,
    ManyloraError,
    NotFinite,
    Opening,
    OptimStep,
    OptimStepResult,
    Sample,
    SamplingParams,
    StepRefused,
)
from tests.laws.tenants import assert_same_state, must, perturb, random_data
from tests.models import VOCAB

pytestmark = pytest.mark.usefixtures("threads")
PARAMS = AdamParams(lr=1e-3, weight_decay=0.1, clip_norm=1.0)


def good(name: str, loss: str = "cross_entropy") -> ForwardBackward:
    data = random_data(np.random.default_rng(len(name)), 3, loss)
    return ForwardBackward(adapter=name, data=data, loss=loss)


def datum(length: int = 4, token: int = 1, target: int = 1, **inputs: float) -> Datum:
    arrays = {name: np.full(length, value) for name, value in (inputs or {"weights": 1.0}).items()}
    targets = np.full(length, target)
    return Datum(np.full(length, token), {"target_tokens": targets, **arrays})


def bad(*data: Datum, **settings: Any) -> Callable[[str], ForwardBackward]:
    """Good data, then `data`, unless `settings` bring their own."""

    def make(name: str) -> ForwardBackward:
        changes: dict[str, Any] = {"data": [*good(name).data, *data], **settings}
        return replace(good(name), **changes)

    return make


def several(target: int = 1, weight: float = 1.0) -> Datum:
    """Three targets, the last of which is `target`."""
    targets, weights = np.array([[1, 2, target]]), np.array([[1.0, 0.0, weight]])
    return Datum(np.array([1]), {"target_tokens": targets, "weights": weights})


def policy(
    loss: str, logprob: float, advantage: float, mask: float | None = None, **settings: Any
) -> Callable[[str], ForwardBackward]:
    inputs = {"logprobs": logprob, "advantages": advantage}
    if mask is not None:
        inputs["sequence_ratio_mask"] = mask
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2} if loss == "gspo" else {}
    return bad(data=[datum(**inputs)], loss=loss, **{"config": config, **settings})


nan = float("nan")
FAULTS: dict[str, tuple[Callable[[str], ForwardBackward], type[ManyloraError], list[str]]] = {
    "too long": (bad(datum(129)), DatumTooLong, ["datum 3", "129 tokens", "is 128"]),
    "unknown loss": (bad(loss="kl"), DataError, ["'kl'", "cross_entropy"]),
    "unknown setting": (bad(config={"beta": 1.0}), DataError, ["'beta'"]),
    "missing input": (bad(datum(advantages=1.0)), DataError, ["datum 3", "'weights'"]),
    "unknown input": (bad(datum(weights=1.0, extra=1.0)), DataError, ["datum 3", "'extra'"]),
    "token out of range": (bad(datum(token=VOCAB)), DataError, ["tokens", "0 … 159"]),
    "negative token": (bad(datum(token=-1)), DataError, ["tokens", "0 … 159"]),
    "target out of range": (bad(datum(target=VOCAB)), DataError, ["target_tokens", "0 … 159"]),
    "NaN weight": (bad(datum(weights=float("nan"))), DataError, ["datum 3", "'weights'", "nan"]),
    "infinite weight": (bad(datum(weights=float("inf"))), DataError, ["datum 3", "'weights'"]),
    "immense weight": (bad(datum(weights=3e38)), NotFinite, ["the loss is inf"]),
    "a sampler's NaN": (policy("ppo", nan, 1), DataError, ["datum 0", "'logprobs'", "nan"]),
    "ratio beyond bounds": (
        policy("importance_sampling", -200, -1),
        NotFinite,
        ["the loss is inf"],
    ),
    "ratio of a sequence": (policy("gspo", -200, -1, 1), NotFinite, ["the loss is inf"]),
    "empty mask": (policy("gspo", -1, 1, 0), DataError, ["datum 0", "'sequence_ratio_mask'"]),
    "setting not given": (
        policy("gspo", -1, 1, 1, config={}),
        DataError,
        ["'clip_low_threshold'", "no default"],
    ),
    "a setting's NaN": (policy("dro", -1, 1, config={"beta": nan}), DataError, ["'beta'", "nan"]),
    "several targets": (
        bad(loss="ppo", data=[several()]),
        DataError,
        ["datum 0", "needs the input 'logprobs'"],
    ),
    "several out of range": (bad(several(VOCAB)), DataError, ["target_tokens", "0 … 159"]),
    "several weights, one NaN": (bad(several(weight=nan)), DataError, ["datum 3", "nan at [0, 2]"]),
}


def crowd(tiny) -> Engine:
    engine = Engine(Opening(str(tiny("llama")), token_budget=64))
    for seed, name in enumerate(("victim", "left", "right")):
        engine.create(name, AdapterSpec(rank=3 + seed, seed=seed))
        perturb(engine, name)
    must(engine.forward_backward([good("victim"), good("left")]))
    must(engine.optim_step([OptimStep(adapter=n, params=PARAMS) for n in ("victim", "left")]))
    return engine


@pytest.fixture(scope="module")
def undisturbed(tiny) -> dict:
    """What the neighbours' next losses, steps and states are when nothing goes wrong."""
    engine = crowd(tiny)
    results = must(engine.forward_backward([good("left"), good("victim"), good("right", "ppo")]))
    steps = must(
        engine.optim_step([OptimStep(adapter=n, params=PARAMS) for n in ("left", "right")])
    )
    states = {name: engine.state(name) for name in ("left", "right")}
    return {"results": [results[0], results[2]], "steps": steps, "states": states}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_middle_of_a_batch(tiny, undisturbed: dict, fault: str):
    make, error_type, words = FAULTS[fault]
    engine = crowd(tiny)
    before = engine.state("victim")
    works = [good("left"), make("victim"), good("right", "ppo")]
    left, error, right = engine.forward_backward(works)
    assert type(error) is error_type
    assert all(word in str(error) for word in ["'victim'", *words]), str(error)
    steps = [OptimStep(adapter=n, params=PARAMS) for n in ("left", "victim", "right")]
    left_step, refused, right_step = engine.optim_step(steps)

    # The victim is as before; its step is refused by the fault's own words, once.
    assert isinstance(refused, StepRefused) and str(error) in str(refused)
    after = engine.state("victim")
    assert_same_state(replace(before, draws=after.draws), after)
    # The neighbours have lost no bit.
    for found, expected in zip((left, right), undisturbed["results"], strict=True):
        assert isinstance(found, ForwardBackwardResult)
        assert found.loss == expected.loss
        assert all(map(np.array_equal, found.logprobs, expected.logprobs))
    assert [left_step, right_step] == undisturbed["steps"]
    for name in ("left", "right"):
        assert_same_state(engine.state(name), undisturbed["states"][name])
    # And the victim trains on.
    must(engine.forward_backward([good("victim")]))
    (step,) = must(engine.optim_step([OptimStep(adapter="victim", params=PARAMS)]))
    assert step.step == before.step + 1


def test_one_bad_call_spoils_the_whole_step(tiny):
    """Gradients of good calls before and after it are dropped with it."""
    engine = crowd(tiny)
    before = engine.state("victim")
    must(engine.forward_backward([good("victim")]))
    engine.forward_backward([FAULTS["unknown loss"][0]("victim")])
    must(engine.forward_backward([good("victim")]))
    (refused,) = engine.optim_step([OptimStep(adapter="victim", params=PARAMS)])
    assert isinstance(refused, StepRefused)
    assert engine.state("victim").grad is None
    assert np.array_equal(engine.state("victim").weights, before.weights)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_forward_spoils_nothing(tiny, fault: str):
    make, error_type, _ = FAULTS[fault]
    engine = crowd(tiny)
    must(engine.forward_backward([good("victim")]))
    before = engine.state("victim")
    (error,) = engine.forward_backward([replace(make("victim"), backward=False)])
    assert type(error) is error_type
    assert before.grad is not None
    assert_same_state(before, engine.state("victim"))
    (step,) = must(engine.optim_step([OptimStep(adapter="victim", params=PARAMS)]))
    assert isinstance(step, OptimStepResult)


def test_a_forward_that_raises_spoils_nothing(tiny, monkeypatch: pytest.MonkeyPatch):
    engine = crowd(tiny)
    must(engine.forward_backward([good("left")]))

    def failing(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_run", failing)
        with pytest.raises(RuntimeError):
            engine.forward_backward([replace(good("left"), backward=False)])
    must(engine.optim_step([OptimStep(adapter="left", params=PARAMS)]))


def test_a_gradient_that_is_not_finite_is_dropped(tiny):
    """The loss may be finite where its gradient is not."""
    engine = crowd(tiny)
    before = engine.state("victim")
    must(engine.forward_backward([good("victim"), good("left")]))
    engine.adapters["victim"].require_grad()[7] = float("inf")
    error, fine = engine.optim_step(
        [OptimStep(adapter=n, params=PARAMS) for n in ("victim", "left")]
    )
    assert isinstance(error, NotFinite) and "'victim'" in str(error)
    assert isinstance(fine, OptimStepResult)
    after = engine.state("victim")
    assert_same_state(replace(before, draws=after.draws), after)


def test_names(tiny):
    engine = crowd(tiny)
    with pytest.raises(AdapterExists, match="'left' exists already"):
        engine.create("left", AdapterSpec())
    for outcome in (
        engine.forward_backward([good("nobody")])[0],
        engine.optim_step([OptimStep(adapter="nobody", params=PARAMS)])[0],
        engine.sample([Sample(adapter="nobody", prompts=[[1]])])[0],
    ):
        assert isinstance(outcome, AdapterNotFound)
        assert "'nobody'" in str(outcome)
    for call in (engine.unload, engine.state):
        with pytest.raises(AdapterNotFound, match="there are:"):
            call("nobody")


@pytest.mark.parametrize(
    ("prompt", "error_type"),
    [([], DataError), ([1] * 128, DatumTooLong), ([VOCAB], DataError), ([-1], DataError)],
)
def test_a_bad_prompt_fails_alone(tiny, prompt: list[int], error_type: type[ManyloraError]):
    engine = crowd(tiny)
    params = SamplingParams(max_tokens=3, stop=())
    fine = Sample(adapter="left", prompts=[[5, 6]], params=params)
    expected = must(engine.sample([fine]))[0]
    error, found = engine.sample([replace(fine, prompts=[[5], prompt]), fine])
    assert type(error) is error_type
    assert not isinstance(found, ManyloraError)
    assert found == expected


def test_nothing_to_do_is_no_fault(tiny):
    engine = crowd(tiny)
    assert engine.forward_backward([]) == engine.optim_step([]) == engine.sample([]) == []
    (empty,) = must(engine.forward_backward([replace(good("left"), data=[])]))
    assert (empty.logprobs, empty.loss) == ((), 0.0)
    (step,) = must(engine.optim_step([OptimStep(adapter="left", params=PARAMS)]))
    assert step.grad_norm == 0.0


def test_a_batch_that_raises_half_way_is_never_stepped(tiny, monkeypatch: pytest.MonkeyPatch):
    """Of the micro-batches before the fault, gradients have been added; half a step is none."""
    engine = crowd(tiny)
    before = {name: engine.state(name) for name in ("left", "right")}
    run, calls = engine._run, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    monkeypatch.setattr(engine, "_run", failing)
    engine.token_budget = 16
    with pytest.raises(RuntimeError):
        engine.forward_backward([good("left"), good("right")])
    assert engine.adapters["left"].require_grad().any()
    steps = [OptimStep(adapter=name, params=PARAMS) for name in before]
    for name, refused in zip(before, engine.optim_step(steps), strict=True):
        assert isinstance(refused, StepRefused) and "out of memory" in str(refused)
        after = engine.state(name)
        assert_same_state(replace(before[name], draws=after.draws), after)
    must(engine.forward_backward([good("left")]))
    must(engine.optim_step(steps[:1]))


def test_weights_that_ran_away_answer_nobody(tiny):
    """The adapter's own request fails; the base and its neighbour answer as before."""
    engine = Engine(Opening(str(tiny("llama"))))
    for name in ("lost", "sound"):
        engine.create(name, AdapterSpec(rank=2))
        perturb(engine, name)
    requests = [
        Sample(adapter=name, prompts=[[3, 4]], params=SamplingParams(max_tokens=3, stop=()))
        for name in ("lost", "sound", None)
    ]
    before = must(engine.sample(requests))
    engine.adapters["lost"].master_P.fill_(torch.nan)
    lost, *others = engine.sample(requests)
    assert isinstance(lost, NotFinite) and "'lost'" in str(lost)
    assert others == before[1:]


def test_a_saved_state_holds_the_refusal_and_no_refused_gradient(tiny):
    """An adapter that went and came back is refused as if it had stayed: once."""
    engine, steps = Engine(Opening(str(tiny("llama")))), [OptimStep(adapter="a", params=PARAMS)]
    engine.create("a", AdapterSpec(rank=2))
    must(engine.forward_backward([good("a")]))
    assert engine.state("a").grad is not None
    engine.forward_backward([bad(loss="kl")("a")])
    state = engine.state("a")
    assert state.grad is None
    engine.unload("a")
    engine.restore("a", state)
    assert_same_state(engine.state("a"), state)
    (refused,) = engine.optim_step(steps)
    assert isinstance(refused, StepRefused) and "'kl'" in str(refused)
    assert engine.state("a").poison is None
    must(engine.forward_backward([good("a")]))
    (step,) = must(engine.optim_step(steps))
    assert step.step == 1 and step.grad_norm > 0


def test_what_is_added_after_the_refusal_was_restored_is_dropped_with_it(tiny):
    engine, steps = Engine(Opening(str(tiny("llama")))), [OptimStep(adapter="a", params=PARAMS)]
    engine.create("a", AdapterSpec(rank=2))
    engine.forward_backward([bad(loss="kl")("a")])
    state = engine.state("a")
    engine.unload("a")
    engine.restore("a", state)
    must(engine.forward_backward([good("a")]))
    assert isinstance(engine.optim_step(steps)[0], StepRefused)
    (step,) = must(engine.optim_step(steps))
    assert step.grad_norm == 0.0
