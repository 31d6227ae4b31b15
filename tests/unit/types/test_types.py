"""Settings and data refuse what makes no sense, and say why."""

import numpy as np
import pytest

from manylora import types
from manylora.types import (
    AdamParams,
    AdapterNotFound,
    AdapterSpec,
    ConfigError,
    DataError,
    Datum,
    ForwardBackward,
    ManyloraError,
    Sample,
    SamplingParams,
    SaveFailed,
    causal_datum,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a whole number ≥ 1"),
        ({"rank": True}, "rank is True"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be a finite number > 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "alpha_pattern['q_proj'] is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0; it must lie in [0, 1)"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose fp32, bf16 or fp16"),
        ({"init": "zero"}, "init is 'zero'; choose kaiming or gaussian"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_adapter_settings(settings: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        AdapterSpec(**settings)
    assert message in str(caught.value)


def test_scale():
    assert AdapterSpec().scale(8, 16.0) == 2.0
    assert AdapterSpec(use_rslora=True).scale(16, 16.0) == 4.0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"lr": 1.0, "beta1": 1.0}, "beta1"),
        ({"lr": 1.0, "beta2": -0.1}, "beta2"),
        ({"lr": 1.0, "eps": -1e-8}, "eps"),
        ({"lr": 1.0, "weight_decay": float("nan")}, "weight_decay"),
        ({"lr": 1.0, "clip_norm": -1.0}, "clip_norm"),
    ],
)
def test_optimizer_settings(settings: dict, name: str):
    with pytest.raises(ConfigError, match=f"^{name} is "):
        AdamParams(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_sampling_settings(settings: dict):
    with pytest.raises(DataError, match=f"^{next(iter(settings))} is "):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("tokens", "inputs", "message"),
    [
        ([], {}, "non-empty"),
        ([[1]], {}, "one-dimensional"),
        ([1.5], {}, "integer array"),
        ([1], {}, "'target_tokens' is missing"),
        ([1, 2], {"target_tokens": [1]}, "'target_tokens' has shape (1,); tokens have (2,)"),
        ([1, 2], {"target_tokens": [1, 2], "weights": 1.0}, "'weights' has shape"),
        ([1, 2], {"target_tokens": [1.0, 2.0]}, "'target_tokens' holds float64, not whole numbers"),
        ([1], {"target_tokens": [1], "weights": ["1"]}, "'weights' holds <U1, not numbers"),
        (
            [1, 2],
            {"target_tokens": [[1, 2], [3, 4]], "weights": [1.0, 1.0]},
            "'weights' has shape (2,); 'target_tokens' has (2, 2)",
        ),
        (
            [1, 2],
            {"target_tokens": [1, 2], "weights": [[1.0], [1.0]]},
            "'weights' has shape (2, 1); 'target_tokens' has (2,)",
        ),
        ([1, 2], {"target_tokens": [[1, 2]]}, "'target_tokens' has shape (1, 2); tokens have (2,)"),
        ([1], {"target_tokens": [[[1]]]}, "'target_tokens' has shape (1, 1, 1)"),
        ([1], {"target_tokens": [[]]}, "has shape (1, 0); a position has 1 to 1024 targets"),
        ([1], {"target_tokens": [[1] * 1025]}, "has shape (1, 1025); a position has 1 to 1024"),
        ([1, 2], {"target_tokens": [1, 2], "advantages": [[1.0], [1.0]]}, "'advantages' has shape"),
    ],
)
def test_data(tokens: list, inputs: dict, message: str):
    with pytest.raises(DataError) as caught:
        Datum(np.array(tokens), {name: np.array(value) for name, value in inputs.items()})
    assert message in str(caught.value)


def test_data_are_converted_once():
    given = {"target_tokens": np.array([2, 3], np.uint8), "weights": np.array([1, 0])}
    datum = Datum(np.array([1, 2], np.int32), given)
    assert datum.tokens.dtype == datum.loss_inputs["target_tokens"].dtype == np.int64
    assert datum.loss_inputs["weights"].dtype == np.float32
    assert len(datum) == 2


def test_several_targets():
    targets = np.array([[2, 3, 3], [4, 5, 0]], np.int32)
    datum = Datum(np.array([1, 2]), {"target_tokens": targets, "weights": -np.ones((2, 3))})
    assert (len(datum), datum.num_targets) == (2, 3)
    assert datum.loss_inputs["target_tokens"].dtype == np.int64
    assert datum.loss_inputs["weights"].dtype == np.float32
    assert causal_datum([1, 2], [1.0, 1.0]).num_targets == 1


def test_causal_datum_shifts_by_one():
    datum = causal_datum([5, 6, 7], [9.0, 0.0, 1.0])
    assert datum.tokens.tolist() == [5, 6]
    assert datum.loss_inputs["target_tokens"].tolist() == [6, 7]
    assert datum.loss_inputs["weights"].tolist() == [0.0, 1.0]
    for tokens, weights in (([5], [1.0]), ([5, 6], [1.0])):
        with pytest.raises(DataError, match="two tokens or more and one weight each"):
            causal_datum(tokens, weights)


def test_operations_know_their_tokens():
    data = [causal_datum([1, 2, 3], [1.0] * 3), causal_datum([1, 2], [1.0] * 2)]
    assert ForwardBackward(adapter="a", data=data).num_tokens == 3
    params = SamplingParams(max_tokens=10)
    assert Sample(adapter=None, prompts=[[1, 2], [3]], params=params).num_tokens == 23


def test_every_error_is_one_of_ours_and_prints_its_message():
    errors = [e for e in vars(types).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) > 10
    for error in errors:
        assert issubclass(error, ManyloraError)
        assert str(error("what is wrong")) == "what is wrong"
    assert issubclass(AdapterNotFound, KeyError)
    assert issubclass(SaveFailed, OSError)
