"""Arrow lists as starts and lengths, so that choosing, cutting and reordering lists is one index.

Arrow allows lists that are slices of a longer child, and null lists that still span values: both are handled
here, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Integers = npt.NDArray[np.int64]
BLOCK = 32  # values of a list, on average, from which on blocks are faster than single values


def ranges(starts: Integers, lengths: Integers) -> Integers:
    """(sum of lengths,) int64: the integers from each start on, so many of them; starts, lengths (B,)."""
    if not lengths.all():
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    # the differences of the result, summed up in place: one array of its size, as page faults cost more than sums
    steps = np.ones(int(lengths.sum()), np.int64)
    if len(steps):
        steps[0] = starts[0]
        steps[np.cumsum(lengths[:-1])] = starts[1:] - (starts[:-1] + lengths[:-1] - 1)
    return np.cumsum(steps, out=steps)


def gather(values: pa.Array, starts: Integers, lengths: Integers) -> pa.Array:
    """(sum of lengths,): the values from each start on, so many of them; starts, lengths (B,). All within them."""
    kind, total = values.type, int(lengths.sum())
    if total <= BLOCK * len(lengths) or values.null_count or not pa.types.is_primitive(kind) or kind.bit_width < 8:
        return pc.take(values, pa.array(ranges(starts, lengths)), boundscheck=False)
    # plain values move as binary values, a list at once: every second one of [start, end, start, end, ...] is wanted
    offsets = np.stack([starts, starts + lengths], 1).reshape(-1)
    offsets = np.append(offsets, len(values)) + values.offset  # the last is the largest: Arrow checks that
    offsets *= kind.bit_width // 8
    buffers = [None, pa.py_buffer(offsets), values.buffers()[1]]
    blocks = pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)
    taken = pc.take(blocks, pa.array(np.arange(0, len(blocks), 2)), boundscheck=False)
    return pa.Array.from_buffers(kind, total, [None, taken.buffers()[2]])


@dataclass(frozen=True)
class Selection:
    """Chosen values of lists: from ``starts`` (B,) int64 on ``lengths`` (B,) int64 of the lists' flat values."""

    starts: Integers
    lengths: Integers

    def of(self, values: pa.Array) -> pa.Array:
        """(sum of lengths,): the chosen of ``values``."""
        return gather(values, self.starts, self.lengths)


@dataclass(frozen=True)
class Lists:
    """List i is ``values[starts[i] : starts[i] + lengths[i]]``; starts, lengths (R,) int64. Null: empty."""

    values: pa.Array
    starts: Integers
    lengths: Integers

    @staticmethod
    def of_scalars(values: pa.Array) -> Lists:
        """Every value as a list of one; null is the empty list."""
        return Lists(values, np.arange(len(values)), np.asarray(values.is_valid()).astype(np.int64))

    def without(self, rows: Integers, gone: npt.NDArray[np.bool_]) -> Lists:
        """The same lists, but those of ``rows`` (B,), each once, have no more their values that are ``gone`` (sum of
        the rows' lengths,). They lie behind all others."""
        starts, lengths = self.starts.copy(), self.lengths.copy()
        kept = gather(self.values, starts[rows], lengths[rows]).filter(pa.array(~gone))
        owner = np.repeat(np.arange(len(rows)), lengths[rows])
        lengths[rows] = np.bincount(owner[~gone], minlength=len(rows))
        starts[rows] = len(self.values) + np.cumsum(lengths[rows]) - lengths[rows]
        return Lists(pa.concat_arrays([self.values, kept]), starts, lengths)

    def select(self, rows: Integers, first: int | None = None, last: int | None = None) -> Selection:
        """The lists of ``rows`` (B,), in that order, cut to their first or last so many values."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        if last is not None:
            starts = starts + np.maximum(lengths - last, 0)
        limit = last if last is not None else first
        if limit is not None:
            lengths = np.minimum(lengths, limit)
        return Selection(starts, lengths)


def split_lists(array: pa.Array) -> Lists:
    """The lists of a list array. Raises TypeError for another type."""
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise TypeError(f"{array.type} is no list type")
    offsets = np.asarray(array.offsets).astype(np.int64)  # (R + 1,)
    lengths = np.diff(offsets)
    if array.null_count:
        lengths = np.where(np.asarray(array.is_null()), 0, lengths)
    return Lists(array.values, offsets[:-1], lengths)
