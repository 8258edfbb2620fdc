"""The ways of feeding a trainer that ``benchmarks/ingest.py`` compares, and a rank that consumes one of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ingest_data import HISTORY, impression_table, schema
from ray.data.collate_fn import ArrowBatchCollateFn

from roo_ray.config import Holdout, Ingest
from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.ingest.holdout import select_files
from roo_ray.ingest.lists import Lists, split_lists
from roo_ray.ingest.read import columns_to_read
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.requests.manifest import load_manifest

Way = Literal["floor", "naive", "thread", "ray_data", "table", "exploded"]
WAYS: dict[Way, str] = {
    "floor": "(a) pyarrow and collate, one loop",
    "naive": "(b) Ray Data, iter_torch_batches",
    "thread": "(c) ours, trainer's thread",
    "ray_data": "(d) ours, Ray Data",
    "table": "(e) an impression table, one loop",
    "exploded": "(e') our shards, exploded",
}
EPOCHS = 2


# ---- what one writes without this package -------------------------------------------------------------------


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _lists(array: pa.Array) -> Lists:
    return split_lists(array) if pa.types.is_list(array.type) else Lists.of_scalars(array)


def _tensor(array: pa.Array, kind: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.to_numpy(zero_copy_only=False).astype(kind)))


def collate(table: pa.Table) -> RequestBatch:
    """Request rows (or impression rows, each then a request of its own) to a batch of the same fields as ours,
    vectorised, ids and keys as they are (nothing is hashed or checked)."""
    rows = np.arange(table.num_rows)
    lists = {name: _lists(_array(table, name)) for name in table.column_names}
    history = lists["history_item"].select(rows, last=HISTORY)
    lengths = torch.from_numpy(history.lengths)
    tokens = int(history.lengths.sum())
    items = lists["item_id"].select(rows)
    size = int(items.lengths.sum())
    ones = torch.ones(table.num_rows, dtype=torch.int64)
    ones_impressions = torch.ones(size, dtype=torch.int64)

    def events(name: str) -> torch.Tensor:
        return _tensor(history.of(lists[name].values), np.int64)

    def impressions(name: str, kind: Any) -> torch.Tensor:
        return _tensor(items.of(lists[name].values), kind)

    clicked = impressions("clicked", np.float32)[:, None]
    position = np.arange(size) - np.repeat(np.cumsum(items.lengths) - items.lengths, items.lengths)
    placement = torch.stack([impressions("position", np.float32), impressions("item_age", np.float32)], 1)
    return RequestBatch(
        num_impressions=torch.from_numpy(items.lengths),
        request_key=_tensor(_array(table, "request_id"), np.int64),
        impression_index=torch.from_numpy(position),
        user_key=_tensor(_array(table, "user_id"), np.int64),
        request_time=_tensor(_array(table, "request_time").cast(pa.int64()), np.float64) / 1e6,
        request_dense=torch.stack([_tensor(_array(table, n), np.float32) for n in ("age", "activity")], 1),
        impression_dense=torch.log1p(placement.clamp(min=0)),
        request_ids={
            "country": Jagged(_tensor(_array(table, "country_id"), np.int64), ones),
            "history.history_item": Jagged(events("history_item"), lengths),
            "history.history_topic": Jagged(events("history_topic"), lengths),
        },
        sequence_dense={"history": torch.zeros(tokens, 0)},
        sequence_time={"history": _tensor(history.of(lists["history_time"].values).cast(pa.int64()), np.float64) / 1e3},
        impression_ids={
            "item": Jagged(impressions("item_id", np.int64), ones_impressions),
            "item_topic": Jagged(impressions("topic_id", np.int64), ones_impressions),
        },
        labels=clicked,
        weights=torch.ones_like(clicked),
        oracle=torch.full_like(clicked, float("nan")),
    )


class Collate(ArrowBatchCollateFn):
    """``collate`` as Ray Data takes it."""

    def __call__(self, table: pa.Table) -> RequestBatch:
        """A batch of Ray Data to a batch of tensors."""
        return collate(table)


def files_of(data_set: str) -> list[str]:
    """The paths of the shards that are trained on."""
    return [f"{data_set}/{file.path}" for file in select_files(load_manifest(data_set), Holdout(), "train")]


def floor(files: list[str], rank: int, world: int, batch_rows: int) -> Iterator[RequestBatch]:
    """Every world-th row group, read and collated in this loop."""
    columns = columns_to_read(schema())
    units = [(path, group) for path in files for group in range(pq.read_metadata(path).num_row_groups)]
    opened: tuple[str, Any] = ("", None)
    for path, group in units[rank::world]:
        if opened[0] != path:
            opened = (path, pq.ParquetFile(path))
        table = opened[1].read_row_group(group, columns=columns, use_threads=False)
        for start in range(0, table.num_rows, batch_rows):
            yield collate(table.slice(start, batch_rows))


def decode_cpu(files: list[str]) -> float:
    """CPU seconds of one thread per million impressions for decoding the columns of batches, and nothing else: what no
    way of reading can be faster than. The second of two passes."""
    columns, impressions, cpu = columns_to_read(schema()), 0, 0.0
    for _ in range(2):
        impressions, cpu = 0, time.thread_time()
        for path in files:
            with pq.ParquetFile(path) as file:
                for group in range(file.metadata.num_row_groups):
                    table = file.read_row_group(group, columns=columns, use_threads=False)
                    impressions += int(np.asarray(table.column("num_impressions")).sum())
        cpu = time.thread_time() - cpu
    return cpu / impressions * 1e6


# ---- a rank -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """What a rank measured: seconds to the first batch and to the last, CPU seconds of its process."""

    first: float
    seconds: float
    cpu: float
    requests: int
    impressions: int
    bytes: int


def batch_bytes(batch: RequestBatch) -> int:
    """Bytes of all its tensors."""
    sizes: list[int] = []
    batch.map(lambda tensor: (sizes.append(tensor.nbytes), tensor)[1])
    return sum(sizes)


def settings_of(data_set: str, way: Way, lanes: int, batch_impressions: int) -> StreamSettings:
    """Our stream, in the trainer's thread or through Ray Data."""
    reader: Any = "ray_data" if way == "ray_data" else "thread"
    ingest = Ingest(lanes=lanes, batch_impressions=batch_impressions, window_units=4, reader=reader, prefetch_batches=8)
    form: Any = "impression" if way == "exploded" else "request"
    return StreamSettings(
        data_set, 1, schema(), ingest, Holdout(), "train", 0, tuple(range(EPOCHS)), "shuffled", form=form
    )


