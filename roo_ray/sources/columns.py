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


def byte_rows(array: pa.Array) -> pa.Array | None:
    """The rows of a list array as binary values (N,) that share its memory; None unless its values are plain numbers
    or times without nulls. Arrow moves and compares binary values as blocks, list values one by one."""
    kind = array.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    values = array.values
    if not pa.types.is_primitive(values.type) or values.type.bit_width < 8 or values.null_count:
        return None
    validity, raw = array.buffers()[:2]
    data = values.buffers()[1]
    if raw is None or data is None or not data.size:  # of files without a value
        return None
    first = array.offset - (0 if validity is None else array.offset % 8)  # a bitmap cannot be cut within a byte
    validity = None if validity is None else validity.slice(first // 8)
    ends = np.frombuffer(raw, np.int32 if pa.types.is_list(kind) else np.int64)[first : array.offset + len(array) + 1]
    offsets = (ends.astype(np.int64) + values.offset) * (values.type.bit_width // 8)
    buffers = [validity, pa.py_buffer(offsets), data]
    return pa.Array.from_buffers(pa.large_binary(), len(array), buffers, offset=array.offset - first)


def take_rows(array: pa.Array, rows: npt.NDArray[np.int64]) -> pa.Array:
    """The values at ``rows`` (N,)."""
    index = pa.array(rows)
    blocks = byte_rows(array)
    if blocks is None:
        return array.take(index)
    kind = array.type
    taken = blocks.take(index)
    validity, raw, data = taken.buffers()
    width = kind.value_type.bit_width // 8
    offsets = np.frombuffer(raw, np.int64)[taken.offset : taken.offset + len(taken) + 1] // width
    if taken.offset or not offsets[-1] or (pa.types.is_list(kind) and offsets[-1] > np.iinfo(np.int32).max):
        return array.take(index)
    values = pa.Array.from_buffers(kind.value_type, int(offsets[-1]), [None, data])
    ends = pa.py_buffer(offsets.astype(np.int32) if pa.types.is_list(kind) else offsets)
    return pa.Array.from_buffers(kind, len(taken), [validity, ends], children=[values])


def take_table(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """The rows ``rows`` (N,) of a table, each column as one array."""
    columns = [take_rows(as_array(column), rows) for column in table.columns]
    return pa.Table.from_arrays(columns, schema=table.schema)
