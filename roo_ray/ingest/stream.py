"""The stream of a rank: the batches of its lanes, step by step, in the planned order.

A reader delivers the windows of the rank's lanes in the order they are needed, over all epochs; a background
thread takes them in while the trainer computes, as long as a lane has fewer than ``prefetch_batches`` batches
at hand. The readers differ only in where the reading function runs: in this thread, or in Ray Data tasks.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from roo_ray.config import Holdout, Ingest
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.ingest.holdout import check_sides, select_files
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import EpochPlan, Mode, Side, Window, lanes_of_rank, plan_epoch, units_of
from roo_ray.ingest.ray_reader import read_with_ray_data
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import Schema


@dataclass(frozen=True)
class StreamSettings:
    """What a stream is a function of. ``version``: of the data set's manifest. ``epochs``: the epochs that will
    be asked for, in order; one execution of Ray Data covers them all."""

    data_set: str
    version: int
    schema: Schema
    ingest: Ingest
    holdout: Holdout
    side: Side
    seed: int
    epochs: tuple[int, ...]
    mode: Mode

    def packing(self) -> PackSettings:
        """What the reading function needs."""
        return PackSettings(self.data_set, self.schema, self.holdout, self.side, self.ingest.batch_impressions)

    def plans(self) -> list[EpochPlan]:
        """The plan of each epoch. Raises DataError where there is no such data or a side would be empty."""
        manifest = load_manifest(self.data_set, self.version)
        check_sides(self.data_set, manifest, self.schema, self.holdout, self.side)
        units = units_of(select_files(manifest, self.holdout, self.side))
        return [
            plan_epoch(
                units,
                seed=self.seed,
                epoch=epoch,
                lanes=self.ingest.lanes,
                window_units=self.ingest.window_units,
                mode=self.mode,
            )
            for epoch in self.epochs
        ]


@dataclass(frozen=True)
class Step:
    """What a rank trains on in a step. ``lanes_alive``: the rank's lanes that delivered; with 0 the batch is
    the weightless dummy, and ``requests`` and ``impressions`` are 0. ``wait_seconds``: what the trainer
    spent on getting the step: waiting for its batches and joining them."""

    batch: RequestBatch
    lanes_alive: int
    requests: int
    impressions: int
    wait_seconds: float


@dataclass
class LaneBuffer:
    """A lane's batches at hand (epoch, table, row). ``coming``: windows that have yet to arrive, over all
    epochs; ``coming_of``: per epoch."""

    batches: deque[tuple[int, PackedBatches, int]] = field(default_factory=deque)
    coming: int = 0
    coming_of: dict[int, int] = field(default_factory=dict)


class Buffers:
    """Between the reading thread (``fill``) and the trainer (``take``): the batches at hand, lane by lane."""

    def __init__(self, windows: list[Window], schema: Schema, prefetch: int) -> None:
        self.schema, self.prefetch = schema, prefetch
        self.lanes: dict[int, LaneBuffer] = {}
        for window in windows:
            lane = self.lanes.setdefault(window.lane, LaneBuffer())
            lane.coming += 1
            lane.coming_of[window.epoch] = lane.coming_of.get(window.epoch, 0) + 1
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.stopped = False

    def _hungry(self) -> bool:
        # any lane, as windows come in a fixed order: the one a lane waits for may be behind another lane's
        return any(lane.coming and len(lane.batches) < self.prefetch for lane in self.lanes.values())

    def fill(self, source: Callable[[], Iterator[pa.Table]]) -> None:
        """The reading thread: takes in tables from ``source`` until its end, an error, or ``stop``."""
        tables: Iterator[pa.Table] | None = None
        try:
            tables = source()
            for table in tables:
                self._add(PackedBatches(table, self.schema))
                with self.changed:
                    self.changed.wait_for(lambda: self.stopped or self._hungry() or not self._coming())
                    if self.stopped:
                        return
            if self._coming():
                raise RuntimeError(f"the reader ended with {self._coming()} windows missing")
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()
        finally:
            close = getattr(tables, "close", None)
            if close is not None:
                close()

    def _coming(self) -> int:
        return sum(lane.coming for lane in self.lanes.values())

    def _add(self, packed: PackedBatches) -> None:
        tags = [packed.tags[name].tolist() for name in ("epoch", "lane", "batch", "batches")]
        with self.changed:
            for row, (epoch, lane_id, batch, batches) in enumerate(zip(*tags, strict=True)):
                lane = self.lanes[lane_id]
                if batches:
                    lane.batches.append((epoch, packed, row))
                if batch + 1 == batches:  # a window's last batch, or the mark of an empty window
                    lane.coming -= 1
                    lane.coming_of[epoch] -= 1
            self.changed.notify_all()

    def take(self, lane_id: int, epoch: int) -> RequestBatch | None:
        """The lane's next batch of the epoch, waiting for it where it is still to come; None at its end.

        Batches that are left from earlier epochs are passed over. Raises what the reader raised.
        """
        lane = self.lanes.get(lane_id)
        if lane is None:
            return None
        with self.changed:
            while True:
                while lane.batches and lane.batches[0][0] != epoch and self._is_past(lane, epoch):
                    lane.batches.popleft()
                if lane.batches and lane.batches[0][0] == epoch:
                    _, packed, row = lane.batches.popleft()
                    break
                if not lane.coming_of.get(epoch):
                    self.changed.notify_all()
                    return None
                if self.error is not None:
                    raise self.error
                if self.stopped:
                    raise RuntimeError("the stream is closed")
                self.changed.notify_all()
                self.changed.wait()
            self.changed.notify_all()
        return packed.batch(row)

    def _is_past(self, lane: LaneBuffer, epoch: int) -> bool:
        order = list(lane.coming_of)
        return epoch in order and order.index(lane.batches[0][0]) < order.index(epoch)

    def stop(self) -> None:
        """Ends the reading thread; what it reads at the moment is dropped."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class RankStream:
    """The batches of a rank's lanes. ``epoch(e)`` yields steps for ever: after the end of the epoch the dummy,
    until the ranks agree that no lane is alive and stop iterating. Epochs are asked for in the order of
    ``settings.epochs``; leaving one early passes over its rest.

    Raises DataError for a data set or a side without data, ConfigError for more ranks than lanes.
    """

    def __init__(self, settings: StreamSettings, rank: int, world_size: int) -> None:
        self.settings = settings
        self.lanes = lanes_of_rank(rank, world_size, settings.ingest.lanes)
        windows = [window for plan in settings.plans() for window in plan.reading_order(self.lanes)]
        packing = settings.packing()
        self._left = list(settings.epochs)
        self._buffers = Buffers(windows, settings.schema, settings.ingest.prefetch_batches)

        def source() -> Iterator[pa.Table]:
            if settings.ingest.reader == "ray_data":
                return read_with_ray_data(packing, windows, world_size)
            return (pack_window(packing, window) for window in windows)

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
        while True:
            began = time.perf_counter()
            taken = [self._buffers.take(lane, epoch) for lane in self.lanes]
            parts = [batch for batch in taken if batch is not None]
            if not parts:
                yield Step(dummy, 0, 0, 0, time.perf_counter() - began)
                continue
            batch = RequestBatch.concat(parts)
            waited = time.perf_counter() - began
            yield Step(batch, len(parts), batch.num_requests, batch.total_impressions, waited)

    def close(self) -> None:
        """Ends the reader and waits for its thread."""
        self._buffers.stop()
        self._thread.join(timeout=30)
