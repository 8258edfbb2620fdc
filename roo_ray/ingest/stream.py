"""The stream of a rank: the batches of its lanes, step by step, in the planned order.

A reader delivers the windows of the rank's lanes in the order they are needed, over all epochs; a background
thread takes them in while the trainer computes, as long as a lane has fewer than ``prefetch_batches`` batches at
hand. The readers differ only in where the reading function runs: in this thread, or in Ray Data tasks (``feed``).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.ingest.buffers import Buffers, Taken
from roo_ray.ingest.feed import blocks_of_rank, held_cpus, open_feed
from roo_ray.ingest.pack import COUNTS, pack_window
from roo_ray.ingest.plan import Position, lanes_of_rank
from roo_ray.ingest.settings import StreamSettings as StreamSettings

NO_COUNTS = dict.fromkeys(COUNTS, 0.0)


@dataclass(frozen=True)
class Step:
    """What a rank trains on in a step.

    ``lanes_alive``: the rank's lanes that delivered; with 0 the batch is the weightless dummy, and ``requests``
    and ``impressions`` are 0. ``wait_seconds``: what the trainer spent on getting the step: waiting for its
    batches and joining them. ``counts``: ``pack.COUNTS``, summed over the lanes; ``cost`` among them.
    ``position``: per lane of this rank (window in progress, batches taken in it) after this step;
    ``skipped_units``: of that window, the places of the units that could not be read (``Position``).
    """

    batch: RequestBatch
    lanes_alive: int
    requests: int
    impressions: int
    wait_seconds: float
    counts: dict[str, float] = field(default_factory=dict)
    position: dict[int, tuple[int, int]] = field(default_factory=dict)
    skipped_units: dict[int, tuple[int, ...]] = field(default_factory=dict)


class RankStream:
    """The batches of a rank's lanes. ``epoch(e)`` yields steps for ever: after the end of the epoch the dummy,
    until the ranks agree that no lane is alive and stop iterating. Epochs are asked for in the order of
    ``settings.epochs``; leaving one early passes over its rest.

    ``feed``: what all ranks share (``shared_feed``); with the Ray Data reader and none, the rank has its own.
    ``skipped_requests``: of shards that could not be read (``on_bad_shard: skip``), in the steps so far.
    Raises DataError for a data set or a side without data, ConfigError for more ranks than lanes.
    """

    def __init__(self, settings: StreamSettings, rank: int, world_size: int, feed: Any = None) -> None:
        self.settings = settings
        self.lanes = lanes_of_rank(rank, world_size, settings.ingest.lanes)
        packing, plans = settings.open()
        self._left = list(settings.epochs)
        start = settings.start
        self._start = start
        self.skipped_requests = 0
        self._feed = feed  # the process that opened it keeps it alive, until all ranks are done
        lanes = self.lanes
        prefetch = settings.ingest.prefetch_batches
        self._buffers = Buffers(settings.epochs, plans.num_windows, lanes, settings.schema, prefetch, start)
        remote = settings.ingest.reader == "ray_data"

        def source() -> Iterator[pa.Table]:
            if not remote:
                return (pack_window(packing, window) for window in plans.reading_order(lanes, start))
            if feed is not None:
                return blocks_of_rank(feed, rank)
            return blocks_of_rank(open_feed(settings, [lanes], held_cpus(world_size)), 0)

        # the thread knows the buffers, not the stream: a stream that nobody holds any more ends its thread
        weakref.finalize(self, self._buffers.stop)
        self._thread = threading.Thread(
            target=self._buffers.fill, args=(source,), name=f"roo-ray-ingest-{settings.side}", daemon=True
        )
        self._thread.start()

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch on this rank: each step joins the batches of the lanes, in lane order; a
        drained lane contributes nothing. Raises the reader's DataError; ValueError for an epoch not to come."""
        if epoch not in self._left:
            raise ValueError(f"epoch {epoch} is not one of those to come: {self._left}")
        self._left = self._left[self._left.index(epoch) + 1 :]
        return self._steps(epoch)

    def _steps(self, epoch: int) -> Iterator[Step]:
        dummy = dummy_batch(self.settings.schema)
        start = self._start
        position = {lane: start.lanes[lane] if start and start.epoch == epoch else (0, 0) for lane in self.lanes}
        units: dict[int, tuple[int, ...]] = {}
        while True:
            began = time.perf_counter()
            taken = {lane: self._buffers.take(lane, epoch) for lane in self.lanes}
            parts: list[Taken] = []
            skipped = 0
            for lane, part in taken.items():
                if part is not None:
                    parts.append(part)
                    position[lane], units[lane] = part.position, part.skipped_units
                else:
                    windows, passed = self._buffers.at_end(lane, epoch)
                    position[lane], units[lane] = (windows, 0), ()
                    skipped += passed
            batch = RequestBatch.concat([part.batch() for part in parts]) if parts else dummy
            counts = {name: sum((part.count(name) for part in parts), start=0.0) for name in COUNTS}
            counts["skipped_requests"] += skipped
            self.skipped_requests += int(counts["skipped_requests"])
            waited = time.perf_counter() - began
            requests, impressions = int(counts["requests"]), batch.total_impressions if parts else 0
            yield Step(batch, len(parts), requests, impressions, waited, counts, dict(position), dict(units))

    def close(self) -> None:
        """Ends the reader and waits for its thread."""
        self._buffers.stop()
        self._thread.join(timeout=30)


def shared_feed(settings: StreamSettings, world_size: int) -> Any:
    """The feed of all ranks' streams with these settings, or None where they read by themselves. One rank opens
    it and gives the others the handle; it lives as long as the process that opened it."""
    if settings.ingest.reader != "ray_data":
        return None
    owners = [lanes_of_rank(rank, world_size, settings.ingest.lanes) for rank in range(world_size)]
    return open_feed(settings, owners, held_cpus(world_size))


def whole_position(
    epoch: int, lanes: Mapping[int, tuple[int, int]], skipped: Mapping[int, tuple[int, ...]] | None = None
) -> Position:
    """A run's position from that of all its lanes: (window in progress, batches taken in it), and the places of the
    units of that window that were passed over, where any were."""
    units = tuple((skipped or {}).get(lane, ()) for lane in sorted(lanes))
    return Position(epoch, tuple(lanes[lane] for lane in sorted(lanes)), units if any(units) else ())
