"""Tensors go between the wire's bytes and numpy, without a loop over elements.

Shapes: R rows, K columns, E listed entries of a sparse matrix.
"""

from typing import Any

import numpy as np

from manylora.service.http_errors import TooLarge
from manylora.service.wire import wire_pb2 as pb
from manylora.service.wire.pieces import CSR
from manylora.types import DataError, Unsupported
from manylora.types.data import Array

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}


def from_bytes(data: bytes, dtype: int, what: str) -> Array:
    """Return a flat array of its own memory: float32 from the floats, int64 from whole numbers.
    Raises DataError: an unknown dtype, or bytes that are no whole number of elements."""
    raw = _DTYPES.get(dtype)
    if raw is None:
        raise DataError(f"{what} has the unknown dtype {dtype}")
    if len(data) % raw.itemsize:
        raise DataError(f"{what} has {len(data)} bytes; an element takes {raw.itemsize}")
    array = np.frombuffer(data, raw)
    if dtype == pb.DTYPE_BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32 if dtype == pb.DTYPE_FLOAT32 else np.int64)


def from_tensor(tensor: pb.Tensor, rows: int, max_columns: int, what: str) -> tuple[Array, int]:
    """Return a loss input of `rows` positions, dense.

    Args:
        rows: number of tokens of the datum; the first dimension must be that.
        max_columns: bound on the second dimension, if there is one.

    Returns:
        The array, [rows] or [rows, K], and how many cells its expansion took.

    Raises:
        DataError: what the tensor says of itself does not fit together, or not to `rows`.
    """
    shape = tuple(tensor.shape)
    encoding = tensor.WhichOneof("encoding")
    if encoding is None:
        raise DataError(f"{what} holds no numbers")
    if len(shape) > 2:
        raise Unsupported(f"{what} has {len(shape)} dimensions; one or two are supported")
    if shape and shape[0] != rows:
        raise DataError(f"{what} has shape {shape}; the datum has {rows} tokens")
    if len(shape) == 2 and not 1 <= shape[1] <= max_columns:
        raise TooLarge(f"{what} has {shape[1]} columns; 1 to {max_columns} are supported")
    if encoding == "dense":
        flat = from_bytes(tensor.dense, tensor.dtype, what)
        wanted = shape or (rows,)
        if flat.size != int(np.prod(wanted)):
            raise DataError(f"{what} has {flat.size} elements; its shape is {wanted}")
        return flat.reshape(wanted), flat.size
    sparse = tensor.sparse_csr
    if len(shape) != 2:
        raise DataError(
            f"{what} is sparse and has shape {shape}; a sparse tensor has two dimensions"
        )
    values_E = from_bytes(sparse.values, tensor.dtype, what)
    csr = check_csr(
        from_bytes(sparse.crow_indices, pb.DTYPE_INT64, f"{what}: crow_indices"),
        from_bytes(sparse.col_indices, pb.DTYPE_INT64, f"{what}: col_indices"),
        (shape[0], shape[1]),
        values_E.size,
        what,
    )
    return densify(csr, values_E, 0), shape[0] * shape[1]


def check_csr(crow: Array, col_E: Array, shape: tuple[int, int], num_values: int, what: str) -> CSR:
    """Return a sparse matrix's layout, once it is certain that it is one. Raises DataError: it is
    not."""
    rows, columns = shape
    if crow.size != rows + 1:
        raise DataError(
            f"{what}: crow_indices has {crow.size} entries; {rows} rows need {rows + 1}"
        )
    # The bounds come first: differences of numbers near 2⁶³ wrap around.
    outside = crow.min() < 0 or crow.max() > num_values
    if outside or crow[0] != 0 or crow[-1] != num_values or (np.diff(crow) < 0).any():
        raise DataError(f"{what}: crow_indices must rise from 0 to {num_values}")
    if col_E.size != num_values:
        raise DataError(f"{what}: {num_values} values and {col_E.size} col_indices")
    if col_E.size and (col_E.min() < 0 or col_E.max() >= columns):
        raise DataError(f"{what}: col_indices must lie in 0 … {columns - 1}")
    csr = CSR(crow, col_E, shape)
    if (np.diff(_rows_of(csr) * columns + col_E) <= 0).any():
        raise DataError(f"{what}: the col_indices of a row must rise")
    return csr


def densify(csr: CSR, values_E: Array, unlisted: int) -> Array:
    """Return the matrix [R, K] with `unlisted` wherever it lists nothing."""
    dense_RK = np.full(csr.shape, unlisted, dtype=values_E.dtype)
    dense_RK[_rows_of(csr), csr.col] = values_E
    return dense_RK


def listed(csr: CSR, dense_RK: Array) -> Array:
    """Return the listed entries [E] of a dense matrix, in the layout's order."""
    return dense_RK[_rows_of(csr), csr.col]


def _rows_of(csr: CSR) -> Array:
    return np.repeat(np.arange(csr.shape[0], dtype=np.int64), np.diff(csr.crow))
