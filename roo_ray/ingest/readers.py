"""Where windows are read: in Ray Data tasks, or in a background thread. Both deliver the identical stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Window

POSITION, BATCH, ERROR = "_position", "_batch", "_error"


@dataclass(frozen=True)
class Packed:
    """A packed batch and the position of its window in the reading order."""

    position: int
    table: pa.Table


def read_in_thread(windows: Sequence[Window], settings: PackSettings, prefetch: int) -> Iterator[Packed]:
    """Reads ahead by ``prefetch`` batches in a thread; an error there is raised here. Closing the iterator ends
    the thread."""
    ready: queue.Queue[Packed | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
    stop = threading.Event()

    def put(item: Packed | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for position, window in enumerate(windows):
                for table in pack_window(window, settings):
                    put(Packed(position, table))
                    if stop.is_set():
                        return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, name="ingest", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def read_by_ray_data(windows: Sequence[Window], settings: PackSettings, prefetch: int, cpus: float) -> Iterator[Packed]:
    """Reads windows in Ray Data tasks of one CPU each, at most ``cpus`` at a time, in order.

    Ray may join or cut blocks as it likes: each row carries the position of its window and the number of its
    batch, and batches are cut out where these change. An error of ours in a task comes as a value and is raised
    here as it was.
    """
    import ray.data
    from ray.data import DataContext, ExecutionResources

    from roo_ray.session import quiet_data_context

    if not windows:
        return
    quiet_data_context()
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=max(1.0, cpus))
    plan = list(windows)

    def read(rows: dict[str, Any]) -> Iterator[pa.Table]:
        position = int(rows["position"][0])
        try:
            tables = list(pack_window(plan[position], settings))
        except DataError as error:
            yield pa.table({ERROR: [str(error)]})
            return
        for number, table in enumerate(tables):
            tags = {POSITION: position, BATCH: number}
            for name, value in tags.items():
                table = table.append_column(name, pa.array(np.full(table.num_rows, value, np.int64)))
            yield table

    positions = [{"position": position} for position in range(len(plan))]
    data = ray.data.from_items(positions, override_num_blocks=len(positions))
    data = data.map_batches(read, batch_size=1, batch_format="numpy", num_cpus=1, zero_copy_batch=True)
    pending: Packed | None = None
    pending_key = (-1, -1)
    for block in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch):
        if ERROR in block.column_names:
            raise DataError(block.column(ERROR)[0].as_py())
        for key, table in _batches(block):
            if pending is not None and key == pending_key:  # a batch that was cut in two
                pending = Packed(key[0], pa.concat_tables([pending.table, table]))
                continue
            if pending is not None:
                yield pending
            pending, pending_key = Packed(key[0], table), key
    if pending is not None:
        yield pending


def _batches(block: pa.Table) -> Iterator[tuple[tuple[int, int], pa.Table]]:
    """((position, batch), table) of each run of rows of one batch in a block."""
    position, batch = (np.asarray(block.column(name)) for name in (POSITION, BATCH))
    block = block.drop_columns([POSITION, BATCH])
    if not len(position):
        return
    changes = np.flatnonzero((np.diff(position) != 0) | (np.diff(batch) != 0)) + 1
    for start, stop in pairwise([0, *changes.tolist(), len(position)]):
        yield (int(position[start]), int(batch[start])), block.slice(start, stop - start)
