"""A forward_backward goes from the wire's bytes to `types` and back, and requests have digests.

Shapes: N tokens of one datum, K targets of each position.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from itertools import groupby

import numpy as np
from google.protobuf.message import DecodeError, Message
from pydantic import BaseModel

from manylora.service.http_errors import TooLarge
from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.messages import WireAdamParams
from manylora.service.wire.paths import is_identifier
from manylora.service.wire.pieces import ForwardBackwardSubmit
from manylora.service.wire.scan import check_outline
from manylora.service.wire.wire_limits import WireLimits
from manylora.service.wire.wire_tensors import from_bytes, from_tensor
from manylora.types import AdamParams, DataError, Datum, ForwardBackwardResult, Unsupported
from manylora.types.data import Array

REFUSED_LOSSES = {
    "stable_reinforce": "it needs what the sampler recorded of each sequence; pass "
    "loss_fn='importance_sampling', 'ppo' or 'cispo'",
    "custom": "custom losses run in the client; leave the loss handle out and the SDK does so",
}
OUTPUT_TYPE = "ArrayRecord"


def decode_forward_backward(
    body: bytes, limits: WireLimits, digest: str | None = None
) -> ForwardBackwardSubmit:
    """Decode a whole forward_backward body, whose `digest` is given if it is known.

    Raises:
        DataError: it is malformed; the message names the datum and the field.
        TooLarge: something in it is beyond a limit.
        Unsupported: it asks for what is not supported.
    """
    request = parse_request(body, limits)
    return ForwardBackwardSubmit(
        model_id=request.model_id,
        seq_id=request.seq_id,
        data=_data(request.data, limits),
        loss=request.loss_fn,
        config=_settings(request, limits),
        forward_only=request.forward_only,
        body=body,
        digest=digest or digest_message(request),
    )


def parse_request(body: bytes, limits: WireLimits) -> pb.ForwardBackwardRequest:
    """Parse a forward_backward body; no tensor in it is looked at yet. Raises DataError: it is
    none; TooLarge: it has too many parts; Unsupported: its loss."""
    check_outline(body, limits)
    request = pb.ForwardBackwardRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        raise DataError("the body is no ForwardBackwardRequest") from None
    model_id = request.model_id
    if not is_identifier(model_id):
        raise DataError("model_id is missing or no identifier")
    if request.seq_id < 1:
        raise DataError(f"seq_id is {request.seq_id}; a model's numbers start at 1")
    if request.loss_fn in REFUSED_LOSSES:
        reason = REFUSED_LOSSES[request.loss_fn]
        raise Unsupported(f"loss {request.loss_fn!r} is not supported: {reason}")
    if not request.loss_fn or len(request.loss_fn) > 64:
        raise DataError("loss_fn must name a loss")
    if not request.data:
        raise DataError("data is empty")
    return request


def _settings(request: pb.ForwardBackwardRequest, limits: WireLimits) -> dict[str, float]:
    """Return the loss's settings; the newer field says all that the older one says."""
    if max(len(request.loss_fn_config), len(request.loss_fn_config_v2)) > limits.settings:
        raise TooLarge(f"more than {limits.settings} settings of a loss")
    settings = dict(request.loss_fn_config)
    if request.loss_fn_config_v2:
        settings = {}
        for name, value in request.loss_fn_config_v2.items():
            match value.WhichOneof("value"):
                case "number":
                    settings[name] = value.number
                case "text":
                    raise Unsupported(
                        f"setting {_shown(name)} of loss {_shown(request.loss_fn)} is a text; "
                        "only numbers are supported"
                    )
                case _:
                    raise DataError(f"setting {_shown(name)} of the loss has no value")
    for name, number in settings.items():
        if not math.isfinite(number):
            raise DataError(f"setting {_shown(name)} of the loss is {number}")
    return settings


def _data(data: Iterable[pb.Datum], limits: WireLimits) -> tuple[Datum, ...]:
    decoded: list[Datum] = []
    tokens = cells = 0
    for index, datum in enumerate(data):
        tokens_N, inputs, datum_cells = datum_arrays(datum, index, limits, limits.cells - cells)
        tokens += tokens_N.size
        cells += datum_cells
        if tokens > limits.tokens:
            raise TooLarge(f"more than {limits.tokens} tokens in one request")
        try:
            decoded.append(Datum(tokens_N, inputs))
        except DataError as error:
            raise DataError(f"data[{index}]: {error}") from None
    return tuple(decoded)


