"""The reading function in Ray Data tasks: one execution of Ray Data outside the trainers, for all of them.

A ``Feed`` is an actor that runs the pipeline: a task and a block per parcel (some windows of one rank's lanes), in
the planned order. It hands the trainers references, never data: each rank asks for the next block of its own lanes
and takes it from the object store, as views of shared memory where it lies on the same node. Ray Data reads ahead as
far as its memory budget goes; the feed takes blocks from it only while a rank is short of them.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roo_ray import session
from roo_ray.allocator import keep_freed_memory
from roo_ray.errors import RooError
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.parcels import PackedSize, Parcel, parcel_bytes, parcels, split_parcel
from roo_ray.ingest.plan import Position, Window
from roo_ray.ingest.settings import Plans, StreamSettings

ERROR = "error"
BLOCKS_AHEAD = 2  # that wait in the feed for each rank; a rank has its own batches beside them
BLOCKS_AT_ONCE = 4096  # of one execution: Ray Data holds its whole input as objects


def _read_block(block: pa.Table, settings: PackSettings) -> Iterator[pa.Table]:
    """Runs in a Ray Data task. An error travels as a last row of its own, behind the windows that were read before:
    as an exception it would be wrapped and logged with some 200 lines of Ray's own frames."""
    keep_freed_memory()  # every window works on arrays of much the same sizes
    for windows in block.column("windows").to_pylist():
        packed: list[pa.Table] = []
        try:
            for window in pickle.loads(windows):
                packed.append(pack_window(settings, window))
        except RooError as error:
            packed.append(pa.table({ERROR: [pickle.dumps(error)]}))
        yield pa.concat_tables(packed, promote_options="default" if ERROR in packed[-1].column_names else "none")


def read_blocks(
    settings: PackSettings, some_parcels: Iterable[Parcel], held_cpus: float
) -> Iterator[tuple[Parcel, Any]]:
    """(parcel, reference to its packed table) of each parcel, in their order, read by Ray Data where this process's
    data tasks run (``session.place_data``).

    ``held_cpus``: CPUs of the cluster that are not for reading. Ray must be initialised.
    """
    session.quiet_data_context()
    context = DataContext.get_current()
    context.target_max_block_size = None  # a parcel stays one block
    coming = iter(some_parcels)
    while some := list(islice(coming, BLOCKS_AT_ONCE)):
        items: list[dict[str, Any]] = [{"windows": pickle.dumps(parcel.windows)} for parcel in some]
        blocks = ray.data.from_items(items, override_num_blocks=len(items))
        options = blocks.context.execution_options
        options.preserve_order = True
        cpus = ray.cluster_resources().get("CPU", 1.0)
        options.resource_limits = ExecutionResources(cpu=max(1, int(cpus - held_cpus)))
        packed = blocks.map_batches(
            _read_block,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_kwargs={"settings": settings},
            num_cpus=1,
            resources=session.placing().resources,
        )
        read = iter(some)
        bundles = packed.iter_internal_ref_bundles()
        try:
            for bundle in bundles:
                for entry in bundle.blocks:
                    yield next(read), entry.ref
        finally:
            close = getattr(bundles, "close", None)
            if close is not None:
                close()
        if next(read, None) is not None:
            raise RuntimeError("Ray Data ended with windows missing")


