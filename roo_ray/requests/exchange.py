"""Where each row goes: the exchange by day and user, planned from a count of the rows.

A request belongs to the shard of its UTC day and its user's hash, so that files hold whole days of whole users.
A user too heavy for one shard is salted: cut by the hash of the request key, never through a request. A shard is
grouped in buckets of bounded memory, one after the other. All of it is a pure function of the counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roo_ray.config import Build
from roo_ray.errors import DataError
from roo_ray.sources.compare import Ints
from roo_ray.sources.hashing import Hashes

DAY_BITS = SLOT_BITS = 16
CUT_BITS = 32
SKETCH = 1024
BUCKETS_PER_SHARD = 8
LEAST_SHARDS, LEAST_BYTES = 4, 32_000_000
COMPRESSION = 4.0  # request rows in memory to bytes on disk, about
IMPRESSION_BYTES = 32  # an impression's own columns in memory, about

Codes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Survey:
    """A count of rows. Per cell (UTC day, slot of the user's hash): ``rows``, and ``copies`` of the request-level
    columns that will travel (rows of one request in one table share one). ``sketch``: the smallest hashes of
    request keys, from which the number of requests is estimated; ``bytes``: of all rows in memory, about."""

    days: Ints
    slots: Ints
    rows: Ints
    copies: Ints
    sketch: Hashes
    bytes: int

    @property
    def total_rows(self) -> int:
        """Rows in all cells."""
        return int(self.rows.sum())

    @property
    def requests(self) -> float:
        """About the number of distinct request keys (3 %)."""
        if len(self.sketch) < SKETCH:
            return float(len(self.sketch))
        return (SKETCH - 1) * 2.0**64 / float(self.sketch[-1])


def survey_rows(days: Ints, users: Hashes, requests: Hashes, size: int) -> Survey:
    """The survey of one table, from each row's day, user hash and request hash, and the table's bytes."""
    slots = (users >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
    cell, first, inverse, rows = np.unique(
        (days << SLOT_BITS) | slots, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort([requests, inverse])
    same = (requests[order][1:] == requests[order][:-1]) & (inverse[order][1:] == inverse[order][:-1])
    shared = np.bincount(inverse[order][1:][same], minlength=len(cell))
    return Survey(
        days=days[first],
        slots=slots[first],
        rows=rows.astype(np.int64),
        copies=rows - shared,
        sketch=np.unique(requests)[:SKETCH],
        bytes=size,
    )


def add_surveys(parts: Iterable[Survey]) -> Survey:
    """The survey of all rows together."""
    every = list(parts)
    days, slots, rows, copies = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(part, name) for part in every)])
        for name in ("days", "slots", "rows", "copies")
    )
    _, first, inverse = np.unique((days << SLOT_BITS) | slots, return_index=True, return_inverse=True)
    return Survey(
        days=days[first],
        slots=slots[first],
        rows=np.bincount(inverse, rows, len(first)).astype(np.int64),
        copies=np.bincount(inverse, copies, len(first)).astype(np.int64),
        sketch=np.unique(np.concatenate([np.zeros(0, np.uint64), *(part.sketch for part in every)]))[:SKETCH],
        bytes=sum(part.bytes for part in every),
    )


@dataclass(frozen=True)
class Shard:
    """A user shard of a day: ``number`` within the day, and its buckets ``first .. last - 1``."""

    day: int
    number: int
    first: int
    last: int


@dataclass(frozen=True)
class Exchange:
    """``days``: (D,) the UTC days, in order; ``starts``: (buckets,) the first code of each bucket; ``shards``: in
    order of day and number, together all buckets."""

    days: Ints
    starts: Codes
    shards: list[Shard]

    @property
    def buckets(self) -> int:
        """Buckets of all shards."""
        return len(self.starts)

    def bucket_of(self, days: Ints, users: Hashes, requests: Hashes) -> Ints:
        """(N,) the bucket of each row, from its day, user hash and request hash. Raises DataError for a day that
        the survey has not seen: the input changed in between."""
        rank = np.searchsorted(self.days, days)
        known = rank < len(self.days)
        if not (known.all() and (self.days[rank] == days).all()):
            raise DataError("the source's files changed during the build (rows of a new day); run it again")
        codes = _code(rank, (users >> np.uint64(64 - SLOT_BITS)).astype(np.int64), requests >> np.uint64(CUT_BITS))
        return np.maximum(np.searchsorted(self.starts, codes, side="right").astype(np.int64) - 1, 0)


def _code(rank: Ints, slots: Ints, cuts: Codes) -> Codes:
    high = (rank << SLOT_BITS) | slots
    codes: Codes = (high.astype(np.uint64) << np.uint64(CUT_BITS)) | cuts
    return codes


def plan_exchange(survey: Survey, build: Build, impressions: bool) -> Exchange:
    """Shards and buckets for what was counted. ``impressions``: rows are impressions, not whole requests.

    With ``build.buckets`` each day has so many shards of about equal rows, whatever the order of the input.
    Raises DataError for times that span more days than codes allow.
    """
    days, rank = np.unique(survey.days, return_inverse=True)
    if len(days) >= 1 << DAY_BITS:
        raise DataError(f"the requests' times span {len(days):,} days; correct the column that keys.time names")
    width = survey.bytes / max(survey.total_rows, 1)  # bytes of a row
    own = survey.rows.astype(np.float64) * (IMPRESSION_BYTES if impressions else 0)
    staged: Floats = survey.copies.astype(np.float64) * width + own
    per_request = survey.total_rows / max(survey.requests, 1) if impressions else 1.0
    stored: Floats = (survey.rows.astype(np.float64) * (width / per_request) + own) / COMPRESSION
    weight = survey.rows.astype(np.float64) if build.buckets else stored
    wanted = _shards_per_day(_sums(rank, stored), _sums(rank, staged), build)

    codes, shard_of, sizes = [], [], []
    shards_so_far = 0
    for day in range(len(days)):
        cells = np.flatnonzero(rank == day)
        cells = cells[np.argsort(survey.slots[cells])]
        target = weight[cells].sum() / wanted[day]
        cell, start, end = _cut(np.ceil(weight[cells] / target))  # a heavy user's cell in pieces
        part = weight[cells][cell] * (end - start)
        middle = np.cumsum(part) - part / 2
        shard = np.minimum((middle / target).astype(np.int64), wanted[day] - 1)
        piece, low, high = _cut(np.ceil(staged[cells][cell] * (end - start) / build.bucket_bytes))
        begin = start[piece] + low * (end - start)[piece]
        sizes.append(staged[cells][cell][piece] * (end - start)[piece] * (high - low))
        cuts = np.floor(begin * 2.0**CUT_BITS).astype(np.uint64)
        codes.append(_code(np.full(len(piece), day), survey.slots[cells][cell][piece], cuts))
        shard_of.append(shards_so_far + shard[piece])
        shards_so_far += wanted[day]
    return _assemble(days, np.concatenate(codes), np.concatenate(shard_of), np.concatenate(sizes), wanted, build)


def _shards_per_day(stored: Floats, staged: Floats, build: Build) -> Ints:
    """(D,) shards of each day, from the bytes that it will take on disk and between the stages."""
    if build.buckets:
        return np.full(len(stored), build.buckets, np.int64)
    by_file = np.round(stored / build.file_bytes)
    by_task = np.ceil(staged / (BUCKETS_PER_SHARD * build.bucket_bytes))
    at_least = np.minimum(-(-LEAST_SHARDS // len(stored)), np.ceil(staged / LEAST_BYTES))
    most: Floats = np.maximum.reduce([by_file, by_task, at_least, np.ones(len(stored))])
    return most.astype(np.int64)


def _sums(groups: Ints, values: Floats) -> Floats:
    sums: Floats = np.bincount(groups, values).astype(np.float64)
    return sums


def _cut(pieces: Floats) -> tuple[Ints, Floats, Floats]:
    """(which, begin, end) of the pieces when item i is cut into ``pieces[i]`` (at least 1) equal ones, begin and
    end in parts of 1."""
    count = np.maximum(pieces, 1).astype(np.int64)
    which = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    return which, number / count[which], (number + 1) / count[which]


def _assemble(days: Ints, codes: Codes, shard_of: Ints, sizes: Floats, wanted: Ints, build: Build) -> Exchange:
    """Packs pieces, in order of their codes, into buckets within their shards."""
    new_shard = np.append(True, shard_of[1:] != shard_of[:-1])
    before = np.cumsum(sizes) - sizes
    since = before - np.maximum.accumulate(np.where(new_shard, before, 0.0))  # bytes of the shard before the piece
    fill = ((since + sizes / 2) / build.bucket_bytes).astype(np.int64)
    starts = np.flatnonzero(new_shard | np.append(True, fill[1:] != fill[:-1]))
    firsts = np.searchsorted(starts, np.flatnonzero(new_shard))
    lasts = np.append(firsts[1:], len(starts))
    day_of = np.repeat(np.arange(len(days)), wanted)
    number_of = np.concatenate([np.arange(count) for count in wanted])
    shards = [
        Shard(int(days[day_of[shard]]), int(number_of[shard]), int(first), int(last))
        for shard, first, last in zip(shard_of[new_shard], firsts, lasts, strict=True)
    ]
    return Exchange(days, codes[starts], shards)
