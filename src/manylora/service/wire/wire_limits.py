"""One request may hold only so much. Every count and size on the wire has its bound here or in a
message's own fields; what is beyond one is refused before it is expanded."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """`WireLimits` bound one request's content.

    Attributes:
        data: sequences of a forward_backward. The SDK cuts at 1024.
        parts: chunks, loss inputs and settings of a forward_backward, all together: each costs
            memory however few bytes it takes.
        inputs: loss inputs of one datum.
        settings: settings of a loss.
        tokens: of all sequences of a request.
        tokens_each: of one sequence or prompt.
        targets: K of an [N, K] loss input, or candidates of a prompt token.
        cells: numbers that sparse or two-dimensional tensors and top-k tables may expand to.
        samples: answers to one prompt.
        topk: likeliest tokens of one place.
    """

    data: int = 4096
    parts: int = 65_536
    inputs: int = 16
    settings: int = 64
    tokens: int = 4_194_304
    tokens_each: int = 1_048_576
    targets: int = 1024
    cells: int = 16_777_216
    samples: int = 4096
    topk: int = 1024