@ray.remote(num_cpus=1)
class Rank:
    """A trainer's process that trains nothing: it takes batches as fast as they come."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        pa.set_cpu_count(1)

    def consume(
        self, way: Way, data_set: str, rank: int, world: int, lanes: int, impressions: int, give: Any
    ) -> list[Epoch]:
        """Two epochs of this rank's share. ``give``: the shard iterator of (b), the feed of (d)."""
        batches_of = self._batches(way, data_set, rank, world, lanes, impressions, give)
        return [self._epoch(batches_of, epoch) for epoch in range(EPOCHS)]

    def _batches(self, way: Way, data_set: str, rank: int, world: int, lanes: int, impressions: int, give: Any) -> Any:
        if way == "floor":
            return lambda epoch: floor(files_of(data_set), rank, world, impressions // 10)
        if way == "table":
            return lambda epoch: floor([impression_table(data_set)], rank, world, impressions)
        if way == "naive":
            return lambda epoch: give.iter_torch_batches(
                batch_size=impressions // 10, collate_fn=Collate(), prefetch_batches=4
            )
        stream = RankStream(settings_of(data_set, way, lanes, impressions), rank, world, give)

        def ours(epoch: int) -> Iterator[RequestBatch]:
            for step in stream.epoch(epoch):
                if not step.lanes_alive:
                    return
                yield step.batch

        return ours

    def _epoch(self, batches_of: Any, epoch: int) -> Epoch:
        began, cpu = time.perf_counter(), time.process_time()
        first, requests, impressions, sampled, size = 0.0, 0, 0, 0, 0
        for number, batch in enumerate(batches_of(epoch)):
            first = first or time.perf_counter() - began
            requests += batch.num_requests
            impressions += batch.total_impressions
            if number % 16 == 0:
                sampled += batch.total_impressions
                size += batch_bytes(batch)
        seconds = time.perf_counter() - began
        cpu = time.process_time() - cpu
        return Epoch(first, seconds, cpu, requests, impressions, round(size / max(sampled, 1) * impressions))


def naive_shards(data_set: str, world: int) -> list[Any]:
    """(b): Ray Data reads the shards and splits them over the ranks."""
    rows = ray.data.read_parquet(files_of(data_set), columns=columns_to_read(schema()))
    return list(rows.streaming_split(world, equal=False))
