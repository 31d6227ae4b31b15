"""What the stock SDK makes of our answers, and we of its requests.

Needs `tinker` (any version from 0.25.0 on); skipped where it is not installed.
"""

import datetime
import importlib
import json
import math
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from manylora.service.wire import messages, replies
from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.codec import (
    datum_arrays,
    decode_forward_backward,
    encode_forward_backward,
)
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.reading import read_json
from manylora.service.wire.sample_messages import decode_sample, encode_sample
from manylora.service.wire.wire_limits import WireLimits
from manylora.types import (
    ForwardBackwardResult,
    PromptScores,
    SampledSequence,
    SampleResult,
    TopK,
)

tinker = pytest.importorskip("tinker")
types = tinker.types
request_conv = pytest.importorskip("tinker.proto.request_conv")
response_conv = pytest.importorskip("tinker.proto.response_conv")
torch = pytest.importorskip("torch")

LIMITS = WireLimits()
NEWER = hasattr(types, "TopkLogprobs") or hasattr(types, "ProvenanceSpans")


def sdk_body(data: list[Any], loss: str, config: dict[str, Any] | None = None) -> bytes:
    request = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(
            data=data, loss_fn=loss, loss_fn_config=config
        ),
        model_id="s:train:0",
        seq_id=4,
    )
    return request_conv.forward_backward_request_to_proto(request).SerializeToString()


def test_the_sdks_forward_backward_is_read():
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([5, 6, 7]),
        loss_fn_inputs={
            "target_tokens": [6, 7, 8],
            "logprobs": [-0.5, -1.5, 0.0],
            "advantages": np.array([1.0, -2.0, 0.5], np.float32),
        },
    )
    body = sdk_body([datum], "ppo", {"clip_low_threshold": 0.7})
    submit = decode_forward_backward(body, LIMITS)
    assert (submit.model_id, submit.seq_id, submit.loss) == ("s:train:0", 4, "ppo")
    assert submit.config == {"clip_low_threshold": 0.7}
    assert submit.data[0].tokens.tolist() == [5, 6, 7]
    inputs = submit.data[0].loss_inputs
    assert inputs["target_tokens"].tolist() == [6, 7, 8]
    assert inputs["logprobs"].tolist() == [-0.5, -1.5, 0.0]
    assert inputs["advantages"].tolist() == [1.0, -2.0, 0.5]
    assert not submit.forward_only


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")  # 0.25 lets torch warn
def test_the_sdks_sparse_matrices_are_read():
    targets = torch.zeros(16, 8, dtype=torch.int64)
    weights = torch.zeros(16, 8)
    targets[3, 5], targets[9, 0], weights[3, 5], weights[9, 0] = 17, 4, -0.5, 2.0
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(list(range(16))),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    message = pb.ForwardBackwardRequest.FromString(sdk_body([datum], "cross_entropy"))
    assert message.data[0].loss_fn_inputs["weights"].HasField("sparse_csr")
    tokens_N, inputs, _ = datum_arrays(message.data[0], 0, LIMITS, LIMITS.cells)
    assert tokens_N.tolist() == list(range(16))
    assert inputs["target_tokens"].tolist() == targets.tolist()
    assert inputs["weights"].tolist() == weights.tolist()


def test_the_sdk_reads_our_forward_backward():
    arrays = (
        np.array([-1.0, -2.0], np.float32),
        np.array([[-4.0, -5.0], [-6.0, -7.0]], np.float32),
        np.array([-3.0], np.float32),
    )
    body = encode_forward_backward(ForwardBackwardResult(arrays, 2.5, {"entropy:mean": 0.5}))
    output = response_conv.deserialize_forward_backward_output(body)
    assert output.loss_fn_output_type == "ArrayRecord"
    assert output.metrics == {"loss:sum": 2.5, "entropy:mean": 0.5}
    for array, read in zip(arrays, output.loss_fn_outputs, strict=True):
        assert list(read) == ["logprobs"]
        assert read["logprobs"].to_numpy().tolist() == array.tolist()
        assert read["logprobs"].shape == list(array.shape)


