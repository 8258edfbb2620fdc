"""A rank's stream of steps: at each step the batches of its lanes as one ``RequestBatch``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import pyarrow as pa

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.ingest.holdout import Side, files_of_side
from roo_ray.ingest.pack import PackSettings
from roo_ray.ingest.plan import Mode, Window, lanes_of_rank, plan_epoch, reading_order, units_of
from roo_ray.ingest.readers import Packed, read_by_ray_data, read_in_thread
from roo_ray.ingest.tensors import to_batch
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import Schema


@dataclass(frozen=True)
class StreamSettings:
    """What decides a stream but the rank. ``version``: of the data set's manifest; ``epochs``: in the order in
    which they will be asked for, so that the next one is read ahead. ``reader_cpus``: CPUs for the Ray Data
    tasks of this rank."""

    data_set: str
    version: int
    schema: Schema
    ingest: Ingest
    holdout: Holdout
    side: Side
    seed: int
    epochs: tuple[int, ...]
    mode: Mode
    reader_cpus: float = 1.0


@dataclass(frozen=True)
class Step:
    """``batch``: of all lanes of the rank that still have data, or the weightless dummy. ``lanes_alive``: how many
    these are. ``requests``, ``impressions``: in the batch, 0 for the dummy. ``wait_seconds``: time spent waiting
    for data."""

    batch: RequestBatch
    lanes_alive: int
    requests: int
    impressions: int
    wait_seconds: float


class RankStream:
    """The steps of one rank, epoch after epoch; see ``StreamSettings``.

    Raises DataError for what cannot be read, and ConfigError where the side has no data.
    """

    def __init__(self, settings: StreamSettings, rank: int, world_size: int) -> None:
        self.settings = settings
        self.lanes = lanes_of_rank(rank, world_size, settings.ingest.lanes)
        manifest = load_manifest(settings.data_set, settings.version)
        units = units_of(files_of_side(manifest, settings.holdout, settings.side))
        if not units:
            raise ConfigError(f"the {settings.side} side of {settings.data_set} is empty; change holdout")
        self.windows: list[Window] = []
        for epoch in settings.epochs:
            plan = plan_epoch(
                units,
                seed=settings.seed,
                epoch=epoch,
                lanes=settings.ingest.lanes,
                window_units=settings.ingest.window_units,
                mode=settings.mode,
            )
            self.windows += reading_order(plan, self.lanes)
        self._blocks: Generator[Packed] | None = None
        self._ahead: Packed | None = None  # the first batch that belongs to a later epoch
        self._ended = False

    def close(self) -> None:
        """Ends reading."""
        if self._blocks is not None:
            self._blocks.close()

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch, without end: when all lanes of the rank are drained, dummy steps follow, until the
        ranks agree to stop. Epochs are asked for in the order of the settings."""
        queues: dict[int, deque[pa.Table]] = {lane: deque() for lane in self.lanes}
        last = dict.fromkeys(self.lanes, -1)  # position of each lane's last window in this epoch
        for position, window in enumerate(self.windows):
            if window.epoch == epoch:
                last[window.lane] = position
        passed = -1  # windows up to this position have been delivered in full, but for the current one
        while True:
            begin = time.perf_counter()
            parts = []
            for lane in self.lanes:
                while not queues[lane] and passed <= last[lane]:
                    packed = self._next(epoch)
                    if packed is None:
                        passed = len(self.windows)
                    else:
                        passed = packed.position
                        queues[self.windows[packed.position].lane].append(packed.table)
                if queues[lane]:
                    parts.append(queues[lane].popleft())
            waited = time.perf_counter() - begin
            if parts:
                batch = RequestBatch.concat([to_batch(part, self.settings.schema) for part in parts])
                yield Step(batch, len(parts), batch.num_requests, batch.total_impressions, waited)
            else:
                yield Step(dummy_batch(self.settings.schema), 0, 0, 0, waited)

    def _next(self, epoch: int) -> Packed | None:
        """The next batch of the epoch; None when there is none."""
        if self._ahead is None and not self._ended:
            if self._blocks is None:
                self._blocks = self._start()
            self._ahead = next(self._blocks, None)
            self._ended = self._ahead is None
        packed = self._ahead
        if packed is None or self.windows[packed.position].epoch != epoch:
            return None
        self._ahead = None
        return packed

    def _start(self) -> Generator[Packed]:
        settings = self.settings
        pack = PackSettings(
            data_set=settings.data_set,
            schema=settings.schema,
            holdout=settings.holdout,
            side=settings.side,
            batch_impressions=settings.ingest.batch_impressions,
        )
        prefetch = settings.ingest.prefetch_batches
        if settings.ingest.reader == "thread":
            yield from read_in_thread(self.windows, pack, prefetch)
        else:
            yield from read_by_ray_data(self.windows, pack, prefetch, settings.reader_cpus)
