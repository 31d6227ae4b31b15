"""forward_backward bodies for tests, and the slow obvious way to read a tensor back."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from manylora.service.wire import wire_pb2 as pb
from manylora.types.data import Array

FORMATS: dict[int, str] = {pb.DTYPE_FLOAT32: "<f", pb.DTYPE_INT64: "<q", pb.DTYPE_INT32: "<i"}


def tokens(*ids: int) -> pb.Chunk:
    return pb.Chunk(
        encoded_text=pb.EncodedTextChunk(tokens=b"".join(struct.pack("<i", t) for t in ids))
    )


def dense(array: Array | Sequence[float], dtype: int | None = None) -> pb.Tensor:
    array = np.asarray(array)
    if dtype is None:
        dtype = pb.DTYPE_INT64 if array.dtype.kind == "i" else pb.DTYPE_FLOAT32
    flat = list(array.reshape(-1).tolist())
    if dtype == pb.DTYPE_BFLOAT16:
        data = b"".join(struct.pack("<f", value)[2:] for value in flat)
    else:
        data = b"".join(struct.pack(FORMATS[dtype], value) for value in flat)
    return pb.Tensor(dense=data, dtype=pb.DType.Name(dtype), shape=array.shape)


def sparse(
    shape: tuple[int, ...],
    crow: Sequence[int],
    col: Sequence[int],
    values: Sequence[float],
    dtype: int = pb.DTYPE_FLOAT32,
) -> pb.Tensor:
    def whole(numbers: Sequence[int]) -> bytes:
        return b"".join(struct.pack("<q", number) for number in numbers)

    return pb.Tensor(
        sparse_csr=pb.SparseCsr(
            values=b"".join(struct.pack(FORMATS[dtype], value) for value in values),
            crow_indices=whole(crow),
            col_indices=whole(col),
        ),
        dtype=pb.DType.Name(dtype),
        shape=shape,
    )


def datum(chunks: Sequence[pb.Chunk], inputs: Mapping[str, pb.Tensor]) -> pb.Datum:
    message = pb.Datum(model_input=chunks)
    for name, tensor in inputs.items():
        message.loss_fn_inputs[name].CopyFrom(tensor)
    return message


def plain_datum(length: int = 3) -> pb.Datum:
    ids = list(range(1, length + 1))
    return datum([tokens(*ids)], {"target_tokens": dense(ids), "weights": dense([1.0] * length)})


def request(
    data: Sequence[pb.Datum] | None = None,
    *,
    model_id: str = "s:train:0",
    seq_id: int = 1,
    loss: str = "cross_entropy",
    **fields: Any,
) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest(
        model_id=model_id,
        seq_id=seq_id,
        data=[plain_datum()] if data is None else data,
        loss_fn=loss,
        **fields,
    )


def slow_csr(
    shape: tuple[int, int], crow: Sequence[int], col: Sequence[int], values: Sequence[float]
) -> list[list[float]]:
    """A sparse matrix written out, one entry at a time."""
    dense_rows = [[0.0] * shape[1] for _ in range(shape[0])]
    for row in range(shape[0]):
        for entry in range(crow[row], crow[row + 1]):
            dense_rows[row][col[entry]] = values[entry]
    return dense_rows
