"""Between the reading thread and the trainer: the batches at hand, lane by lane."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from roo_ray.ingest.batch import RequestBatch
from roo_ray.ingest.plan import Position
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.schema import Schema


@dataclass(frozen=True)
class Taken:
    """A batch of a lane: the row of a packed window. ``position``: (window, batches taken in it) after it.
    ``skipped``: requests that could not be read, of its window where it is the first batch, and of windows before
    that have no batches; ``skipped_units``: of the window in progress after it."""

    epoch: int
    position: tuple[int, int]
    packed: PackedBatches
    row: int
    skipped: int
    skipped_units: tuple[int, ...]

    def batch(self) -> RequestBatch:
        """Its tensors, views of the packed window."""
        return self.packed.batch(self.row)

    def count(self, name: str) -> float:
        """One of its ``pack.COUNTS``."""
        return self.skipped if name == "skipped_requests" else self.packed.counts[name][self.row]


@dataclass
class LaneBuffer:
    """A lane's batches at hand. ``coming``: windows that have yet to arrive, over the epochs that were come to;
    ``coming_of``: per epoch; ``expected``: the next window of each epoch; ``skipped``: per epoch, requests that could
    not be read, which no batch has told of yet."""

    batches: deque[Taken] = field(default_factory=deque)
    coming: int = 0
    coming_of: dict[int, int] = field(default_factory=dict)
    expected: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)


class Buffers:
    """Between the reading thread (``fill``) and the trainer (``take``). Batches that were taken before ``start``
    are passed over. ``windows``: of an epoch, how many windows each lane has; asked when the reader or the trainer
    comes to it."""

    def __init__(
        self,
        epochs: Sequence[int],
        windows: Callable[[int], Sequence[int]],
        lanes: Sequence[int],
        schema: Schema,
        prefetch: int,
        start: Position | None,
    ) -> None:
        self.schema, self.prefetch, self.start = schema, prefetch, start
        self.order = {epoch: place for place, epoch in enumerate(epochs)}
        self.windows = windows
        self.lanes = {lane: LaneBuffer() for lane in lanes}
        self.begun: set[int] = set()
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.stopped = False

    def _begin(self, epoch: int) -> None:
        """Comes to an epoch; before this nothing of it is known."""
        if epoch in self.begun:
            return
        windows = self.windows(epoch)  # may take a while: others need not wait for it
        with self.changed:
            if epoch in self.begun:
                return
            for lane, buffer in self.lanes.items():
                first = self.start.window(epoch, lane) if self.start else 0
                buffer.expected[epoch] = first
                buffer.coming_of[epoch] = max(windows[lane] - first, 0)
                buffer.coming += buffer.coming_of[epoch]
            self.begun.add(epoch)
            self.changed.notify_all()

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
                del table
                with self.changed:
                    self.changed.wait_for(lambda: self.stopped or self._hungry() or not self._coming())
                    if self.stopped:
                        return
            for epoch in self.order:
                self._begin(epoch)
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
        """A window's table: all its batches, or the mark of an empty window."""
        epoch, lane_id, window, batches = (int(packed.tags[tag][0]) for tag in ("epoch", "lane", "window", "batches"))
        done = self.start.taken(epoch, lane_id, window) if self.start else 0
        self._begin(epoch)
        with self.changed:
            lane = self.lanes[lane_id]
            if window != lane.expected[epoch]:
                raise RuntimeError(f"lane {lane_id} of epoch {epoch} got window {window}, not {lane.expected[epoch]}")
            if not done:  # else the checkpoint has counted them
                skipped = int(packed.counts["skipped_requests"][0])
                lane.skipped[epoch] = lane.skipped.get(epoch, 0) + skipped
            for batch in range(done, batches):
                amid = batch + 1 < batches
                after, units = ((window, batch + 1), packed.skipped_units) if amid else ((window + 1, 0), ())
                lane.batches.append(Taken(epoch, after, packed, batch, lane.skipped.pop(epoch, 0), units))
            lane.expected[epoch] += 1
            lane.coming -= 1
            lane.coming_of[epoch] -= 1
            self.changed.notify_all()

    def take(self, lane_id: int, epoch: int) -> Taken | None:
        """The lane's next batch of the epoch, waiting for it where it is still to come; None at its end.

        Batches that are left from earlier epochs are passed over. Raises what the reader raised.
        """
        lane = self.lanes[lane_id]
        self._begin(epoch)
        with self.changed:
            while True:
                while lane.batches and self.order[lane.batches[0].epoch] < self.order[epoch]:
                    lane.batches.popleft()
                if lane.batches and lane.batches[0].epoch == epoch:
                    taken = lane.batches.popleft()
                    self.changed.notify_all()
                    return taken
                self.changed.notify_all()
                if not lane.coming_of[epoch]:
                    return None
                if self.error is not None:
                    raise self.error
                if self.stopped:
                    raise RuntimeError("the stream is closed")
                self.changed.wait()

    def at_end(self, lane_id: int, epoch: int) -> tuple[int, int]:
        """(windows of a lane that ``take`` has come to the end of, requests that could not be read since its last
        batch: told once)."""
        lane = self.lanes[lane_id]
        with self.changed:
            return lane.expected[epoch], lane.skipped.pop(epoch, 0)

    def stop(self) -> None:
        """Ends the reading thread; what it reads at the moment is dropped."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
