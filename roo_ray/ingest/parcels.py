"""Parcels: the windows of one rank that one task reads and one block carries.

A task, a block and a call cost Ray the same some ten milliseconds whatever is in them, which is as much as reading a
window of a small data set takes. So windows travel together, up to a size; what is in which parcel is a matter of
transport, not of the plan: the stream does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from roo_ray.ingest.pack import TAGS
from roo_ray.ingest.plan import Window
from roo_ray.ingest.units import UnitRef
from roo_ray.schema import Schema

PARCEL_BYTES = 64_000_000
PARCEL_WINDOWS = 64
STORE_SHARE = 8  # parcels of every rank that fit into the cluster's object stores: read, waiting and trained on


def parcel_bytes(object_store: float, ranks: int) -> int:
    """The size of a parcel where ``ranks`` are fed through so many bytes of object store."""
    return int(min(PARCEL_BYTES, object_store / (STORE_SHARE * ranks)))


@dataclass(frozen=True)
class Parcel:
    """Consecutive windows of a rank's lanes, in the order in which they are needed. ``bytes``: an estimate."""

    rank: int
    windows: tuple[Window, ...]
    bytes: int


class PackedSize:
    """Estimates the bytes of packed windows from what the manifest knows: requests, impressions, history events."""

    def __init__(self, schema: Schema) -> None:
        self.request = 8 * 4 + 4 * schema.dense_width("request") + 8 * len(schema.select("request", "ids"))
        ids, labels = len(schema.select("impression", "ids")), len(schema.labels)
        self.impression = 8 * (1 + ids + labels) + 4 * schema.dense_width("impression")
        per_event = [8 * len(f.sequence_ids) + 4 * len(f.sequence_dense) + 8 * bool(f.time) for f in schema.sequences]
        self.event = sum(per_event) / max(len(per_event), 1)  # the manifest counts the events of all sequences

    def of(self, units: Iterable[UnitRef]) -> int:
        """Of the batches that the requests of ``units`` make up."""
        sizes = ((u.requests * self.request, u.impressions * self.impression, u.tokens * self.event) for u in units)
        return int(sum(map(sum, sizes)))


def parcels(
    windows: Iterable[Window],
    owner: Mapping[int, int],
    size: PackedSize,
    most_bytes: int,
    most_windows: int = PARCEL_WINDOWS,
) -> Iterator[Parcel]:
    """The windows in parcels, each of one rank (``owner``: of each lane), in the order in which their first windows
    are needed. A parcel holds at most ``most_bytes`` (or one window) and ``most_windows``; the first parcel of a
    rank is one window and each later one at most twice the one before, so that the first batch comes soon."""
    open_: dict[int, list[Window]] = {}  # of each rank, in the order in which they were begun
    held: dict[int, int] = {}
    allowed = dict.fromkeys(owner.values(), 1)

    def close(rank: int) -> Parcel:
        allowed[rank] = min(2 * allowed[rank], most_windows)
        return Parcel(rank, tuple(open_.pop(rank)), held.pop(rank))

    for window in windows:
        rank, bytes_ = owner[window.lane], size.of(window.units)
        if rank in open_ and held[rank] + bytes_ > most_bytes:
            yield close(rank)
        open_.setdefault(rank, []).append(window)
        held[rank] = held.get(rank, 0) + bytes_
        if len(open_[rank]) >= allowed[rank]:
            yield close(rank)
    for rank in list(open_):
        yield close(rank)


def split_parcel(table: pa.Table) -> Iterator[pa.Table]:
    """The packed windows in a parcel's table, one after the other, without a copy."""
    if not table.num_rows:
        return
    tags = np.stack([table.column(tag).to_numpy() for tag in TAGS[:3]])  # epoch, lane, window
    begins = np.flatnonzero(np.append(True, (tags[:, 1:] != tags[:, :-1]).any(0)))
    ends = np.append(begins[1:], table.num_rows)
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        yield table.slice(begin, end - begin)
