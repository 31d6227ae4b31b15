"""forward_backward bytes ↔ types: against struct, one element at a time, and against the SDK."""

import contextlib
import itertools
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.codec import (
    adam_params,
    datum_arrays,
    decode_forward_backward,
    digest_json,
    digest_message,
    encode_forward_backward,
)
from manylora.service.wire.messages import OptimStepRequest, SaveWeightsRequest, WireAdamParams
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import ConfigError, DataError, ForwardBackwardResult, ManyloraError, Unsupported
from tests.unit.service.bodies import datum, dense, plain_datum, request, slow_csr, sparse, tokens

LIMITS = WireLimits()


def decode(message: pb.ForwardBackwardRequest, limits: WireLimits = LIMITS):
    return decode_forward_backward(message.SerializeToString(), limits)


def arrays(message: pb.Datum):
    tokens_N, inputs, _ = datum_arrays(message, 0, LIMITS, LIMITS.cells)
    return tokens_N, inputs


# --- what is read -----------------------------------------------------------------------------


def test_a_request_is_read_whole():
    first = datum(
        [tokens(5, 6), tokens(7)],
        {
            "target_tokens": dense([6, 7, 8]),
            "logprobs": dense([-0.5, -1.0, -2.0]),
            "advantages": dense([1.0, -1.0, 0.0]),
        },
    )
    submit = decode(
        request(
            [first, plain_datum(2)],
            model_id="abc:train:3",
            seq_id=2**31 - 1,
            loss="ppo",
            forward_only=True,
            loss_fn_config={"clip_low_threshold": 0.7},
        )
    )
    assert (submit.model_id, submit.seq_id) == ("abc:train:3", 2**31 - 1)
    assert (submit.loss, submit.config) == ("ppo", {"clip_low_threshold": 0.7})
    assert submit.forward_only
    assert submit.num_tokens == 5
    assert submit.data[0].tokens.tolist() == [5, 6, 7]
    assert submit.data[0].loss_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert submit.data[0].loss_inputs["advantages"].dtype == np.float32
    assert submit.data[0].loss_inputs["logprobs"].tolist() == [-0.5, -1.0, -2.0]
    assert submit.data[1].tokens.tolist() == [1, 2]


def test_arrays_have_their_own_memory():
    """A view would keep the whole body alive, and torch warns of memory that it may not write."""
    submit = decode(request())
    for array in (submit.data[0].tokens, *submit.data[0].loss_inputs.values()):
        assert array.flags.writeable


def test_the_newer_settings_win():
    message = request(loss="ppo", loss_fn_config={"clip_low_threshold": 0.1})
    message.loss_fn_config_v2["clip_low_threshold"].number = 0.9
    assert decode(message).config == {"clip_low_threshold": 0.9}


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (pb.DTYPE_FLOAT32, [1.5, -0.25, 3e38]),
        (pb.DTYPE_INT64, [1, -1, 2**40]),
        (pb.DTYPE_INT32, [1, -1, 2**31 - 1]),
        (pb.DTYPE_BFLOAT16, [1.5, -2.0, 0.15625]),
    ],
)
def test_every_dtype(dtype, values):
    _, inputs = arrays(datum([tokens(1, 2, 3)], {"weights": dense(values, dtype)}))
    assert inputs["weights"].tolist() == [
        struct.unpack("<f", struct.pack("<f", v))[0] if isinstance(v, float) else v for v in values
    ]


def test_a_tensor_without_a_shape_is_one_dimensional():
    tensor = dense([1.0, 2.0, 3.0])
    tensor.ClearField("shape")
    _, inputs = arrays(datum([tokens(1, 2, 3)], {"weights": tensor}))
    assert inputs["weights"].shape == (3,)


