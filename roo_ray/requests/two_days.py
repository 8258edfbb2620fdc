"""Requests whose rows have times on several UTC days, where ``build.on_request_conflict`` says which one counts.

A row belongs to the shard of its day, so the rows of such a request would never meet. The count therefore stages
(hash of the request key, day), by ranges of the hash; hashes with several days are dealt to buckets of their own,
at the end of the exchange's; there each request is settled by the rule, and its rows are dealt on to the bucket of
the one day, where they are grouped as all others are. Hashes only choose who makes this detour; requests are told
apart by their keys. A build without such requests goes the same way as with ``fail``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.requests.exchange import Exchange
from roo_ray.requests.staging import Piece, Runs, StagingWriter, read_pieces
from roo_ray.requests.uniqueness import HasStaging, split_range
from roo_ray.schema import Schema
from roo_ray.sources.compare import Ints, Mask
from roo_ray.sources.hashing import Hashes

MOST_REQUESTS = 100_000
TOGETHER = 1000  # requests settled in one task
KEY_DAYS = pa.schema([("hash", pa.uint64()), ("day", pa.int64())])


@dataclass(frozen=True)
class TwoDays:
    """The requests to settle. ``hashes``: of their keys, sorted; none for a build that has none."""

    hashes: Hashes

    @property
    def buckets(self) -> int:
        """How many buckets, beyond those of the exchange, their rows are dealt to."""
        return -(-len(self.hashes) // TOGETHER)

    def holds(self, requests: Hashes) -> Mask:
        """(N,) which request hashes are among them."""
        return np.isin(requests, self.hashes)

    def bucket_of(self, exchange: Exchange, days: Ints, users: Hashes, requests: Hashes) -> Ints:
        """``Exchange.bucket_of``, with the rows of these requests in buckets of their own."""
        if not len(self.hashes):
            return exchange.bucket_of(days, users, requests)
        theirs = self.holds(requests)
        buckets = np.empty(len(days), np.int64)
        buckets[~theirs] = exchange.bucket_of(days[~theirs], users[~theirs], requests[~theirs])
        buckets[theirs] = exchange.buckets + np.searchsorted(self.hashes, requests[theirs]) // TOGETHER
        return buckets


NO_TWO_DAYS = TwoDays(np.zeros(0, np.uint64))


def stage_days(staging: str, number: int, tables: Iterable[tuple[Hashes, Ints]], ranges: int) -> Runs:
    """Stages the distinct (request hash, UTC day) of a unit's tables, sorted and by range of the hash."""
    parts = [_distinct(hashes, days) for hashes, days in tables]
    hashes, days = _distinct(
        np.concatenate([np.zeros(0, np.uint64), *(some for some, _ in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(some for _, some in parts)]),
    )
    with StagingWriter(staging, f"days-{number:06d}.arrow", KEY_DAYS) as writer:
        writer.write_sorted(pa.table([hashes, days], schema=KEY_DAYS), np.arange(ranges), split_range(hashes, ranges))
        return writer.runs


def _distinct(hashes: Hashes, days: Ints) -> tuple[Hashes, Ints]:
    """The distinct pairs, in order."""
    order = np.lexsort([days, hashes])
    hashes, days = hashes[order], days[order]
    new = np.append(True, (hashes[1:] != hashes[:-1]) | (days[1:] != days[:-1]))[: len(hashes)]
    return hashes[new], days[new]


def find_two_days(plan: HasStaging, pieces: Sequence[Piece], built: Sequence[int]) -> Hashes:
    """The first hashes of a range, in order, that have several days; with ``built`` days only those with one of
    these. A few more than ``MOST_REQUESTS`` at most."""
    batches = list(read_pieces(plan.staging, pieces))
    if not batches:
        return np.zeros(0, np.uint64)
    hashes, days = _distinct(
        np.concatenate([np.asarray(batch.column(0)) for batch in batches]),
        np.concatenate([np.asarray(batch.column(1)) for batch in batches]),
    )
    again = np.append(False, hashes[1:] == hashes[:-1])
    several = np.unique(hashes[again])
    if len(built):
        several = several[np.isin(several, hashes[np.isin(days, np.asarray(built))])]
    return several[: MOST_REQUESTS + 1]


def two_days(found: Sequence[Hashes], schema: Schema) -> TwoDays:
    """The requests to settle, of all ranges. Raises DataError where they are so many that the column is wrong."""
    hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))
    if len(hashes) > MOST_REQUESTS:
        raise DataError(
            f"more than {MOST_REQUESTS:,} requests have times '{schema.keys.time}' on several UTC days; so many are no "
            "conflicts that build.on_request_conflict is for: correct keys.time (the request's time, not the "
            "impression's) or add columns to keys.request"
        )
    return TwoDays(hashes)
