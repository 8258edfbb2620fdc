"""Stable hashes of Arrow columns: the same value gives the same 64 bits on every machine and in every run.

They name requests (bucketing, holdout, audits) and map ids into embedding tables. Integers of any width (and
booleans, dates, timestamps) hash by value, strings by their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError

Hashes = npt.NDArray[np.uint64]
NULL_HASH = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that spreads every input bit."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _integer_hashes(array: pa.Array) -> Hashes:
    if pa.types.is_timestamp(array.type):
        array = array.cast(pa.timestamp("us", tz=array.type.tz), safe=False).cast(pa.int64())
    elif not pa.types.is_uint64(array.type):
        if pa.types.is_date32(array.type) or pa.types.is_time32(array.type):
            array = array.cast(pa.int32())
        array = array.cast(pa.int64())
    values = np.asarray(pc.fill_null(array, pa.scalar(0, array.type)))
    return mix64(values.view(np.uint64))


def hash_array(array: pa.Array | pa.ChunkedArray) -> Hashes:
    """(N,) uint64: a hash of each value; nulls share one hash. Raises DataError for types without one."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # no chunks at all
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)
    if text or pa.types.is_dictionary(kind):
        encoded = array if pa.types.is_dictionary(kind) else array.dictionary_encode()
        if pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind):
            distinct = _integer_hashes(encoded.dictionary)
        else:
            distinct = pd.util.hash_array(encoded.dictionary.to_numpy(zero_copy_only=False), categorize=False)
        indices = np.asarray(pc.fill_null(encoded.indices.cast(pa.int64()), 0))
        hashes: Hashes = distinct[indices] if len(distinct) else np.zeros(len(array), np.uint64)
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
        hashes = _integer_hashes(array)
    else:
        raise DataError(f"values of type {kind} cannot be used as ids or keys; use integers, strings or timestamps")
    if array.null_count:
        hashes = np.where(np.asarray(pc.is_null(array)), NULL_HASH, hashes)
    return hashes


def hash_rows(table: pa.Table, columns: Sequence[str]) -> Hashes:
    """(rows,) uint64: one hash of the values of several columns together."""
    combined = np.zeros(table.num_rows, np.uint64)
    for column in columns:
        combined = mix64(combined * np.uint64(31) + hash_array(table.column(column)))
    return combined
