"""The feed: one execution of Ray Data for all ranks, the identical stream, and what happens when workers die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import DataError
from roo_ray.ingest.feed import BLOCKS_AHEAD
from roo_ray.ingest.plan import Position
from roo_ray.ingest.stream import RankStream, Step, StreamSettings, shared_feed, whole_position
from tests.ingest import shard_maker
from tests.ingest.shard_maker import Row, random_rows, write_data_set
from tests.ingest.test_skipped import missing
from tests.ingest.test_stream import equal, lose_a_shard, request_keys, take_epoch, world


def by_ray(how: StreamSettings, **changes: Any) -> StreamSettings:
    return replace(how, ingest=how.ingest.model_copy(update={"reader": "ray_data", **changes}))


def by_thread(how: StreamSettings) -> StreamSettings:
    return replace(how, ingest=how.ingest.model_copy(update={"reader": "thread"}))


def fed(how: StreamSettings, size: int) -> list[RankStream]:
    """Ranks that share one feed."""
    feed = shared_feed(how, size)
    return [RankStream(how, rank, size, feed) for rank in range(size)]


def assert_identical(how: StreamSettings, size: int) -> list[list[Step]]:
    """By threads and by one execution of Ray Data for all ranks, over all epochs; returns the steps."""
    threads, pipelines = world(by_thread(how), size), fed(by_ray(how), size)
    steps = []
    for epoch in how.epochs:
        left, right = take_epoch(threads, epoch), take_epoch(pipelines, epoch)
        assert len(left) == len(right) > 2
        for ours, rays in zip(left, right, strict=True):
            for a, b in zip(ours, rays, strict=True):
                assert (a.lanes_alive, a.requests, a.impressions) == (b.lanes_alive, b.requests, b.impressions)
                assert (a.counts, a.position, a.skipped_units) == (b.counts, b.position, b.skipped_units)
                assert equal(a.batch, b.batch)
        steps += left
    return steps


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (8, {"interleave": 1, "oversize": "split"}),
        (3, {"batch_impressions": None, "batch_cost": 60.0, "oversize": "split"}),
        (2, {"batch_cost": 60.0, "interleave": 2}),
    ],
    ids=str,
)
def test_ray_data_delivers_the_identical_stream(
    data: tuple[StreamSettings, list[Row]], local_ray: None, size: int, changes: dict[str, Any]
) -> None:
    how, _ = data
    cost = (1.0, 2.0, 0.5, 1.0, 0.1)
    how = replace(how, ingest=how.ingest.model_copy(update={"lanes": 8, **changes}), cost=cost)
    how = replace(how, epochs=(0,) if changes else (0, 1))
    steps = assert_identical(how, size)
    marks = {mark for step in steps for s in step if s.batch.split is not None for mark in s.batch.split.tolist()}
    assert marks == ({0, 1, 2} if "oversize" in changes else set())


def test_ray_data_skips_the_same_units_after_a_resume(tmp_path: Path, local_ray: None) -> None:
    """Those that were passed over in the windows in progress, which are there again, and those of a file that is lost
    by now."""
    schema = shard_maker.schema()
    manifest = write_data_set(
        tmp_path, random_rows([1 + i % 9 for i in range(160)], 2), schema, row_group=4, file_rows=8
    )
    ingest = Ingest(lanes=3, batch_impressions=12, window_units=3, reader="thread", on_bad_shard="skip")
    how = StreamSettings(str(tmp_path), 1, schema, ingest, Holdout(by="all"), "evaluation", 5, (0,), "shuffled")
    files = [tmp_path / file.path for file in manifest.files]
    with missing(*files[::3]):
        *_, first = islice(RankStream(how, 0, 1).epoch(0), 3)
    position = whole_position(0, first.position, first.skipped_units)
    assert any(position.skipped)
    assert any(taken for _, taken in position.lanes)
    plan = how.open()[1].plan(0)
    begun = [unit.path for lane, (window, _) in enumerate(position.lanes) for unit in plan.window(lane, window).units]
    lost = next(file for file in reversed(files) if str(file.relative_to(tmp_path)) not in begun)
    with missing(lost):
        steps = assert_identical(replace(how, start=position), 2)
    assert sum(s.counts["skipped_requests"] for step in steps for s in step) == 8


@ray.remote(num_cpus=0)
class Consumer:
    """A rank in a process of its own."""

    def __init__(self, how: StreamSettings, rank: int, world_size: int, feed: Any) -> None:
        self.stream = RankStream(how, rank, world_size, feed)

    def begin(self, epoch: int) -> None:
        self.steps = self.stream.epoch(epoch)

    def step(self) -> tuple[int, int, list[int]]:
        step = next(self.steps)
        return os.getpid(), step.lanes_alive, request_keys([step])


@pytest.mark.slow
def test_eight_processes_on_one_feed_take_every_request_once_and_little_waits_for_them(
    data: tuple[StreamSettings, list[Row]], local_ray: None
) -> None:
    """In lock-step, as trainers: the same global batches as one rank that reads by itself. A window a unit and
    many epochs, so that there are more blocks than may wait."""
    how, _ = data
    how = replace(how, ingest=how.ingest.model_copy(update={"lanes": 16, "window_units": 1}), epochs=tuple(range(6)))
    feed = shared_feed(by_ray(how), 8)
    ranks = [Consumer.remote(by_ray(how), rank, 8, feed) for rank in range(8)]  # type: ignore[attr-defined]
    (alone,) = world(how, 1)
    processes: set[int] = set()
    for epoch in (0, 4):  # the epochs between are passed over
        ray.get([rank.begin.remote(epoch) for rank in ranks])
        whole = take_epoch([alone], epoch)
        for step in whole:
            taken = ray.get([rank.step.remote() for rank in ranks])
            processes |= {process for process, _, _ in taken}
            assert sum(alive for _, alive, _ in taken) == step[0].lanes_alive
            assert sorted(key for _, _, keys in taken for key in keys) == sorted(request_keys(step))
        assert all(not alive for _, alive, _ in ray.get([rank.step.remote() for rank in ranks]))
    assert len(processes) == 8
    # a rank may wait for a block behind those of others, which then wait as well
    assert max(ray.get(feed.most_waiting.remote())) <= 2 * (BLOCKS_AHEAD + 1)
    for rank in ranks:
        ray.kill(rank)


def test_ray_data_raises_the_original_error_and_nothing_else(
    tmp_path: Path, local_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once everything that comes before the bad shard is trained on, as with the thread, also where both are in a
    parcel."""
    how, shard = lose_a_shard(tmp_path, "ray_data")
    whole = [request_keys(step) for step in take_epoch(world(by_thread(how), 1), 0)]
    shard.unlink()
    before: dict[str, list[list[int]]] = {"ray_data": [], "thread": []}

    def consume(how: StreamSettings) -> None:
        for step in islice(RankStream(how, 0, 1).epoch(0), 50):
            before[how.ingest.reader].append(request_keys([step]))

    for reader in (how, by_thread(how)):
        with pytest.raises(DataError, match=r"2024-03-01/002\.parquet is missing") as error:
            consume(reader)
        assert "\n" not in str(error.value)
    good = 20  # requests of the two files before; the last of their four windows shares a parcel with the bad ones
    assert before["ray_data"] == before["thread"] == whole[: len(before["thread"])]
    assert sum(map(len, before["ray_data"])) == good
    printed = capfd.readouterr()
    assert len((printed.out + printed.err).splitlines()) < 5


