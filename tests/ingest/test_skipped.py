"""Shards that come and go under a run that skips what it cannot read: exactly once over resumes, and counted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import DataError
from roo_ray.ingest.plan import Position
from roo_ray.ingest.stream import RankStream, Step, StreamSettings, whole_position
from roo_ray.training.counts import unreadable
from tests.ingest import shard_maker
from tests.ingest.shard_maker import random_rows, request_key, write_data_set

LANES = 3


@pytest.fixture
def data(tmp_path: Path) -> tuple[StreamSettings, set[int], list[Path]]:
    """Settings that skip bad shards, the keys of the requests to train on, and the files that these are in."""
    schema = shard_maker.schema()
    rows = random_rows([1 + (i * 5) % 9 for i in range(240)], 9, days=2)
    manifest = write_data_set(tmp_path, rows, schema, row_group=4, file_rows=8)
    ingest = Ingest(
        lanes=LANES, batch_impressions=12, window_units=2, reader="thread", prefetch_batches=2, on_bad_shard="skip"
    )
    last = max(row["request_time"].date() for row in rows)
    keys = {request_key(row, schema) for row in rows if row["request_time"].date() != last}
    files = [tmp_path / file.path for file in manifest.files if file.day != last.isoformat()]
    return StreamSettings(str(tmp_path), 1, schema, ingest, Holdout(), "train", 11, (0,), "shuffled"), keys, files


@contextmanager
def missing(*files: Path) -> Iterator[None]:
    """Without these files."""
    for file in files:
        file.rename(f"{file}.gone")
    try:
        yield
    finally:
        for file in files:
            Path(f"{file}.gone").rename(file)


def through_json(position: Position) -> Position:
    """As a checkpoint gives it back."""
    epoch, lanes, skipped = json.loads(json.dumps([position.epoch, position.lanes, position.skipped]))
    return Position(epoch, tuple(map(tuple, lanes)), tuple(map(tuple, skipped)))  # type: ignore[arg-type]


class Lineage:
    """What the surviving model has trained on: (keys, requests that could not be read) of each step."""

    def __init__(self, settings: StreamSettings) -> None:
        self.settings = settings
        self.steps: list[tuple[list[int], int]] = []
        self.position: Position | None = None

    def go(self, world: int, stop_after: int | None = None) -> None:
        """Trains from the last position with ``world`` workers, to the end or for some steps, and takes a position."""
        how = replace(self.settings, start=self.position)
        streams = [RankStream(how, rank, world) for rank in range(world)]
        iterators = [stream.epoch(0) for stream in streams]
        try:
            while stop_after is None or stop_after > 0:
                taken = [next(iterator) for iterator in iterators]
                self.add(taken)
                if not sum(step.lanes_alive for step in taken):
                    return
                stop_after = None if stop_after is None else stop_after - 1
        finally:
            for stream in streams:
                stream.close()

    def add(self, taken: list[Step]) -> None:
        keys = [key for s in taken if s.lanes_alive for key in s.batch.request_key.tolist()]
        self.steps.append((keys, sum(map(unreadable, taken))))
        lanes = {lane: at for step in taken for lane, at in step.position.items()}
        units = {lane: of for step in taken for lane, of in step.skipped_units.items()}
        self.position = through_json(whole_position(0, lanes, units))

    @property
    def keys(self) -> list[int]:
        return [key for keys, _ in self.steps for key in keys]

    @property
    def skipped(self) -> int:
        return sum(skipped for _, skipped in self.steps)


def test_a_shard_that_comes_back_stays_skipped_for_the_windows_in_progress(
    data: tuple[StreamSettings, set[int], list[Path]],
) -> None:
    """After every step of the epoch, on 1 to 3 workers: what was left out of a window that is half trained on stays
    out; windows that were not begun have the shard again; and all requests are trained on once or counted."""
    how, keys, files = data
    whole = Lineage(how)
    with missing(*files[::3]):
        whole.go(1)
    assert (len(whole.keys), whole.skipped) == (len(keys) - 40, 40)
    amid = 0
    for stop in range(1, len(whole.steps)):
        run = Lineage(how)
        with missing(*files[::3]):
            run.go(1 + stop % LANES, stop)
        assert run.position is not None
        amid += any(run.position.skipped)
        run.go(1 + (stop + 1 + stop // LANES) % LANES)
        trained = Counter(run.keys)
        assert max(trained.values()) == 1
        assert set(trained) <= keys
        assert len(run.keys) + run.skipped == len(keys)
    assert amid > len(whole.steps) / 3


def test_a_shard_that_was_trained_on_in_part_must_be_there_again(
    data: tuple[StreamSettings, set[int], list[Path]],
) -> None:
    how, keys, files = data
    run = Lineage(how)
    run.go(1, 1)
    assert run.position is not None
    assert all(taken for _, taken in run.position.lanes)
    assert run.position.skipped == ()
    with (
        missing(*files),
        pytest.raises(DataError, match=r"\.parquet is missing; .*It cannot be skipped .*amid a window that has it"),
    ):
        run.go(2)
    run.go(2)
    assert (sorted(run.keys), run.skipped) == (sorted(keys), 0)


@pytest.mark.parametrize("seed", range(6))
def test_shards_that_come_and_go(data: tuple[StreamSettings, set[int], list[Path]], seed: int) -> None:
    """Any of them, between any two runs of some steps: never a request twice, and none missing that is not counted."""
    how, keys, files = data
    draw, run, refused = random.Random(seed), Lineage(how), 0
    while True:
        before, steps = run.position, len(run.steps)
        try:
            with missing(*draw.sample(files, draw.randint(0, len(files) - 1))):
                run.go(draw.randint(1, LANES), draw.randint(1, 2))
        except DataError as error:  # back to the checkpoint
            assert "It cannot be skipped" in str(error)  # noqa: PT017
            run.position, run.steps, refused = before, run.steps[:steps], refused + 1
        if run.steps and not run.steps[-1][0]:
            break
    assert max(Counter(run.keys).values()) == 1
    assert set(run.keys) <= keys
    assert len(run.keys) + run.skipped == len(keys)
    assert run.skipped


def test_what_cannot_be_read_is_counted_by_the_epoch_that_comes_to_it(
    data: tuple[StreamSettings, set[int], list[Path]],
) -> None:
    """Not by the reader, which is ahead, nor added up over epochs; windows without a batch are counted too."""
    how, keys, files = data
    how = replace(how, epochs=(0, 1))
    with missing(*files):
        stream = RankStream(how, 0, 1)
        steps = stream.epoch(0)
        first, second = next(steps), next(steps)
        assert (first.lanes_alive, unreadable(first), unreadable(second)) == (0, len(keys), 0)
        assert unreadable(next(stream.epoch(1))) == len(keys)
        assert stream.skipped_requests == 2 * len(keys)
    with missing(files[0]):
        stream = RankStream(how, 0, 1)
        stream._thread.join(timeout=0.3)
        skipped, begun = [], stream.epoch(0)
        while (step := next(begun)).lanes_alive:
            skipped.append(unreadable(step))
            assert stream.skipped_requests == sum(skipped)
        assert sum(skipped) + unreadable(step) == 8
        assert skipped.count(0) > len(skipped) / 2
        stream.close()


def test_a_missing_shard_of_small_data_that_is_held_out_by_request_is_skipped(tmp_path: Path) -> None:
    """So little data that the stream looks whether a side of the holdout is empty, before the first batch."""
    schema, rows = shard_maker.schema(), random_rows([3] * 40, 9)
    manifest = write_data_set(tmp_path, rows, schema, row_group=4, file_rows=8)
    ingest = Ingest(lanes=2, batch_impressions=12, window_units=2, reader="thread", on_bad_shard="skip")
    holdout = Holdout(by="request", fraction=0.2)
    how = StreamSettings(str(tmp_path), 1, schema, ingest, holdout, "train", 11, (0,), "shuffled")
    sides = {}
    with missing(tmp_path / manifest.files[1].path):
        for side in ("train", "evaluation"):
            run = Lineage(replace(how, side=side))  # type: ignore[arg-type]
            run.go(2)
            sides[side] = run
        with pytest.raises(DataError, match=r"\.parquet is missing"):
            RankStream(replace(how, ingest=ingest.model_copy(update={"on_bad_shard": "fail"})), 0, 1)
    assert all(run.keys and run.skipped == 8 for run in sides.values())
    keys = sides["train"].keys + sides["evaluation"].keys
    assert sorted(keys) == sorted(request_key(row, schema) for row in rows[:8] + rows[16:])
    with missing(*(tmp_path / file.path for file in manifest.files)):
        run = Lineage(how)
        run.go(2)
        assert (run.keys, run.skipped) == ([], 40)
