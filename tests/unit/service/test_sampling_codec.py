"""asample JSON → types → SampleResponse bytes."""

import json
import math
import struct
from typing import Any

import numpy as np
import pytest

from manylora.service.http_errors import Malformed, TooLarge
from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.pieces import SampleSubmit
from manylora.service.wire.sample_messages import decode_sample, encode_sample
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import (
    DataError,
    PromptScores,
    SampledSequence,
    SampleResult,
    TopK,
    Unsupported,
)

LIMITS = WireLimits()


def content(**fields: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": "s:sample:0",
        "seq_id": 3,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "type": "sample",
        **fields,
    }


def decode(limits: WireLimits = LIMITS, **fields: Any) -> SampleSubmit:
    return decode_sample(json.dumps(content(**fields)).encode(), limits)


def params(**fields: Any) -> dict[str, Any]:
    return {"sampling_params": fields}


# --- requests ---------------------------------------------------------------------------------


def test_defaults_are_the_protocols():
    submit = decode(sampling_params={})
    assert submit.prompt.tolist() == [1, 2, 3]
    assert (submit.temperature, submit.top_k, submit.top_p) == (1.0, 0, 1.0)
    assert (submit.max_tokens, submit.seed) == (None, None)
    assert (submit.stop, submit.stop_strings) == (None, ())
    assert not submit.scoring.of_prompt
    filled = submit.params(room=9, seed=4)
    assert (filled.max_tokens, filled.seed) == (9, 4)
    given = decode(**params(max_tokens=2, seed=7, top_k=5, top_p=0.5, temperature=0.0))
    chosen = given.params(room=9, seed=4)
    assert (chosen.max_tokens, chosen.seed, chosen.top_k, chosen.top_p) == (2, 7, 5, 0.5)
    assert chosen.temperature == 0.0


@pytest.mark.parametrize(
    ("stop", "ids", "texts"),
    [
        (None, None, ()),
        ([], (), ()),
        ([7, 8], (7, 8), ()),
        # A string comes beside the model's own end, which renderers accept as a good end.
        ("\n\nUser:", None, ("\n\nUser:",)),
        (["a", "b"], None, ("a", "b")),
    ],
)
def test_stops(stop, ids, texts):
    submit = decode(**params(stop=stop))
    assert (submit.stop, submit.stop_strings) == (ids, texts)


@pytest.mark.parametrize(
    "bad",
    [
        params(stop=""),
        params(stop=["a", ""]),
        params(stop=["a", 1]),
        params(stop={"a": 1}),
        params(stop=[1.5]),
        params(top_k=0),
        params(top_k=-2),
        params(top_p=0),
        params(top_p=1.1),
        params(temperature=-0.1),
        params(temperature=math.nan),
        params(temperature="1"),
        params(max_tokens=0),
        params(max_tokens=True),
        params(seed=2**63),
        {"num_samples": 0},
        {"seq_id": -1},
        {"seq_id": None},
        {"sampling_session_id": None},
        {"sampling_session_id": "a/b"},
        {"prompt": {"chunks": []}},
        {"prompt": {"chunks": [{"type": "encoded_text"}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [-1]}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1.0]}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [2**31]}]}},
        {"prompt": [1, 2]},
        {"prompt_logprobs_last_n": 2},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 3},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 0},
        {"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64"}},
        {"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 2]}},
        {"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [1, 2]}},
        {"target_prompt_logprobs": {"data": [1, -2], "dtype": "int64", "shape": [2, 1]}},
        {"target_prompt_logprobs": {"data": [1.5, 2], "dtype": "float32", "shape": [2, 1]}},
        {
            "target_prompt_logprobs": {
                "data": [1, 2],
                "dtype": "int64",
                "shape": [2, 1],
                "sparse_crow_indices": [0, 1, 2],
            }
        },
    ],
)
def test_what_does_not_fit_is_a_user_error(bad):
    with pytest.raises(DataError):
        decode(**bad)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt_alt_tokens_k": 1}, "prompt_alt_tokens_k"),
        ({"record_stability_info": True}, "record_stability_info"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "'image'"),
        ({"prompt": {"chunks": [{"type": "dmel", "dmel": ""}]}}, "'dmel'"),
    ],
)
def test_what_is_known_and_not_served_is_refused_by_name(fields, name):
    with pytest.raises(Unsupported, match=name):
        decode(**fields)


@pytest.mark.parametrize(
    ("limits", "fields"),
    [
        (WireLimits(samples=2), {"num_samples": 3}),
        (WireLimits(topk=4), {"topk_prompt_logprobs": 5}),
        (WireLimits(topk=4), {"topk_sample_logprobs": 5}),
        (WireLimits(cells=8), {"topk_prompt_logprobs": 3}),
        (WireLimits(cells=8), {"topk_sample_logprobs": 3, "num_samples": 3}),
        (
            WireLimits(targets=1),
            {"target_prompt_logprobs": {"data": [1] * 4, "dtype": "int64", "shape": [2, 2]}},
        ),
    ],
)
def test_every_count_has_a_bound(limits, fields):
    with pytest.raises(TooLarge):
        decode(limits, **fields)


def test_a_long_prompt_is_refused():
    with pytest.raises(DataError, match="1 to 2"):
        decode(WireLimits(tokens_each=2))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'"\\ud800"']
)
def test_garbage_is_malformed(body):
    with pytest.raises(Malformed):
        decode_sample(body, LIMITS)


def test_complaints_name_the_field_and_repeat_nothing():
    with pytest.raises(Malformed, match=r"sampling_params\.temperature") as caught:
        decode(**params(temperature="a secret"))
    assert "secret" not in str(caught.value)