@st.composite
def csr_matrices(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    crow, col = [0], []
    for _ in range(rows):
        listed = sorted(draw(st.sets(st.integers(0, columns - 1))))
        col += listed
        crow.append(len(col))
    numbers = st.floats(-4, 4, width=32)
    values = draw(st.lists(numbers, min_size=len(col), max_size=len(col)))
    return (rows, columns), crow, col, values


@settings(max_examples=60, deadline=None)
@given(csr_matrices())
def test_sparse_tensors_are_what_they_list(matrix):
    shape, crow, col, values = matrix
    message = datum([tokens(*range(shape[0]))], {"weights": sparse(shape, crow, col, values)})
    _, inputs = arrays(message)
    assert inputs["weights"].tolist() == slow_csr(shape, crow, col, values)


def test_dense_matrices_keep_their_rows():
    matrix = np.arange(6).reshape(3, 2)
    _, inputs = arrays(datum([tokens(1, 2, 3)], {"target_tokens": dense(matrix)}))
    assert inputs["target_tokens"].tolist() == matrix.tolist()
    assert inputs["target_tokens"].dtype == np.int64


# --- what is refused --------------------------------------------------------------------------


def with_input(tensor: pb.Tensor, name: str = "weights") -> pb.ForwardBackwardRequest:
    inputs = {"target_tokens": dense([1, 2, 3]), "weights": dense([1.0, 1.0, 1.0])}
    return request([datum([tokens(1, 2, 3)], {**inputs, name: tensor})])


def raw(data: bytes, dtype: str = "DTYPE_FLOAT32", shape: tuple[int, ...] = (3,)) -> pb.Tensor:
    return pb.Tensor(dense=data, dtype=dtype, shape=shape)


FULL = ((3, 2), [0, 1, 2, 3], [0, 1, 0], [1.0, 2.0, 3.0])

BAD_TENSORS = {
    "short": raw(b"\0" * 8),
    "half an element": raw(b"\0" * 11),
    "of another length": dense([1.0, 2.0]),
    "of no dtype": raw(b"\0" * 12, "DTYPE_UNSPECIFIED"),
    "empty": pb.Tensor(dtype="DTYPE_FLOAT32", shape=[3]),
    "cube": raw(b"\0" * 12, shape=(3, 1, 1)),
    "negative": raw(b"", shape=(-3,)),
    "no columns": raw(b"", shape=(3, 0)),
    "negative columns": raw(b"\0" * 12, shape=(3, -1)),
    "too wide": raw(b"", shape=(3, 2**40)),
    "sparse and flat": sparse((3,), *FULL[1:]),
    "crow short": sparse(FULL[0], [0, 1, 3], *FULL[2:]),
    "crow falls": sparse(FULL[0], [0, 2, 1, 3], *FULL[2:]),
    "crow starts late": sparse(FULL[0], [1, 1, 2, 3], *FULL[2:]),
    "crow ends early": sparse(FULL[0], [0, 1, 2, 2], *FULL[2:]),
    # Each difference, as int64, is positive.
    "crow wraps": sparse(FULL[0], [0, 2**63 - 1, -2, 3], *FULL[2:]),
    "col outside": sparse(FULL[0], FULL[1], [0, 2, 0], FULL[3]),
    "col negative": sparse(FULL[0], FULL[1], [0, -1, 0], FULL[3]),
    "col short": sparse(FULL[0], FULL[1], [0, 1], FULL[3]),
    "col twice": sparse((3, 2), [0, 2, 2, 3], [1, 1, 0], FULL[3]),
    "bomb": sparse((3, 2**62), FULL[1], FULL[2], FULL[3]),
}


@pytest.mark.parametrize("tensor", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_a_tensor_that_does_not_fit_is_refused_by_name(tensor):
    with pytest.raises(ManyloraError, match=r"data\[0\], loss input 'weights'"):
        decode(with_input(tensor))


def test_target_tokens_are_whole_numbers():
    with pytest.raises(DataError, match="whole numbers"):
        decode(with_input(dense([1.0, 2.0, 3.0]), "target_tokens"))


@pytest.mark.parametrize("name", ["stable_reinforce", "custom"])
def test_losses_that_are_known_and_not_served_are_refused_by_name(name):
    with pytest.raises(Unsupported, match=name):
        decode(request(loss=name))


def test_provenance_is_taken_and_not_read():
    """The recipes send it with every loss; only `stable_reinforce` would read it."""
    message, plain = plain_datum(), plain_datum()
    for spans in (message.model_input_spans, message.loss_fn_input_spans):
        spans.add()
    told, untold = (decode(request([one])).data[0] for one in (message, plain))
    assert np.array_equal(told.tokens, untold.tokens)
    assert told.loss_inputs.keys() == untold.loss_inputs.keys()


@pytest.mark.parametrize("kind", ["image", "dmel"])
def test_chunks_that_are_no_tokens_are_refused_by_name(kind):
    message = plain_datum()
    getattr(message.model_input.add(), kind).SetInParent()
    with pytest.raises(Unsupported, match=kind):
        decode(request([message]))


def test_settings_that_are_texts_are_refused_by_name():
    message = request()
    message.loss_fn_config_v2["mode"].text = "fast"
    with pytest.raises(Unsupported, match="'mode'"):
        decode(message)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_settings_are_finite(value):
    with pytest.raises(DataError, match="'beta'"):
        decode(request(loss_fn_config={"beta": value}))


@pytest.mark.parametrize(
    "message",
    [
        request(model_id=""),
        request(model_id="a/b"),
        request(model_id="a" * 257),
        request(seq_id=0),
        request(seq_id=-1),
        request(loss=""),
        request(loss="x" * 65),
        request([]),
        request([datum([], {"target_tokens": dense([1])})]),
        request([datum([pb.Chunk()], {"target_tokens": dense([1])})]),
        request([datum([tokens(1)], {})]),
    ],
)
def test_a_request_without_its_essentials_is_refused(message):
    with pytest.raises(DataError):
        decode(message)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_a_user_error(body):
    with pytest.raises(ManyloraError):
        decode_forward_backward(body, LIMITS)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_body_is_read_or_refused(place, byte, cut):
    whole = decode_bytes()
    place %= len(whole)
    body = whole[:place] if cut else whole[:place] + bytes([byte]) + whole[place + 1 :]
    with contextlib.suppress(ManyloraError):
        decode_forward_backward(body, LIMITS)


def decode_bytes() -> bytes:
    listed = sparse((3, 1), [0, 1, 1, 2], [0, 0], [1.0, 2.0])
    second = datum([tokens(1, 2, 3)], {"target_tokens": dense([1, 2, 3]), "weights": listed})
    return request([plain_datum(), second], loss_fn_config={"beta": 1.0}).SerializeToString()


# --- answers ----------------------------------------------------------------------------------


def slow_read(body: bytes) -> tuple[list[list[float]], list[list[int]], dict[str, float]]:
    """An answer's arrays by their byte offsets, flat, and the trailing shape of each."""
    output = pb.ForwardBackwardOutput.FromString(body)
    flat, trailing = [], []
    for record in output.loss_fn_outputs:
        field = record.fields["logprobs"]
        count = len(field.offsets) // 8
        offsets = struct.unpack(f"<{count}q", field.offsets)
        assert record.num_datums == count - 1
        for start, end in itertools.pairwise(offsets):
            flat.append(list(struct.unpack(f"<{(end - start) // 4}f", field.data[start:end])))
            trailing.append(list(field.trailing_shape))
    return flat, trailing, dict(output.metrics)


def test_an_answer_holds_every_number_in_order():
    results = (
        np.array([-1.0, -2.0], np.float32),
        np.array([-3.0], np.float32),
        np.array([[-4.0, -5.0], [-6.0, -7.0]], np.float32),
        np.array([[-8.0]], np.float32),
        np.array([-9.0], np.float32),
    )
    body = encode_forward_backward(ForwardBackwardResult(results, 2.5, {"entropy:mean": 0.5}))
    flat, trailing, metrics = slow_read(body)
    assert flat == [array.reshape(-1).tolist() for array in results]
    assert trailing == [[], [], [2], [1], []]
    assert metrics == {"loss:sum": 2.5, "entropy:mean": 0.5}


@pytest.mark.parametrize("name", ["loss", "a:b:c"])
def test_a_metric_that_the_sdk_would_choke_on_is_our_own_mistake(name):
    with pytest.raises(ValueError, match=name):
        encode_forward_backward(ForwardBackwardResult((), 0.0, {name: 1.0}))


# --- digests and settings ---------------------------------------------------------------------


def test_digests_are_equal_for_equal_content():
    one, two = request(), request()
    for name in ("a", "b", "c"):
        one.loss_fn_config[name] = 1.0
    for name in ("c", "b", "a"):
        two.loss_fn_config[name] = 1.0
    assert digest_message(one) == digest_message(two)
    assert decode(one).digest == digest_message(two)
    # The same fields in another order on the wire.
    head = pb.ForwardBackwardRequest(model_id="m").SerializeToString()
    tail = pb.ForwardBackwardRequest(seq_id=4).SerializeToString()

    def digest(body: bytes) -> str:
        return digest_message(pb.ForwardBackwardRequest.FromString(body))

    assert digest(head + tail) == digest(tail + head)
    assert digest(head) != digest(head + tail)


def test_digests_of_json_forget_order_blanks_and_defaults():
    one = SaveWeightsRequest.model_validate_json(
        '{"model_id":"m","seq_id":1,"path":"p","user_metadata":{"a":"1","b":"2"}}'
    )
    two = SaveWeightsRequest.model_validate_json(
        '{"user_metadata": {"b": "2", "a": "1"}, "overwrite": false,'
        ' "path": "p", "seq_id": 1, "model_id": "m", "new_field": 3}'
    )
    three = two.model_copy(update={"path": "q"})
    assert digest_json(one) == digest_json(two) != digest_json(three)


def test_adam_settings_keep_the_protocols_defaults():
    params = adam_params(WireAdamParams())
    assert (params.lr, params.beta1, params.beta2) == (0.0001, 0.9, 0.95)
    assert (params.eps, params.weight_decay, params.clip_norm) == (1e-12, 0.0, 0.0)
    with pytest.raises(ConfigError, match="beta1"):
        adam_params(WireAdamParams(beta1=1.0))
    message = OptimStepRequest.model_validate_json(
        '{"model_id":"m","seq_id":2,"adam_params":{"learning_rate":1,"grad_clip_norm":0.5}}'
    )
    assert message.adam_params is not None
    assert adam_params(message.adam_params).clip_norm == 0.5
