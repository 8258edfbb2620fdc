"""Request-level columns travel once: what a task has already staged of a request is found again, not staged again.

A log repeats the request-level columns on every impression. Of the rows that a task reads, the first of each request
keeps its copy; later rows, of any table of the task, that say the same share it. Values are compared, never only
hashes of them, so that a conflict within a request is never lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from roo_ray.schema import Schema
from roo_ray.sources.columns import as_array, take_table
from roo_ray.sources.compare import Ints, Mask, differing_rows, same_blocks
from roo_ray.sources.hashing import Hashes

NOT_FOUND = -1
SMALL_BYTES = 8_000_000  # smaller chunks of copies are merged: comparing with many costs more than copying them


@dataclass(frozen=True)
class Dealt:
    """The rows of one table in the order in which they are staged. ``order``: (rows,) by bucket and request;
    ``buckets``: (rows,) in that order; ``requests``: (rows,) hashes of the request keys, in that order."""

    order: Ints
    buckets: Ints
    requests: Hashes

    @property
    def starts(self) -> Mask:
        """(rows,) where, in order, another request may begin."""
        new = np.ones(len(self.order), np.bool_)
        new[1:] = (self.buckets[1:] != self.buckets[:-1]) | (self.requests[1:] != self.requests[:-1])
        return new


class SharedCopies:
    """The copies that one task has staged, up to ``most_bytes`` of them (then it begins anew), of a number of
    ``buckets``."""

    def __init__(self, schema: Schema, buckets: int, most_bytes: int) -> None:
        self.columns = schema.request_columns
        self.most_bytes = most_bytes
        self.staged = np.zeros(buckets, np.int64)  # (buckets,) copies so far
        self._forget()

    @property
    def bytes(self) -> int:
        """Of the copies that are remembered, in memory."""
        parts = [*self.chunks, *([] if self.others is None else [self.others])]
        return sum(int(part.nbytes) for part in parts)

    def share(self, table: pa.Table, dealt: Dealt) -> tuple[Mask, Ints, pa.Table]:
        """Which rows keep their copy, and whose copy each row uses.

        Returns (rows,) which rows, in order, are to be staged with their own copy; (rows,) the number of each row's
        copy among those that this task stages for its bucket; and the copies to stage, in order.
        """
        order, starts = dealt.order, dealt.starts
        heads = np.flatnonzero(starts)
        run = np.cumsum(starts) - 1  # (rows,) the row's run of one request
        known = self._find(dealt.requests[heads], dealt.buckets[heads])  # (runs,)
        number = np.full(len(order), NOT_FOUND, np.int64)
        again = self._alike(table, order, np.flatnonzero(known[run] != NOT_FOUND), known[run])
        number[again] = self.numbers[known[run[again]]]
        alike = np.flatnonzero(~starts & (known[run] == NOT_FOUND))
        for name in self.columns:
            alike = alike[~differing_rows(table.column(name), order[alike], order[heads[run[alike]]])]
        keeps = number == NOT_FOUND
        keeps[alike] = False
        number[keeps] = self._number(dealt.buckets[keeps])
        number[alike] = number[heads[run[alike]]]
        copies = take_table(table, order[keeps])
        new = heads[known == NOT_FOUND]
        self._add(copies, (np.cumsum(keeps) - 1)[new], dealt.requests[new], dealt.buckets[new], number[new])
        return keeps, number, copies

    def _forget(self) -> None:
        # what has no fixed width stays in the chunks that it came in, the other columns of all copies lie in one table
        self.chunks: list[pa.Table] = []
        self.starts: list[int] = []  # the first copy of each chunk
        self.others: pa.Table | None = None
        self.rows = 0
        self.requests = np.zeros(0, np.uint64)  # (known,) sorted
        self.buckets, self.numbers, self.copies = (np.zeros(0, np.int64) for _ in range(3))

    def _find(self, requests: Hashes, buckets: Ints) -> Ints:
        """(N,) the position of the known copy of each request in its bucket, or NOT_FOUND."""
        if not len(self.requests):
            return np.full(len(requests), NOT_FOUND, np.int64)
        at = np.minimum(np.searchsorted(self.requests, requests), len(self.requests) - 1)
        found: Ints = np.where((self.requests[at] == requests) & (self.buckets[at] == buckets), at, NOT_FOUND)
        return found

    def _alike(self, table: pa.Table, order: Ints, rows: Ints, known: Ints) -> Ints:
        """Those of ``rows`` (positions in ``order``) that say what their known copies say."""
        if self.others is None or not len(rows):
            return rows[:0]
        its = self.copies[known[rows]]  # (rows,) the copy of each
        for name in self.others.column_names:
            alike = ~differing_rows(table.column(name), order[rows], its, self.others.column(name))
            rows, its = rows[alike], its[alike]
        blocks = {name: as_array(table.column(name)) for name in self.chunks[0].column_names}
        chunk = np.searchsorted(self.starts, its, side="right") - 1
        found = [rows[:0]]
        for number in np.unique(chunk).tolist():
            here = chunk == number
            some, copy = rows[here], its[here] - self.starts[number]
            for name, array in blocks.items():
                same = same_blocks(array, order[some], self.chunks[number].column(name), copy)
                some, copy = some[same], copy[same]
            found.append(some)
        return np.concatenate(found)

    def _number(self, buckets: Ints) -> Ints:
        """(N,) the numbers of new copies in ``buckets`` (sorted) within each bucket."""
        counts = np.bincount(buckets, minlength=len(self.staged))
        before = np.cumsum(counts) - counts
        numbers = np.arange(len(buckets)) - before[buckets] + self.staged[buckets]
        self.staged += counts
        return numbers

    def _add(self, copies: pa.Table, rows: Ints, requests: Hashes, buckets: Ints, numbers: Ints) -> None:
        """Remembers ``copies``, of which ``rows`` are the first ones of requests."""
        if not len(rows):
            return
        if self.bytes + copies.nbytes > self.most_bytes:
            self._forget()
        if copies.nbytes > self.most_bytes:
            return
        blocks = [field.name for field in copies.schema if not pa.types.is_primitive(field.type)]
        others = copies.drop_columns(blocks)
        first, self.rows = self.rows, self.rows + copies.num_rows
        self.others = others if self.others is None else pa.concat_tables([self.others, others]).combine_chunks()
        every = np.concatenate([self.requests, requests])
        order = np.argsort(every, kind="stable")
        self.requests = every[order]
        self.copies = np.concatenate([self.copies, rows + first])[order]
        self.buckets = np.concatenate([self.buckets, buckets])[order]
        self.numbers = np.concatenate([self.numbers, numbers])[order]
        self.chunks.append(copies.select(blocks))
        self.starts.append(first)
        while len(self.chunks) > 1 and sum(chunk.nbytes for chunk in self.chunks[-2:]) < SMALL_BYTES:
            last, before = self.chunks.pop(), self.chunks.pop()
            self.starts.pop()
            self.chunks.append(pa.concat_tables([before, last]).combine_chunks())