def test_the_sdk_joins_our_chunks():
    helpers = pytest.importorskip("tinker.lib.chunked_fwdbwd_helpers")
    one = ForwardBackwardResult((np.array([-1.0], np.float32),), 1.0, {})
    two = ForwardBackwardResult((np.array([-2.0], np.float32),) * 2, 2.0, {})
    joined = helpers.combine_fwd_bwd_output_results(
        [
            response_conv.deserialize_forward_backward_output(encode_forward_backward(result))
            for result in (one, two)
        ]
    )
    assert joined.metrics == {"loss:sum": 3.0}
    assert len(joined.loss_fn_outputs) == 3


def test_the_sdks_samples_are_read_and_our_answers_too():
    request = types.SampleRequest(
        num_samples=2,
        prompt=types.ModelInput.from_ints([1, 2, 3]),
        sampling_params=types.SamplingParams(max_tokens=4, seed=5, stop=["\n"], temperature=0.5),
        sampling_session_id="s:sample:0",
        seq_id=10**9 * 77 + 3,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
    )
    body = json.dumps(request.model_dump(exclude_none=True, mode="json")).encode()
    submit = decode_sample(body, LIMITS)
    assert (submit.prompt.tolist(), submit.num_samples, submit.seed) == ([1, 2, 3], 2, 5)
    assert (submit.max_tokens, submit.stop_strings, submit.temperature) == (4, ("\n",), 0.5)
    assert submit.seq_id == 10**9 * 77 + 3
    assert (submit.scoring.prompt, submit.scoring.topk_prompt) == (True, 2)

    topk = TopK(
        np.array([[0, 0], [7, 8], [9, 0]]), np.array([[-99999.0] * 2, [-1, -2], [-3, -99999.0]])
    )
    result = SampleResult(
        (SampledSequence((4, 5), (-1.0, -2.0), "stop"), SampledSequence((6,), (-3.0,), "length")),
        (PromptScores(np.array([math.nan, -1.0, -2.0], np.float32), topk),),
    )
    response = response_conv.deserialize_sample_response(encode_sample(result, submit.wanted))
    assert [list(sequence.tokens) for sequence in response.sequences] == [[4, 5], [6]]
    assert response.sequences[0].logprobs == [-1.0, -2.0]
    assert [sequence.stop_reason for sequence in response.sequences] == ["stop", "length"]
    assert response.prompt_logprobs == [None, -1.0, -2.0]
    assert response.topk_prompt_logprobs == [None, [(7, -1.0), (8, -2.0)], [(9, -3.0)]]


@pytest.mark.skipif(not NEWER, reason="this SDK has no target_prompt_logprobs")
@pytest.mark.parametrize("sparse", [True, False])
def test_the_sdks_candidates_come_back_in_their_layout(sparse):
    asked = torch.full((8, 6), -1, dtype=torch.int64)
    asked[2, 3], asked[5, 0] = 11, 12
    from_torch = types.TensorData.from_torch_sparse if sparse else types.TensorData.from_torch
    tensor = from_torch(asked, **({"pad_value": -1} if sparse else {}))
    fields = {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}
    if sparse:
        fields["sparse_crow_indices"] = tensor.sparse_crow_indices
        fields["sparse_col_indices"] = tensor.sparse_col_indices
    request = types.SampleRequest(
        prompt=types.ModelInput.from_ints(list(range(9))),
        sampling_params=types.SamplingParams(max_tokens=1),
        sampling_session_id="s:sample:0",
        seq_id=0,
        target_prompt_logprobs=fields,
    )
    submit = decode_sample(request.model_dump_json(exclude_none=True).encode(), LIMITS)
    assert submit.scoring.candidates is not None
    assert submit.scoring.candidates.tolist() == asked.tolist()
    answers = np.where(asked.numpy() == -1, np.nan, -asked.numpy().astype(np.float32))
    scores = PromptScores(np.zeros(9, np.float32), None, answers)
    body = encode_sample(SampleResult((), (scores,)), submit.wanted)
    read = response_conv.deserialize_sample_response(body).target_prompt_logprobs
    assert (read.sparse_crow_indices is not None) == sparse
    assert read.to_torch().tolist() == torch.where(asked == -1, 0, -asked).tolist()


# --- JSON messages ----------------------------------------------------------------------------


def sent(message: Any) -> bytes:
    """As the SDK sends it."""
    return json.dumps(
        message.model_dump(exclude_unset=False, exclude_none=True, mode="json")
    ).encode()