def test_windows_without_requests_resume_and_a_feed_of_its_own(
    data: tuple[StreamSettings, list[Row]], local_ray: None
) -> None:
    how, rows = data
    how = replace(how, holdout=Holdout(by="request", fraction=0.02), side="evaluation", epochs=(0,))
    how = replace(how, ingest=how.ingest.model_copy(update={"window_units": 1}))
    whole = take_epoch(world(how, 1), 0)
    keys = [key for step in whole for key in request_keys(step)]
    assert 0 < len(keys) < len(rows) / 6
    stream = world(by_ray(how), 1)[0]
    steps = stream.epoch(0)
    assert request_keys([next(steps)]) == request_keys(whole[0])
    second = next(steps)
    position = Position(0, tuple(second.position[lane] for lane in range(4)))
    stream.close()
    assert not stream._thread.is_alive()
    rest = take_epoch(world(replace(by_ray(how), start=position), 1), 0)
    assert [request_keys(step) for step in rest] == [request_keys(step) for step in whole[2:]]


def reading_workers() -> set[int]:
    """The processes of this Ray that run the reading function now."""
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    found = set()
    for process in psutil.Process(raylet).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "_read_block" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_a_worker_killed_while_it_reads_is_retried_and_every_request_comes_once(
    tmp_path: Path, local_ray: None
) -> None:
    """A shard is a pipe at first, at which the tasks that read it hang; their processes are killed there."""
    how, shard = lose_a_shard(tmp_path, "ray_data")
    expected = [request_keys(step) for step in take_epoch(world(by_thread(how), 1), 0)]
    kept = shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)
    got: list[list[int]] = []
    consumer = threading.Thread(target=lambda: got.extend(map(request_keys, take_epoch(world(how, 1), 0))), daemon=True)
    consumer.start()
    deadline, killed = time.monotonic() + 200, 0
    before: set[int] = set()
    while consumer.is_alive() and time.monotonic() < deadline:
        consumer.join(timeout=2)
        reading = reading_workers()
        hung = before & reading  # reading takes no seconds: these are at the pipe, also those that came to it late
        if hung and shard.is_fifo():
            shard.unlink()
            shard.write_bytes(kept)
        for worker in hung:
            os.kill(worker, signal.SIGKILL)
        killed += len(hung)
        before = reading - hung
    assert killed  # a task for each unit of the shard
    assert got == expected


@pytest.mark.slow
def test_a_feed_lies_on_the_node_that_opened_it() -> None:
    """Not on whatever node: one for data may be taken away at any time, and all ranks' reading with it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ingest.feeds_of_two_nodes"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert "feeds at home: 5" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
