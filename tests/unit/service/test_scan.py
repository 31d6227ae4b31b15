"""Bounds on what a body may hold, and what its first bytes say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.service.http_errors import TooLarge
from manylora.service.wire.codec import decode_forward_backward
from manylora.service.wire.reading import peek_json_ids
from manylora.service.wire.scan import check_outline, peek_ids
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import DataError
from tests.unit.service.bodies import datum, dense, plain_datum, request, sparse, tokens

LIMITS = WireLimits()


def decode(message, limits):
    return decode_forward_backward(message.SerializeToString(), limits)


# --- limits -----------------------------------------------------------------------------------


def small(**bounds: int) -> WireLimits:
    return WireLimits(**bounds)


def test_every_count_has_a_bound():
    two = request([plain_datum(), plain_datum()])
    with pytest.raises(TooLarge, match="1 data"):
        decode(two, small(data=1))
    with pytest.raises(TooLarge, match="5 tokens"):
        decode(two, small(tokens=5))
    with pytest.raises(DataError, match="2 are supported"):
        decode(two, small(tokens_each=2))
    with pytest.raises(TooLarge, match="11 elements"):
        decode(two, small(cells=11))
    with pytest.raises(TooLarge, match="1 loss inputs"):
        decode(two, small(inputs=1))
    with pytest.raises(TooLarge, match="0 settings"):
        decode(request(loss_fn_config={"a": 1.0}), small(settings=0))
    listed = sparse((3, 2), [0, 1, 2, 3], [0, 1, 0], [1.0, 2.0, 3.0])
    wide = request([datum([tokens(1, 2, 3)], {"target_tokens": dense([1, 2, 3]), "w": listed})])
    with pytest.raises(TooLarge, match="1 to 1"):
        decode(wide, small(targets=1))
    assert decode(two, small(data=2, tokens=6, tokens_each=3, cells=12, inputs=2)).num_tokens == 6


def test_parts_are_counted_before_they_are_built():
    """Two bytes make an object of a hundred: 20 million of them are never parsed."""
    body = request().SerializeToString() + b"\x1a\x00" * 20_000_000
    with pytest.raises(TooLarge):
        decode_forward_backward(body, LIMITS)
    empty_chunks = b"\x0a\x00" * 5_000_000
    body = b"\x1a" + varint(len(empty_chunks)) + empty_chunks
    with pytest.raises(TooLarge, match="parts"):
        check_outline(body, LIMITS)


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


# --- peeking ----------------------------------------------------------------------------------


def test_the_start_of_a_body_says_whose_it_was():
    body = request([plain_datum()] * 500, model_id="abc:train:1", seq_id=300).SerializeToString()
    assert len(body) > 4096
    assert peek_ids(body[:4096]) == ("abc:train:1", 300)
    assert peek_ids(body[:16]) == ("abc:train:1", 300)
    for short in range(16):
        assert peek_ids(body[:short]) is None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_peeking_never_fails(prefix):
    found = peek_ids(prefix)
    assert found is None or (isinstance(found[0], str) and 0 <= found[1] < 2**31)


def test_negative_numbers_are_no_numbers():
    assert peek_ids(request(seq_id=-1).SerializeToString()) is None


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"model_id":"a:1","path":"p","seq_id":7,"x":1}', ("a:1", 7)),
        (b'{"model_id":"a:1","path":"p","seq_id":7,"user_metadata":{"a":"bbb', ("a:1", 7)),
        (b'{"model_id":"a:1","pa', None),
        (b'{"model_id":"a/1","seq_id":7}', None),
        (b'{"model_id":"a","seq_id":true}', None),
        (b'{"model_id":"a","seq_id":0}', None),
        (b'{"model_id":"a","seq_id":99999999999}', None),
        (b'{"model_id":5,"seq_id":1}', None),
        (b"[1]", None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_the_start_of_a_json_body_says_whose_it_was(body, ids):
    assert peek_json_ids(body) == ids
