"""Small helpers for Arrow columns: lists to lengths and values, and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def is_list(kind: pa.DataType) -> bool:
    """Any of Arrow's list types."""
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def as_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def list_parts(array: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """(lengths (N,) int64, values (sum(lengths),)) of a list array; a null list has length 0."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)
    return lengths, array.flatten()


def offsets_of(lengths: npt.NDArray[np.int64]) -> pa.Array:
    """(N + 1,) int32 list offsets of lengths (N,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets).cast(pa.int32())


def take_rows(array: pa.Array, rows: npt.NDArray[np.int64]) -> pa.Array:
    """The values at ``rows`` (N,)."""
    return array.take(pa.array(rows))
