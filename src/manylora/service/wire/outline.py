"""An outline is a forward_backward as it came, and what it will take once it is decoded.

Nothing is decoded before it is known whose it is and that there is room; what waits for its turn
waits in this form, which is as large as what the client sent.

Shapes: N tokens of one datum, K targets of each position.
"""

from dataclasses import dataclass, field

from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.codec import decode_forward_backward, digest_message, parse_request
from manylora.service.wire.pieces import ForwardBackwardSubmit
from manylora.service.wire.wire_limits import WireLimits

TOKEN_BYTES = 8  # int64
# Of a loss input's element: whole numbers become int64, everything else float32.
WHOLE_BYTES, FRACTION_BYTES = 8, 4
# Python's own part of an array and of a datum.
ARRAY_BYTES, DATUM_BYTES = 128, 512
_WHOLE = (pb.DTYPE_INT32, pb.DTYPE_INT64)
_WIDTHS = {pb.DTYPE_FLOAT32: 4, pb.DTYPE_INT64: 8, pb.DTYPE_INT32: 4, pb.DTYPE_BFLOAT16: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """An `Outline` is not decoded; see `ForwardBackwardSubmit` for what is not here. All its data
    have `num_tokens`, and take `decoded_bytes` once they are decoded."""

    model_id: str
    seq_id: int
    forward_only: bool
    num_tokens: int
    decoded_bytes: int
    body: bytes = field(repr=False)
    digest: str
    limits: WireLimits = field(repr=False)

    def decode(self) -> ForwardBackwardSubmit:
        """Decode it; raises as `codec.decode_forward_backward` does."""
        return decode_forward_backward(self.body, self.limits, self.digest)


def outline_of(body: bytes, limits: WireLimits) -> Outline:
    """Return whose a forward_backward is and how large; none of its tensors is built. Raises
    DataError: no such request, or nothing says whose it is; TooLarge: it has too many parts;
    Unsupported: a loss that is not served."""
    request = parse_request(body, limits)
    tokens = size = 0
    for datum in request.data:
        num, taken = _measure(datum, limits)
        tokens += num
        size += taken
    return Outline(
        model_id=request.model_id,
        seq_id=request.seq_id,
        forward_only=request.forward_only,
        num_tokens=tokens,
        decoded_bytes=size,
        body=body,
        digest=digest_message(request),
        limits=limits,
    )


def _measure(datum: pb.Datum, limits: WireLimits) -> tuple[int, int]:
    """Return N of a datum, and the bytes that it takes when it is decoded."""
    tokens = sum(len(chunk.encoded_text.tokens) // 4 for chunk in datum.model_input)
    size = DATUM_BYTES + TOKEN_BYTES * tokens
    for tensor in datum.loss_fn_inputs.values():
        wide = WHOLE_BYTES if tensor.dtype in _WHOLE else FRACTION_BYTES
        size += ARRAY_BYTES + wide * _num_elements(tensor, tokens, limits)
    return tokens, size


def _num_elements(tensor: pb.Tensor, tokens: int, limits: WireLimits) -> int:
    """Return how many elements a loss input has. A shape that does not fit is refused when it is
    decoded, before it has cost anything, so here it counts as what it can be at most."""
    if tensor.WhichOneof("encoding") == "dense":
        return len(tensor.dense) // _WIDTHS.get(tensor.dtype, 1)
    columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
    return tokens * min(max(columns, 1), limits.targets)