NOW = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)

REQUESTS = [
    (messages.ClientConfigRequest, "ClientConfigRequest", {"sdk_version": "0.38.0"}),
    (
        messages.CreateSessionRequest,
        "CreateSessionRequest",
        {"tags": ["a"], "user_metadata": {"k": 1}, "sdk_version": "0.38.0"},
    ),
    (messages.SessionRequest, "SessionHeartbeatRequest", {"session_id": "s"}),
    (
        messages.CreateModelRequest,
        "CreateModelRequest",
        {
            "session_id": "s",
            "model_seq_id": 0,
            "base_model": "Qwen/Qwen3-8B",
            "lora_config": {"rank": 4},
            "user_metadata": {"a": "b"},
        },
    ),
    (messages.ModelRequest, "GetInfoRequest", {"model_id": "s:train:0"}),
    (
        messages.SaveWeightsRequest,
        "SaveWeightsRequest",
        {"model_id": "s:train:0", "seq_id": 3, "path": "step-1", "ttl_seconds": 3600},
    ),
    (
        messages.SaveWeightsForSamplerRequest,
        "SaveWeightsForSamplerRequest",
        {"model_id": "s:train:0", "seq_id": 3, "path": "final"},
    ),
    (
        messages.SaveWeightsForSamplerRequest,
        "SaveWeightsForSamplerRequest",
        {"model_id": "s:train:0", "seq_id": 3, "sampling_session_seq_id": 0},
    ),
    (
        messages.LoadWeightsRequest,
        "LoadWeightsRequest",
        {"session_id": "s", "model_seq_id": 1, "path": "tinker://a/weights/b", "optimizer": True},
    ),
    (
        messages.LoadWeightsRequest,
        "LoadWeightsRequest",
        {"model_id": "s:train:0", "seq_id": 1, "path": "tinker://a/weights/b", "optimizer": False},
    ),
    (
        messages.CreateSamplingSessionRequest,
        "CreateSamplingSessionRequest",
        {"session_id": "s", "sampling_session_seq_id": 0, "base_model": "Qwen/Qwen3-8B"},
    ),
    (
        messages.RetrieveFutureRequest,
        "FutureRetrieveRequest",
        {"request_id": "s:train:0:4", "allow_metadata_only": True},
    ),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "fields"), REQUESTS, ids=[f"{row[1]}-{i}" for i, row in enumerate(REQUESTS)]
)
def test_the_sdks_requests_are_read(ours, theirs, fields):
    read = read_json(ours, sent(getattr(types, theirs)(**fields)))
    for name, value in fields.items():
        got = getattr(read, name)
        if isinstance(got, BaseModel):
            assert value.items() <= got.model_dump().items()
        elif name == "user_metadata":
            assert got == {key: str(item) for key, item in value.items()}
        else:
            assert got == value


def test_the_sdks_optimizer_step_is_read():
    params = types.AdamParams(learning_rate=0.5, grad_clip_norm=1.0)
    field = "optim_params" if NEWER else "adam_params"
    message = types.OptimStepRequest(**{field: params}, model_id="m", seq_id=2)
    read = read_json(messages.OptimStepRequest, sent(message))
    assert read.adam_params is not None
    assert (read.adam_params.learning_rate, read.adam_params.beta2) == (0.5, 0.95)
    assert read.adam_params.grad_clip_norm == 1.0


CHECKPOINT = replies.Checkpoint(
    checkpoint_id="weights/a",
    checkpoint_type="training",
    time=NOW,
    tinker_path="tinker://s:train:0/weights/a",
    size_bytes=10,
    expires_at=NOW,
)
RUN = replies.TrainingRun(
    training_run_id="s:train:0",
    base_model="Qwen/Qwen3-8B",
    model_owner="dev",
    last_request_time=NOW,
    lora_rank=4,
    last_checkpoint=CHECKPOINT,
    user_metadata={"renderer_name": "role_colon"},
)
CURSOR = replies.Cursor(offset=0, limit=20, total_count=1)

