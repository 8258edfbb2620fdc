"""The streams of ranks: exactly once, the same global batches for every number of ranks and both readers."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from roo_ray import session
from roo_ray.config import Holdout, Ingest
from roo_ray.errors import ConfigError, DataError
from roo_ray.ingest import settings as settings_module
from roo_ray.ingest import stream as stream_module
from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.ingest.feed import Feed
from roo_ray.ingest.plan import lanes_of_rank
from roo_ray.ingest.stream import RankStream, Step, StreamSettings
from roo_ray.schema import Schema
from tests.ingest import shard_maker
from tests.ingest.shard_maker import Row, random_rows, request_key, write_data_set


def keys_of(rows: list[Row], schema: Schema, held_out: bool) -> list[int]:
    last = max(row["request_time"].date() for row in rows)
    return sorted(request_key(r, schema) for r in rows if (r["request_time"].date() == last) == held_out)


def take_epoch(streams: list[RankStream], epoch: int) -> list[list[Step]]:
    """The steps of all ranks in lock-step, (steps, ranks), until no lane is alive anywhere."""
    iterators = [stream.epoch(epoch) for stream in streams]
    steps = []
    while True:
        step = [next(iterator) for iterator in iterators]
        if sum(s.lanes_alive for s in step) == 0:
            return steps
        steps.append(step)


def world(settings: StreamSettings, size: int) -> list[RankStream]:
    return [RankStream(settings, rank, size) for rank in range(size)]


def request_keys(step: list[Step]) -> list[int]:
    return [key for s in step if s.lanes_alive for key in s.batch.request_key.tolist()]


def flat(batch: RequestBatch) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in vars(batch).items():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(part, Jagged):
                yield f"{name} {key} values", part.values
                yield f"{name} {key} lengths", part.lengths
            elif part is not None:
                yield f"{name} {key}", part


def equal(left: RequestBatch, right: RequestBatch) -> bool:
    """Equality to the bit, names, types and shapes included."""
    pairs = list(zip(flat(left), flat(right), strict=True))
    return all(
        a == b and x.dtype == y.dtype and torch.equal(x.nan_to_num(-7), y.nan_to_num(-7)) and x.shape == y.shape
        for (a, x), (b, y) in pairs
    )


def test_each_epoch_has_every_request_once_in_another_order(data: tuple[StreamSettings, list[Row]]) -> None:
    how, rows = data
    (stream,) = world(how, 1)
    orders = []
    for epoch in (0, 1):
        steps = take_epoch([stream], epoch)
        orders.append([key for step in steps for key in request_keys(step)])
        assert sorted(orders[-1]) == keys_of(rows, how.schema, held_out=False)
        assert sum(s.requests for (s,) in steps) == len(orders[-1])
        assert sum(s.impressions for (s,) in steps) == sum(s.batch.total_impressions for (s,) in steps)
    assert orders[0] != orders[1]


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(
    data: tuple[StreamSettings, list[Row]],
) -> None:
    how, _ = data
    first, again, other = (
        [request_keys(step) for step in take_epoch(world(s, 1), 0)] for s in (how, how, replace(how, seed=12))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("size", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(data: tuple[StreamSettings, list[Row]], size: int) -> None:
    how, _ = data
    for epoch in (0, 1):
        how = replace(how, epochs=(epoch,))
        alone, shared = take_epoch(world(how, 1), epoch), take_epoch(world(how, size), epoch)
        assert len(alone) == len(shared)
        for one, many in zip(alone, shared, strict=True):
            assert sum(s.lanes_alive for s in one) == sum(s.lanes_alive for s in many)
            assert sorted(request_keys(one)) == sorted(request_keys(many))


def test_a_step_is_a_batch_of_every_living_lane_in_lane_order(data: tuple[StreamSettings, list[Row]]) -> None:
    how, _ = data
    budget = how.ingest.batch_impressions
    for whole, *lanes in zip(take_epoch(world(how, 1), 0), *[take_epoch(world(how, 4), 0)], strict=True):
        (joined,), parts = whole, [s for s in lanes[0] if s.lanes_alive]
        assert all(s.impressions <= budget or s.requests == 1 for s in parts)
        assert equal(joined.batch, RequestBatch.concat([s.batch for s in parts]))


def test_evaluation_is_one_pass_in_stored_order(data: tuple[StreamSettings, list[Row]]) -> None:
    how, rows = data
    how = replace(how, side="evaluation", mode="sequential", epochs=(0,))
    steps = take_epoch(world(how, 2), 0)
    assert sorted(k for step in steps for k in request_keys(step)) == keys_of(rows, how.schema, held_out=True)
    one_lane = replace(how, ingest=how.ingest.model_copy(update={"lanes": 1}))
    last = max(row["request_time"].date() for row in rows)
    stored = [request_key(row, how.schema) for row in rows if row["request_time"].date() == last]
    assert [k for step in take_epoch(world(one_lane, 1), 0) for k in request_keys(step)] == stored


def test_a_drained_rank_gives_dummies_for_ever(data: tuple[StreamSettings, list[Row]]) -> None:
    how, _ = data
    how = replace(how, ingest=how.ingest.model_copy(update={"lanes": 60}))  # more lanes than units
    steps = list(islice(RankStream(how, 59, 60).epoch(0), 5))
    for step in steps:
        assert (step.lanes_alive, step.requests, step.impressions) == (0, 0, 0)
        assert (step.batch.num_requests, float(step.batch.weights.sum())) == (1, 0.0)


def test_leaving_an_epoch_early_passes_over_its_rest(data: tuple[StreamSettings, list[Row]]) -> None:
    how, rows = data
    (stream,) = world(how, 1)
    list(islice(stream.epoch(0), 2))
    keys = [key for step in take_epoch([stream], 1) for key in request_keys(step)]
    assert sorted(keys) == keys_of(rows, how.schema, held_out=False)
    with pytest.raises(ValueError, match="epoch 0 is not one of those to come"):
        stream.epoch(0)


def test_by_request_the_sides_share_the_files(data: tuple[StreamSettings, list[Row]]) -> None:
    how, rows = data
    how = replace(how, holdout=Holdout(by="request", fraction=0.1), epochs=(0,))
    seen = [
        [key for step in take_epoch(world(replace(how, side=side), 2), 0) for key in request_keys(step)]
        for side in ("train", "evaluation")
    ]
    assert seen[0]
    assert seen[1]
    assert sorted(seen[0] + seen[1]) == sorted(request_key(row, how.schema) for row in rows)


def test_waiting_is_measured(data: tuple[StreamSettings, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    how, _ = data
    real = stream_module.pack_window

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(stream_module, "pack_window", slow)
    first = next(RankStream(how, 0, 4).epoch(0))
    assert 0.15 < first.wait_seconds < 5


def test_the_thread_reads_no_further_than_the_prefetch(
    data: tuple[StreamSettings, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, _ = data
    read: list[int] = []
    real = stream_module.pack_window
    monkeypatch.setattr(stream_module, "pack_window", lambda s, w: (read.append(w.index), real(s, w))[1])
    how = replace(how, ingest=how.ingest.model_copy(update={"lanes": 1}), epochs=(0,))
    stream = RankStream(how, 0, 1)
    steps = stream.epoch(0)
    next(steps)
    time.sleep(0.5)
    assert len(read) == 1  # its batches are more than the prefetch
    sum(1 for step in islice(steps, 200) if step.lanes_alive)
    assert len(read) > 5


def most_windows_held(how: StreamSettings, size: int) -> list[int]:
    """Of each rank, the most windows that it holds batches of at a time, over both epochs."""
    found = []
    for stream in world(how, size):
        most = 0
        for epoch in (0, 1):
            for step in stream.epoch(epoch):
                if not step.lanes_alive:
                    break
                time.sleep(0.002)  # the reader gets as far ahead as it may
                with stream._buffers.changed:
                    lanes = stream._buffers.lanes.values()
                    most = max(most, len({id(taken.packed) for lane in lanes for taken in lane.batches}))
        found.append(most)
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_holds_little_more_than_a_window_a_lane(data: tuple[StreamSettings, list[Row]], size: int) -> None:
    """Whose windows have more batches than the prefetch: memory is bounded by the lanes of a rank, not by the data."""
    how, _ = data
    how = replace(how, ingest=how.ingest.model_copy(update={"lanes": 4, "batch_impressions": 9}))
    for most in most_windows_held(how, size):
        assert 0 < most <= 2 * (4 // size) + 1


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("impressions", [None, 30])
def test_so_does_one_whose_batches_are_cut_by_cost(tmp_path: Path, size: int, impressions: int | None) -> None:
    """Which lies in histories here: requests with many impressions have none, and they come in long runs, so that
    lanes differ in what their impressions say and what they are to train on."""
    rows = random_rows([1 if i // 12 % 2 else 9 for i in range(600)], 4)
    names = [column for column in shard_maker.ARROW if column.startswith("history_")]
    for i, row in enumerate(rows):
        event = dict.fromkeys(names) if i // 12 % 2 == 0 else None
        row |= event or {
            "history_time": [row["request_time"].replace(tzinfo=None, microsecond=0)] * 4,
            "history_item": ["i1"] * 4,
            "history_dwell": [1.0] * 4,
            "history_topic": [1] * 4,
            "history_score": [0.5] * 4,
        }
    schema = shard_maker.schema()
    write_data_set(tmp_path, rows, schema, row_group=12, file_rows=120)
    budgets = {"batch_impressions": impressions, "batch_cost": 8.0}
    ingest = Ingest(lanes=4, window_units=1, reader="thread", prefetch_batches=1, **budgets)  # type: ignore[arg-type]
    how = StreamSettings(
        str(tmp_path), 1, schema, ingest, Holdout(by="request", fraction=0.02), "train", 3, (0, 1), "shuffled"
    )
    how = replace(how, cost=(0.0, 1.0, 0.0, 0.001, 0.0))
    for most in most_windows_held(how, size):
        assert 0 < most <= 2 * (4 // size) + 1


def test_epochs_are_planned_when_they_are_come_to(
    data: tuple[StreamSettings, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, rows = data
    planned: list[int] = []
    real = settings_module.plan_epoch
    monkeypatch.setattr(
        settings_module, "plan_epoch", lambda units, **of: (planned.append(of["epoch"]), real(units, **of))[1]
    )
    how = replace(how, epochs=tuple(range(100, 130)))
    stream = RankStream(how, 0, 1)
    next(stream.epoch(100))
    assert planned == [100]
    for epoch in (101, 102, 104):  # the one between is passed over: read, all the same
        keys = [key for step in take_epoch([stream], epoch) for key in request_keys(step)]
        assert sorted(keys) == keys_of(rows, how.schema, held_out=False)
        assert sorted(planned) == [*range(100, max(planned) + 1)]
        assert epoch <= max(planned) <= epoch + 1
    stream.close()
    planned.clear()
    _, plans = how.open()
    feed = Feed(how, [[0, 2], [1, 3]], 0.0, session.Placing())
    windows = feed._windows(plans, None)
    first = [next(windows) for _ in range(sum(plans.num_windows(100)))]
    assert {window.epoch for window in first} == {100}
    assert planned == [100]
    assert (sum(feed.coming), feed.more) == (len(first), [True, True])
    assert next(windows).epoch == 101
    assert planned == [100, 101]


def test_the_default_lanes_are_shared_evenly_by_usual_numbers_of_workers() -> None:
    lanes = Ingest().lanes
    for size in (1, 2, 3, 4, 6, 12):
        assert {len(lanes_of_rank(rank, size, lanes)) for rank in range(size)} == {lanes // size}


def test_threads_end(data: tuple[StreamSettings, list[Row]]) -> None:
    how, _ = data

    def readers() -> int:
        return sum(t.name.startswith("roo-ray-ingest") for t in threading.enumerate())

    gc.collect()
    before = readers()
    stream, abandoned = RankStream(how, 0, 4), RankStream(how, 1, 4)
    next(stream.epoch(0))
    stream.close()
    del abandoned
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert readers() <= before


def test_skipped_shards_are_counted_also_where_windows_become_empty(tmp_path: Path) -> None:
    how, shard = lose_a_shard(tmp_path, "thread")
    shard.unlink()
    how = replace(how, ingest=how.ingest.model_copy(update={"on_bad_shard": "skip"}))
    stream = RankStream(how, 0, 1)
    steps = take_epoch([stream], 0)
    assert sum(step.requests for (step,) in steps) == 20
    assert stream.skipped_requests == 10


def test_more_ranks_than_lanes_are_refused(data: tuple[StreamSettings, list[Row]]) -> None:
    with pytest.raises(ConfigError, match="5 workers share 4 lanes"):
        RankStream(data[0], 0, 5)


def test_dropping_the_last_is_refused_where_that_is_everything(tmp_path: Path) -> None:
    how, _ = lose_a_shard(tmp_path, "thread")
    how = replace(how, ingest=how.ingest.model_copy(update={"drop_last": True, "lanes": 200}))
    with pytest.raises(DataError, match=r" 6 row groups to train on for 200 lanes.*lower ingest\.lanes"):
        RankStream(how, 0, 1)


def lose_a_shard(folder: Path, readers: str) -> tuple[StreamSettings, Path]:
    schema = shard_maker.schema()
    write_data_set(folder, random_rows([4] * 60, 2, days=2), schema, row_group=5, file_rows=10)
    ingest = Ingest(lanes=1, batch_impressions=8, window_units=1, reader=readers, prefetch_batches=1)  # type: ignore[arg-type]
    how = StreamSettings(str(folder), 1, schema, ingest, Holdout(), "train", 0, (0,), "sequential")
    return how, folder / "data/v1/2024-03-01/002.parquet"


def test_a_shard_deleted_under_a_running_stream_is_one_clear_error(tmp_path: Path) -> None:
    how, shard = lose_a_shard(tmp_path, "thread")
    steps = RankStream(how, 0, 1).epoch(0)
    for _ in range(3):
        assert next(steps).lanes_alive == 1
    shard.unlink()
    with pytest.raises(DataError, match=r"2024-03-01/002\.parquet is missing; .*build the data set again"):
        list(islice(steps, 50))