def datum_arrays(
    datum: pb.Datum, index: int, limits: WireLimits, cells_left: int
) -> tuple[Array, dict[str, Array], int]:
    """Return one datum's tokens [N], loss inputs ([N] or [N, K]), and the cells that they took."""
    tokens_N = _tokens(datum.model_input, index)
    if not 1 <= tokens_N.size <= limits.tokens_each:
        raise DataError(
            f"data[{index}] has {tokens_N.size} tokens; 1 to {limits.tokens_each} are supported"
        )
    inputs: dict[str, Array] = {}
    cells = 0
    for name, tensor in datum.loss_fn_inputs.items():
        what = f"data[{index}], loss input {_shown(name)}"
        # Before anything is expanded: a sparse tensor's shape is free of charge for its sender.
        columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
        if tokens_N.size * min(columns, limits.targets) > cells_left - cells:
            raise TooLarge(f"the request's loss inputs have more than {limits.cells} elements")
        inputs[name], taken = from_tensor(tensor, tokens_N.size, limits.targets, what)
        if name == "target_tokens" and inputs[name].dtype.kind != "i":
            raise DataError(f"{what} holds fractions; token ids are whole numbers")
        cells += taken
    return tokens_N, inputs, cells


def _tokens(chunks: Iterable[pb.Chunk], index: int) -> Array:
    parts: list[Array] = []
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind is None:
            raise DataError(f"data[{index}] has an empty chunk")
        if kind != "encoded_text":
            raise Unsupported(f"data[{index}] has a chunk of {kind!r}; only tokens are supported")
        what = f"data[{index}], tokens"
        parts.append(from_bytes(chunk.encoded_text.tokens, pb.DTYPE_INT32, what))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _shown(name: str) -> str:
    """Return a client's word for use inside a message, of bounded length."""
    return repr(name if len(name) <= 64 else f"{name[:64]}…")


def encode_forward_backward(result: ForwardBackwardResult) -> bytes:
    """Encode a result as a ForwardBackwardOutput.

    Data whose arrays differ in K cannot share a record; the SDK joins records in their order, so
    each run of equal ones gets its own. Raises ValueError: a metric is not named `name:reduction`;
    the SDK would fail on it.
    """
    for name in result.metrics:
        if name.count(":") != 1:
            raise ValueError(f"metric {name!r} is not named `name:reduction`")
    # The SDK's `forward_backward_custom` takes `loss:sum` out.
    metrics = {"loss:sum": result.loss, **result.metrics}
    output = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE, metrics=metrics)
    for trailing, group in groupby(result.logprobs, key=lambda array: array.shape[1:]):
        arrays = [np.ascontiguousarray(array, dtype="<f4") for array in group]
        offsets = np.zeros(len(arrays) + 1, dtype="<i8")
        np.cumsum([array.nbytes for array in arrays], out=offsets[1:])
        record = output.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(arrays))
        field = record.fields["logprobs"]
        field.data = b"".join(array.tobytes() for array in arrays)
        field.offsets = offsets.tobytes()
        field.dtype = pb.DTYPE_FLOAT32
        field.trailing_shape.extend(trailing)
    return output.SerializeToString(deterministic=True)


def adam_params(message: WireAdamParams) -> AdamParams:
    """Return one optimizer step's settings. Raises ConfigError: one of them is out of its range."""
    return AdamParams(
        lr=message.learning_rate,
        beta1=message.beta1,
        beta2=message.beta2,
        eps=message.eps,
        weight_decay=message.weight_decay,
        clip_norm=message.grad_clip_norm,
    )


# --- digests: equal for equal content ---------------------------------------------------------


def digest_json(message: BaseModel) -> str:
    """Return the digest of what was understood of a JSON request, whatever its order and blanks."""
    content = message.model_dump(mode="json", exclude_none=True)
    return _digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def digest_message(message: Message) -> str:
    """Return the digest of a protobuf message."""
    return _digest(message.SerializeToString(deterministic=True))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