class Feed:
    """Runs in an actor of its own; see the module's docstring. ``owners``: the lanes of each rank. ``placing``: where
    the reading tasks run."""

    def __init__(
        self, settings: StreamSettings, owners: Sequence[Sequence[int]], held_cpus: float, placing: session.Placing
    ) -> None:
        session.place_data(placing)
        self.owner = {lane: rank for rank, lanes in enumerate(owners) for lane in lanes}
        self.queues: list[deque[Any]] = [deque() for _ in owners]
        self.changed = threading.Condition()
        self.arrived = [asyncio.Event() for _ in owners]
        self.most = [0 for _ in owners]
        self.coming = [0 for _ in owners]  # windows that a rank has yet to get, of the epochs that were planned
        self.more = [False for _ in owners]  # whether it will get some of epochs that are still to be planned
        self.ended = False
        self.error: BaseException | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.arguments = (settings, held_cpus)
        self.thread = threading.Thread(target=self._pull, name="roo-ray-feed", daemon=True)

    def _pull(self) -> None:
        settings, held_cpus = self.arguments
        try:
            packing, plans = settings.open()
            windows = self._windows(plans, settings.start)
            store = ray.cluster_resources().get("object_store_memory", 0.0)
            together = parcels(windows, self.owner, PackedSize(settings.schema), parcel_bytes(store, len(self.queues)))
            for parcel, block in read_blocks(packing, together, held_cpus):
                rank = parcel.rank
                with self.changed:
                    self.queues[rank].append(block)
                    self.coming[rank] -= len(parcel.windows)
                    self.most[rank] = max(self.most[rank], len(self.queues[rank]))
                    self._wake(rank)
                    del block
                    self.changed.wait_for(self._hungry)
        except BaseException as error:
            self.error = error
        finally:
            with self.changed:
                self.ended = True
                for rank in range(len(self.queues)):
                    self._wake(rank)

    def _windows(self, plans: Plans, start: Position | None) -> Iterator[Window]:
        """The windows of all ranks, as they are read; each epoch is planned when it is come to."""
        lanes = sorted(self.owner)
        for epoch in plans.epochs:
            windows_of = plans.num_windows(epoch)
            with self.changed:
                for lane, rank in self.owner.items():
                    self.coming[rank] += max(windows_of[lane] - (start.window(epoch, lane) if start else 0), 0)
                    # a lane that has units in one epoch has some in all
                    self.more[rank] = epoch != plans.epochs[-1] and (self.more[rank] or windows_of[lane] > 0)
            yield from plans.plan(epoch).reading_order(lanes, start)

    def _hungry(self) -> bool:
        # any rank that has something to come: blocks come in a fixed order, and the one that it waits for may be behind
        # another's
        coming = [windows or more for windows, more in zip(self.coming, self.more, strict=True)]
        waiting = [len(queue) for queue, comes in zip(self.queues, coming, strict=True) if comes]
        return not waiting or min(waiting) < BLOCKS_AHEAD

    async def most_waiting(self) -> list[int]:
        """The most blocks that have waited at a time for each rank. Ranks that take steps together, as trainers
        do, keep it small; a rank that stands still while others go on is waited for by nobody, and its blocks add up
        in the object store."""
        return list(self.most)

    def _wake(self, rank: int) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.arrived[rank].set)

    async def next(self, rank: int) -> list[Any]:
        """[reference to the rank's next block], waiting for it; empty after the last one."""
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
            self.thread.start()
        while True:
            self.arrived[rank].clear()
            with self.changed:
                if self.queues[rank]:
                    block = self.queues[rank].popleft()
                    self.changed.notify_all()
                    return [block]
                if self.ended:
                    if self.error is not None:
                        raise self.error
                    return []
            await self.arrived[rank].wait()


def held_cpus(world_size: int) -> float:
    """CPUs that the trainers hold, if the caller is one of ``world_size`` alike."""
    if ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0) * world_size)


def open_feed(settings: StreamSettings, owners: Sequence[Sequence[int]], held: float) -> Any:
    """The actor that feeds ranks which own these lanes; it ends with the last handle on it. It takes no CPU, and runs
    on the caller's node: else it may come to lie on any node, one for data that may be taken away. Its reading tasks
    run where the caller's data tasks do."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Feed).options(num_cpus=0, max_concurrency=len(owners) + 1, scheduling_strategy=here)
    return actor.remote(settings, owners, held, session.placing())


def blocks_of_rank(feed: Any, rank: int) -> Iterator[pa.Table]:
    """The packed windows of a rank's lanes, in order; a block is asked for while the one before is worked on.

    Raises the error of the reading function (DataError, StorageError), after the windows that come before the bad one.
    """
    coming = feed.next.remote(rank)
    while found := ray.get(coming):
        coming = feed.next.remote(rank)
        table = ray.get(found[0])
        del found
        error: RooError | None = None
        if ERROR in table.column_names:
            error = pickle.loads(table.column(ERROR)[-1].as_py())
            table = table.drop_columns(ERROR).slice(0, table.num_rows - 1)
        for window in split_parcel(table):
            yield window
            del window
        del table
        if error is not None:
            raise error
