"""Comparing Arrow values in bulk: order codes, digests and equality of rows, nulls, NaNs and lists included.

Two nulls are equal here, and two NaNs are: what is compared is whether a log says the same thing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError
from roo_ray.sources.columns import as_array, byte_rows, is_list, list_parts
from roo_ray.sources.hashing import NULL_HASH, Hashes, hash_array, mix64

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
TOKENS_AT_ONCE = 4_000_000
VALUE_BYTES = 8  # of a value, at most


def sort_codes(column: pa.Array | pa.ChunkedArray) -> Ints:
    """(N,) int64 codes of a scalar column: equal values have equal codes, and codes sort as the values do,
    nulls last. Codes of two columns are not comparable. Raises DataError for lists and other types that have
    no order."""
    array = as_array(column)
    kind = array.type
    if array.null_count == 0:
        if pa.types.is_timestamp(kind) or pa.types.is_date64(kind) or pa.types.is_time64(kind):
            return np.asarray(array.cast(pa.int64()))
        if pa.types.is_uint64(kind):
            flipped: Ints = (np.asarray(array) ^ np.uint64(1 << 63)).view(np.int64)
            return flipped
        if pa.types.is_integer(kind):
            return np.asarray(array).astype(np.int64)
    if pa.types.is_null(kind):
        return np.zeros(len(array), np.int64)
    try:
        ranks = pc.rank(array, sort_keys="ascending", tiebreaker="dense")
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        raise DataError(f"values of type {kind} have no order and cannot be keys") from None
    return np.asarray(ranks).astype(np.int64)


def digest_rows(column: pa.Array | pa.ChunkedArray) -> Hashes:
    """(N,) uint64 digest of each value, of any type. Equal values have equal digests."""
    array = as_array(column)
    kind = array.type
    if is_list(kind):
        lengths, values = list_parts(array)
        starts = np.cumsum(lengths) - lengths
        position = np.arange(len(values), dtype=np.int64) - np.repeat(starts, lengths)
        tokens = mix64(digest_rows(values) ^ mix64(position.view(np.uint64)))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(tokens, dtype=np.uint64)])
        hashes = mix64(sums[starts + lengths] - sums[starts] + lengths.view(np.uint64))
    elif pa.types.is_struct(kind):
        hashes = np.zeros(len(array), np.uint64)
        for field in array.flatten():
            hashes = mix64(hashes * np.uint64(31) + digest_rows(field))
    elif pa.types.is_floating(kind):
        numbers = np.asarray(pc.fill_null(array.cast(pa.float64()), 0.0))
        hashes = mix64(np.where(np.isnan(numbers), np.nan, numbers + 0.0).view(np.uint64))
    elif pa.types.is_null(kind):
        return np.full(len(array), NULL_HASH)
    else:
        return hash_array(array if _is_hashable(kind) else array.cast(pa.string()))
    return np.where(np.asarray(array.is_null()), NULL_HASH, hashes) if array.null_count else hashes


def _is_hashable(kind: pa.DataType) -> bool:
    types = pa.types
    checks = (types.is_integer, types.is_boolean, types.is_temporal, types.is_string, types.is_binary)
    return any(check(kind) for check in checks)


def differing_rows(
    column: pa.Array | pa.ChunkedArray, left: Ints, right: Ints, other: pa.Array | pa.ChunkedArray | None = None
) -> Mask:
    """(N,) bool: whether the values at rows ``left`` (N,) of a column and at rows ``right`` (N,) of ``other``, of
    the same type (default: the same column), differ; values are compared, never hashes of them. Lists are compared
    element by element, in slices of bounded memory."""
    array = as_array(column)
    second = array if other is None else as_array(other)
    kind = array.type
    if is_list(kind):
        return _differing_lists(array, left, second, right)
    if pa.types.is_struct(kind):
        differs: Mask = _null_mask(array)[left] != _null_mask(second)[right]
        for field, its in zip(array.flatten(), second.flatten(), strict=True):
            differs |= differing_rows(field, left, right, its)
        return differs
    if pa.types.is_null(kind):
        return np.zeros(len(left), np.bool_)
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind) or pa.types.is_time64(kind):
        kind = pa.int64()
    elif pa.types.is_boolean(kind):
        kind = pa.int8()
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return _differing_codes(array, left, second, right)
    a, b = _numbers(array, kind)[left], _numbers(second, kind)[right]
    unequal: Mask = a != b
    if pa.types.is_floating(kind):
        unequal &= ~(np.isnan(a) & np.isnan(b))
    return _unequal_or_null(unequal, array, left, second, right)


def _numbers(array: pa.Array, kind: pa.DataType) -> npt.NDArray[Any]:
    numbers = array if array.type == kind else array.cast(kind)
    return np.asarray(pc.fill_null(numbers, pa.scalar(0, kind)) if numbers.null_count else numbers)


def _differing_codes(array: pa.Array, left: Ints, other: pa.Array, right: Ints) -> Mask:
    """``differing_rows`` of text and other values that Arrow can only encode."""
    if other is array:
        codes = _numbers(array.dictionary_encode().indices, pa.int32())
        unequal: Mask = codes[left] != codes[right]
    else:
        both = pa.concat_arrays([array.take(pa.array(left)), other.take(pa.array(right))])
        codes = _numbers(both.dictionary_encode().indices, pa.int32())
        unequal = codes[: len(left)] != codes[len(left) :]
    return _unequal_or_null(unequal, array, left, other, right)


def _unequal_or_null(unequal: Mask, array: pa.Array, left: Ints, other: pa.Array, right: Ints) -> Mask:
    if not (array.null_count or other.null_count):
        return unequal
    here, there = _null_mask(array)[left], _null_mask(other)[right]
    return np.where(here | there, here != there, unequal)


def _null_mask(array: pa.Array) -> Mask:
    mask: Mask = np.asarray(array.is_null())
    return mask


def _differing_lists(array: pa.Array, left: Ints, other: pa.Array, right: Ints) -> Mask:
    lengths, values = list_parts(array)
    starts = np.cumsum(lengths) - lengths
    its_lengths, its_values = (lengths, values) if other is array else list_parts(other)
    its_starts = np.cumsum(its_lengths) - its_lengths
    differs: Mask = lengths[left] != its_lengths[right]
    if array.null_count or other.null_count:
        differs |= _null_mask(array)[left] != _null_mask(other)[right]
    apart = left != right if other is array else True
    rows = np.flatnonzero(~differs & apart & (lengths[left] > 0))
    rows = rows[~_same_bytes(array, left[rows], other, right[rows], lengths[left[rows]])]
    at, its_at = starts[left[rows]], its_starts[right[rows]]
    sizes = lengths[left[rows]]
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(rows):
        done = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + TOKENS_AT_ONCE, side="right")))
        size = sizes[begin:end]
        first = np.cumsum(size) - size
        index = np.repeat(at[begin:end] - first, size) + np.arange(int(size.sum()))
        its_index = index + np.repeat(its_at[begin:end] - at[begin:end], size)
        unequal = differing_rows(values, index, its_index, its_values)
        differs[rows[begin:end]] = np.logical_or.reduceat(unequal, first)
        begin = end
    return differs


def same_blocks(column: pa.Array | pa.ChunkedArray, left: Ints, other: pa.Array | pa.ChunkedArray, right: Ints) -> Mask:
    """(N,) bool: whether the lists or texts at rows ``left`` and those of ``other`` at ``right`` have equal bytes, or
    are both null: ``differing_rows`` without what only looks different (0.0 and -0.0). Other types go by values."""
    array, second = as_array(column), as_array(other)
    ours, its = _blocks(array), _blocks(second)
    if ours is None or its is None:
        return ~differing_rows(array, left, right, second)
    sizes = _sizes(ours)[left]
    some = np.flatnonzero(sizes == _sizes(its)[right])  # so that no more than the left side's bytes are copied
    same = np.zeros(len(left), np.bool_)
    same[some] = _equal_blocks(ours, left[some], its, right[some], sizes[some] // VALUE_BYTES)
    if array.null_count and second.null_count:
        same |= _null_mask(array)[left] & _null_mask(second)[right]
    return same


def _blocks(array: pa.Array) -> pa.Array | None:
    types = pa.types
    text = types.is_string(array.type) or types.is_large_string(array.type) or types.is_binary(array.type)
    return array if text else byte_rows(array)


def _sizes(blocks: pa.Array) -> Ints:
    """(N,) bytes of each; 0 of nulls."""
    sizes: Ints = np.asarray(pc.fill_null(pc.binary_length(blocks), 0)).astype(np.int64)
    return sizes


def _same_bytes(array: pa.Array, left: Ints, other: pa.Array, right: Ints, lengths: Ints) -> Mask:
    """(N,) bool: whether the lists at rows ``left`` and those of ``other`` at ``right``, of the same ``lengths``, have
    equal bytes, and so are equal. False where that is not known: for lists of text, lists or nulls."""
    ours, its = byte_rows(array), byte_rows(other)
    if ours is None or its is None:
        return np.zeros(len(left), np.bool_)
    return _equal_blocks(ours, left, its, right, lengths)


def _equal_blocks(ours: pa.Array, left: Ints, its: pa.Array, right: Ints, lengths: Ints) -> Mask:
    """(N,) bool: whether binary values are equal; false for nulls. So many at a time that their ``lengths`` (N,)
    stay within bounds."""
    same = np.zeros(len(left), np.bool_)
    parts = np.flatnonzero(np.diff(np.cumsum(lengths) // TOKENS_AT_ONCE, prepend=-1))
    for begin, end in pairwise([*parts.tolist(), len(left)]):
        taken = ours.take(pa.array(left[begin:end])), its.take(pa.array(right[begin:end]))
        same[begin:end] = np.asarray(pc.fill_null(pc.equal(*taken), False).cast(pa.uint8())).view(np.bool_)
    return same


def same_as_previous(codes: Sequence[Ints], order: Ints) -> Mask:
    """(N,) bool: whether each row, in ``order``, equals the one before it in all ``codes``; the first does
    not."""
    same = np.ones(len(order), np.bool_)
    same[:1] = False
    for code in codes:
        ordered = code[order]
        same[1:] &= ordered[1:] == ordered[:-1]
    return same
