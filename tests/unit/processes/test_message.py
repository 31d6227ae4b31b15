"""What is read back from a message equals what was written."""

import math
import pickle
from typing import Any

import numpy as np
import pytest

from manylora import types
from manylora.lora.sites import Site
from manylora.processes.commands import Assignment, Hello, Vectors
from manylora.processes.message import EncodedMessage, decode


def there_and_back(value: Any) -> Any:
    message = EncodedMessage(value)
    payload = bytearray(message.size)
    message.write(payload)
    return decode(message.head, payload)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -(2**60), 1e-300, math.inf, "ä~=", [], [1, [2.5, None]], (1, (2,)), {},
        {"~": 1, "b": {"=": (2,)}}, {"order": 1, "kept": 2},
        Site("a.b", 3, 4, 0), types.AdapterSpec(targets=("q",), rank_pattern={"x": 2}),
        types.OptimStep(adapter="a", params=types.AdamParams(lr=2.0), seq=4),
        types.SampleResult((types.SampledSequence((1, 2), (-0.5, -1.0), "stop"),)),
        Hello(1, 2, 3, "here", 4, "abc"),
    ],
)  # fmt: skip
def test_plain_values_and_our_own_classes(value: Any) -> None:
    found = there_and_back(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", ["<i8", "<i4", "<f4", "<f8", "?", "|u1"])
@pytest.mark.parametrize("shape", [(0,), (5,), (3, 4), (2, 0, 3), ()])
def test_arrays_keep_their_bits(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 2, size=shape).astype(dtype)
    turned = values[..., ::-1] if shape else values
    first, second = there_and_back([values, {"other": turned}])
    for found, expected in (
        (first, values),
        (second["other"], values[..., ::-1] if shape else values),
    ):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
        assert found.flags.writeable


def test_nan_payloads_are_kept_in_arrays() -> None:
    odd = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)
    assert there_and_back(odd).tobytes() == odd.tobytes()


def test_a_datum_and_vectors() -> None:
    datum = types.causal_datum([1, 2, 3, 4], [0.0, 1.0, -1.0, 0.5])
    work = types.ForwardBackward(
        adapter="a", data=[datum], config={"beta": 0.1}, logprobs="trained", seq=2
    )
    found = there_and_back(work)
    assert (found.adapter, found.config, found.seq) == ("a", {"beta": 0.1}, 2)
    assert found.logprobs == "trained"
    for name, array in datum.loss_inputs.items():
        assert np.array_equal(found.data[0].loss_inputs[name], array)
    result = types.ForwardBackwardResult(
        (np.ones(1, np.float32), np.ones(0, np.float32)), 1.0, {}, (np.array([2]), np.zeros(0, int))
    )
    read = there_and_back(result).positions
    assert [one.tolist() for one in read] == [[2], []]
    assert there_and_back(types.ForwardBackwardResult((), 1.0)).positions is None
    vectors = Vectors(np.arange(3, dtype=np.float32), None, None, None, 2, 3, "why")
    other = there_and_back(vectors)
    assert np.array_equal(other.weights, vectors.weights)
    assert (other.exp_avg, other.step, other.poison) == (None, 2, "why")


def test_errors_keep_their_type_and_words() -> None:
    error = there_and_back(types.NotFinite("adapter 'a': the loss is nan"))
    assert type(error) is types.NotFinite
    assert str(error) == "adapter 'a': the loss is nan"


@pytest.mark.parametrize("value", [object(), b"bytes", {1: 2}, {"a": lambda: 0}, [pickle]])
def test_nothing_else_travels(value: Any) -> None:
    with pytest.raises(TypeError, match="message"):
        EncodedMessage(value)


@pytest.mark.parametrize(
    "head",
    [b"{}", b'{"~":"array","=":[0,"O",[1]]}', b'{"~":"os.system","=":[]}', b'{"~":"Datum"}', b"{",
     b'{"~":"array","=":[0,"<f4",[1000]]}', b'{"~":"Site","=":["too few"]}'],
)  # fmt: skip
def test_what_no_message_has_is_refused(head: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(head, bytearray(8))


def test_an_assignment_is_one_line() -> None:
    assignment = Assignment("unix:/x", "00" * 32, 2, "seedling")
    assert assignment.line().count(b"\n") == 1
    assert Assignment.parse(assignment.line()) == assignment