def test_candidates_dense_and_sparse():
    tensor = {"data": [5, -1, 7, 8], "dtype": "int64", "shape": [2, 2]}
    submit = decode(target_prompt_logprobs=tensor)
    assert submit.scoring.candidates is not None
    assert submit.scoring.candidates.tolist() == [[5, -1], [7, 8]]
    listed = {
        "data": [5, 8],
        "dtype": "int64",
        "shape": [2, 3],
        "sparse_crow_indices": [0, 1, 2],
        "sparse_col_indices": [2, 0],
    }
    submit = decode(target_prompt_logprobs=listed)
    assert submit.scoring.candidates is not None
    assert submit.scoring.candidates.tolist() == [[-1, -1, 5], [8, -1, -1]]
    with pytest.raises(DataError, match="rise"):
        decode(target_prompt_logprobs={**listed, "sparse_crow_indices": [0, 2, 1]})


def test_the_digest_is_of_the_content():
    one = json.dumps(content())
    two = json.dumps(dict(reversed(content().items())), indent=2)
    three = json.dumps(content(seq_id=4))
    digests = [decode_sample(body.encode(), LIMITS).digest for body in (one, two, three)]
    assert digests[0] == digests[1] != digests[2]


def test_a_body_decodes_again_to_an_equal_submit():
    submit = decode(num_samples=2, **params(stop=["x"], max_tokens=4))
    again = decode_sample(submit.body, LIMITS)
    assert again.digest == submit.digest
    assert again.prompt.tolist() == submit.prompt.tolist()
    assert (again.stop_strings, again.max_tokens) == (submit.stop_strings, submit.max_tokens)


# --- answers ----------------------------------------------------------------------------------


def floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def ints(data: bytes, letter: str = "i", size: int = 4) -> list[int]:
    return list(struct.unpack(f"<{len(data) // size}{letter}", data))


def scores(candidates: np.ndarray[Any, Any] | None = None) -> PromptScores:
    return PromptScores(np.array([math.nan, -1.5, -2.5], np.float32), None, candidates)


def test_sequences():
    topk = TopK(np.array([[3, 4], [5, 6]], np.int32), np.array([[-0.5, -1], [-2, -3]], np.float32))
    result = SampleResult(
        (
            SampledSequence((3, 5), (-0.5, -2.0), "stop", topk),
            SampledSequence((9,), (-4.0,), "length"),
        )
    )
    response = pb.SampleResponse.FromString(encode_sample(result, decode().wanted))
    first, second = response.sequences
    assert (first.stop_reason, second.stop_reason) == (0, 1)
    assert (ints(first.tokens), floats(first.logprobs)) == ([3, 5], [-0.5, -2.0])
    assert ints(first.topk_sampled_logprobs.token_ids) == [3, 4, 5, 6]
    assert floats(first.topk_sampled_logprobs.logprobs) == [-0.5, -1.0, -2.0, -3.0]
    assert (first.topk_sampled_logprobs.k, first.topk_sampled_logprobs.length) == (2, 2)
    assert not second.HasField("topk_sampled_logprobs")
    assert not response.HasField("prompt_logprobs")
    assert not response.HasField("target_prompt_logprobs")


def test_prompt_scores_come_only_if_they_were_asked():
    result = SampleResult((), (scores(),))
    asked = encode_sample(result, decode(prompt_logprobs=True).wanted)
    values = floats(pb.SampleResponse.FromString(asked).prompt_logprobs)
    assert math.isnan(values[0])
    assert values[1:] == [-1.5, -2.5]
    unasked = pb.SampleResponse.FromString(encode_sample(result, decode().wanted))
    assert not unasked.HasField("prompt_logprobs")


def test_candidates_come_back_in_the_layout_that_they_came_in():
    tensor = {"data": [5, -1, 7, 8], "dtype": "int64", "shape": [2, 2]}
    answers = np.array([[-1, math.nan], [-3, -4]], np.float32)
    wanted = decode(target_prompt_logprobs=tensor).wanted
    message = pb.SampleResponse.FromString(
        encode_sample(SampleResult((), (scores(answers),)), wanted)
    ).target_prompt_logprobs
    assert (message.dtype, list(message.shape)) == (pb.DTYPE_FLOAT32, [2, 2])
    assert floats(message.dense) == [-1, 0, -3, -4]

    listed = {
        "data": [5, -1, 8],
        "dtype": "int64",
        "shape": [2, 3],
        "sparse_crow_indices": [0, 2, 3],
        "sparse_col_indices": [0, 2, 1],
    }
    nan = math.nan
    answers = np.array([[-1, nan, nan], [nan, -3, nan]], np.float32)
    wanted = decode(target_prompt_logprobs=listed).wanted
    message = pb.SampleResponse.FromString(
        encode_sample(SampleResult((), (scores(answers),)), wanted)
    ).target_prompt_logprobs
    assert floats(message.sparse_csr.values) == [-1, 0, -3]
    assert ints(message.sparse_csr.crow_indices, "q", 8) == [0, 2, 3]
    assert ints(message.sparse_csr.col_indices, "q", 8) == [0, 2, 1]
    assert list(message.shape) == [2, 3]


def test_a_candidate_that_is_not_a_number_stays_one():
    """Only where nothing was asked is the answer 0; a model that ran away is not hidden."""
    tensor = {"data": [5, 6], "dtype": "int64", "shape": [2, 1]}
    answers = np.array([[math.nan], [-1]], np.float32)
    wanted = decode(target_prompt_logprobs=tensor).wanted
    response = pb.SampleResponse.FromString(
        encode_sample(SampleResult((), (scores(answers),)), wanted)
    )
    assert math.isnan(floats(response.target_prompt_logprobs.dense)[0])