REPLIES: list[tuple[BaseModel, str]] = [
    (replies.ClientConfig(), "ClientConfigResponse"),
    (replies.DynamicConfig(), "ClientDynamicConfigResponse"),
    (replies.CreateSessionReply(session_id="s"), "CreateSessionResponse"),
    (replies.HeartbeatReply(), "SessionHeartbeatResponse"),
    (replies.TelemetryReply(), "TelemetryResponse"),
    (replies.Health(), "HealthResponse"),
    (
        replies.ServerCapabilities(supported_models=[replies.SupportedModel(model_name="m")]),
        "GetServerCapabilitiesResponse",
    ),
    (replies.Submitted(request_id="r", model_id="m"), "UntypedAPIFuture"),
    (replies.Submitted(request_id="r", sample_sequence_ids=["a", "b"]), "UntypedAPIFuture"),
    (
        replies.ModelInfo(
            model_id="m", model_data=replies.ModelData(model_name="Qwen/Qwen3-8B"), lora_rank=4
        ),
        "GetInfoResponse",
    ),
    (replies.CreateModelReply(model_id="m"), "CreateModelResponse"),
    (
        replies.LoadWeightsReply(model_id="m", path="tinker://a/weights/b"),
        "LoadWeightsResponse",
    ),
    (replies.OptimStepReply(metrics={"grad_norm": 1.5}), "OptimStepResponse"),
    (replies.OptimStepReply(metrics={"grad_norm": math.inf}), "OptimStepResponse"),
    (replies.SaveWeightsReply(path="tinker://a/weights/b"), "SaveWeightsResponse"),
    (
        replies.SaveWeightsForSamplerReply(path="tinker://a/sampler_weights/b"),
        "SaveWeightsForSamplerResponse",
    ),
    (
        replies.SaveWeightsExternalReply(path="tinker://a/external_weights/b", size_bytes=3),
        "SaveWeightsExternalResponse",
    ),
    (
        replies.CreateSamplingSessionReply(sampling_session_id="s"),
        "CreateSamplingSessionResponse",
    ),
    (replies.SamplerInfo(sampler_id="s", base_model="m"), "GetSamplerResponse"),
    (replies.TryAgain(request_id="r", queue_state="paused_capacity"), "TryAgainResponse"),
    (replies.ErrorReply(error="no", category="user"), "RequestFailedResponse"),
    (replies.CheckpointList(checkpoints=[CHECKPOINT], cursor=CURSOR), "CheckpointsListResponse"),
    (RUN, "TrainingRun"),
    (replies.TrainingRunList(training_runs=[RUN], cursor=CURSOR), "TrainingRunsResponse"),
    (replies.WeightsInfo(base_model="m", lora_rank=4, train_mlp=True), "WeightsInfoResponse"),
    (
        replies.ExternalWeightsUrls(urls={"a.json": "http://x/y"}, expires=NOW),
        "ExternalWeightsUrlsResponse",
    ),
]


@pytest.mark.parametrize(
    ("ours", "theirs"), REPLIES, ids=[f"{row[1]}-{i}" for i, row in enumerate(REPLIES)]
)
def test_the_sdk_reads_our_replies(ours, theirs):
    hidden = {
        "UntypedAPIFuture": "tinker.types.shared.untyped_api_future",
        "TryAgainResponse": "tinker.types.try_again_response",
    }
    place = importlib.import_module(hidden[theirs]) if theirs in hidden else types
    kind = getattr(place, theirs, None)
    if kind is None:
        pytest.skip(f"this SDK has no {theirs}")
    content = json.loads(ours.model_dump_json(exclude_none=True))
    read = kind.model_validate(content)
    for name in content:
        if name in kind.model_fields and not isinstance(content[name], dict | list):
            shown = json.loads(read.model_dump_json()).get(name)
            assert shown == content[name] or math.isinf(content[name]) or name.endswith("_at")


@pytest.mark.skipif(not NEWER, reason="this SDK does not take paths apart")
@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_paths_are_the_sdks(kind):
    path = TinkerPath("s:train:0", kind, "step-1.5_a")
    theirs = types.ParsedCheckpointTinkerPath.from_tinker_path(str(path))
    assert theirs.training_run_id == path.model_id
    assert theirs.checkpoint_type == path.checkpoint_type
    assert theirs.checkpoint_id == path.checkpoint_id
    assert TinkerPath.parse(str(path)) == path
