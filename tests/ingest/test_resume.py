"""Exactly once, audited by request ids: kills at random steps, other numbers of workers, positions in checkpoints."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from roo_ray.config import Holdout, Ingest
from roo_ray.ingest import stream as stream_module
from roo_ray.ingest.plan import Position, differences
from roo_ray.ingest.stream import RankStream, Step, StreamSettings
from tests.ingest import shard_maker
from tests.ingest.plan_changes import CHANGES, inputs
from tests.ingest.shard_maker import random_rows, request_key, write_data_set

COUNTS = [1 + (i * 5) % 9 for i in range(180)] + [40, 2, 60, 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[StreamSettings, list[int]]:
    """Settings of the thread reader, and the keys of the requests that are trained on."""
    folder, schema = tmp_path_factory.mktemp("resume"), shard_maker.schema()
    rows = random_rows(COUNTS[::-1], 9, days=4)
    write_data_set(folder, rows, schema, row_group=6, file_rows=20)
    ingest = Ingest(lanes=4, batch_impressions=12, window_units=3, reader="thread", prefetch_batches=2)
    last = max(row["request_time"].date() for row in rows)
    keys = sorted(request_key(row, schema) for row in rows if row["request_time"].date() != last)
    return StreamSettings(str(folder), 1, schema, ingest, Holdout(), "train", 11, (0, 1), "shuffled"), keys


class Run:
    """The data side of a training run in epoch 0: lock-step ranks, checkpoints of the position, and what the
    surviving model has trained on."""

    def __init__(self, settings: StreamSettings) -> None:
        self.settings = settings
        self.saved: tuple[Position | None, int] = (None, 0)
        self.steps: list[list[int]] = []  # request keys of each step of the lineage
        self.dropped: list[int] = []

    def go(self, world: int, kill_after: int | None, checkpoint_every: int) -> bool:
        """Trains from the last checkpoint with ``world`` workers; whether the epoch ended before the kill."""
        position, step = self.saved
        self.steps = self.steps[:step]  # what came after the checkpoint is lost with the workers
        how = replace(self.settings, start=position)
        streams = [RankStream(how, rank, world) for rank in range(world)]
        iterators = [stream.epoch(0) for stream in streams]
        while True:
            if kill_after is not None and len(self.steps) - step >= kill_after:
                for stream in streams:
                    stream.close()
                return False
            taken = [next(iterator) for iterator in iterators]
            if sum(s.lanes_alive for s in taken) < (how.ingest.lanes if how.ingest.drop_last else 1):
                self.dropped = self._left(taken, iterators)
                return True
            self.steps.append(keys_of(taken))
            if len(self.steps) % checkpoint_every == 0:
                self.saved = (through_json(position_of(taken)), len(self.steps))

    def _left(self, taken: list[Step], iterators: list[Iterator[Step]]) -> list[int]:
        """The keys of what comes behind the last step that is trained on."""
        keys: list[int] = []
        while sum(s.lanes_alive for s in taken):
            keys += keys_of(taken)
            taken = [next(iterator) for iterator in iterators]
        return keys


def keys_of(taken: list[Step]) -> list[int]:
    return sorted(key for s in taken if s.lanes_alive for key in s.batch.request_key.tolist())


def position_of(taken: list[Step]) -> Position:
    lanes = {lane: at for step in taken for lane, at in step.position.items()}
    return Position(0, tuple(lanes[lane] for lane in sorted(lanes)))


def through_json(position: Position) -> Position:
    text = json.dumps([position.epoch, position.lanes])
    assert len(text) < 100
    epoch, lanes = json.loads(text)
    return Position(epoch, tuple((window, taken) for window, taken in lanes))


@pytest.mark.parametrize("seed", range(6))
def test_every_request_is_trained_once_over_kills_and_world_sizes(
    data: tuple[StreamSettings, list[int]], seed: int
) -> None:
    how, keys = data
    if seed % 2:  # by cost, which also decides in which order windows are read
        how = replace(how, ingest=how.ingest.model_copy(update={"batch_cost": 30.0}), cost=(1.0, 2.0, 0.5, 1.0, 0.1))
    draw = random.Random(seed)
    whole = Run(how)
    assert whole.go(1, None, 10**9)
    run, every = Run(how), draw.randint(1, 5)
    worlds = [1, 2, 3, 1] if seed else [4, 1, 3, 2]
    for world in worlds[:-1]:
        assert not run.go(world, draw.randint(1, 5), every)
    assert run.go(worlds[-1], None, every)
    assert Counter(key for step in run.steps for key in step) == Counter(keys)
    assert run.steps == whole.steps  # and each step is the step that it would have been


def test_a_split_request_is_resumed_between_its_parts(data: tuple[StreamSettings, list[int]]) -> None:
    how, keys = data
    how = replace(how, ingest=how.ingest.model_copy(update={"oversize": "split"}))
    whole, run = Run(how), Run(how)
    whole.go(2, None, 10**9)
    for world in (1, 3, 2, 1, 2):
        run.go(world, 4, 1)
    run.go(3, None, 1)
    assert run.steps == whole.steps
    assert {key for step in run.steps for key in step} == set(keys)


def test_resuming_reads_only_the_windows_in_progress(
    data: tuple[StreamSettings, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, _ = data
    steps = RankStream(how, 0, 1).epoch(0)
    position = position_of([[next(steps) for _ in range(9)][-1]])
    assert any(window for window, _ in position.lanes)
    read: list[tuple[int, int, int]] = []
    real = stream_module.pack_window
    monkeypatch.setattr(
        stream_module, "pack_window", lambda s, w: (read.append((w.epoch, w.lane, w.index)), real(s, w))[1]
    )
    again = RankStream(replace(how, start=position), 0, 1)
    for step in again.epoch(0):
        if not step.lanes_alive:
            break
    first = {lane: min(index for epoch, of, index in read if (epoch, of) == (0, lane)) for lane in range(4)}
    assert [first[lane] for lane in range(4)] == [window for window, _ in position.lanes]


def test_the_next_epoch_begins_at_its_beginning(data: tuple[StreamSettings, list[int]]) -> None:
    how, keys = data
    steps = RankStream(how, 0, 1).epoch(0)
    position = position_of([[next(steps) for _ in range(5)][-1]])
    resumed = RankStream(replace(how, start=position), 0, 1)
    rest = 0
    for step in resumed.epoch(0):
        rest += step.requests
        if not step.lanes_alive:
            break
    seen: list[int] = []
    for step in resumed.epoch(1):
        if not step.lanes_alive:
            break
        seen += keys_of([step])
    assert 0 < rest < len(keys)
    assert sorted(seen) == keys


def test_a_position_at_the_end_leaves_nothing(data: tuple[StreamSettings, list[int]]) -> None:
    how, _ = data
    last = None
    for step in RankStream(how, 0, 1).epoch(0):
        if not step.lanes_alive:
            break
        last = step
    assert last is not None
    position = position_of([last])
    assert all(taken == 0 for _, taken in position.lanes)
    again = RankStream(replace(how, start=position), 0, 1)
    assert next(again.epoch(0)).lanes_alive == 0
    assert next(again.epoch(1)).lanes_alive == 4


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_stream_is_named(change: str) -> None:
    changes, words = CHANGES[change]
    found = differences(inputs(), inputs(changes))
    assert any(line.startswith(f"{change.split()[0]} was ") and words in line for line in found)
    also = {"data_version": {"data_digest"}, "truncation": {"schema_digest"}}.get(change, set())
    assert {line.split()[0] for line in found} == {change.split()[0]} | also


def test_every_input_of_the_plan_is_in_these_tests() -> None:
    assert {change.split()[0] for change in CHANGES} | {"format"} == set(inputs())


def test_what_does_not_change_the_stream_is_not_in_the_way() -> None:
    assert differences(inputs(), inputs({"reader": "thread", "prefetch_batches": 9})) == []
    # without a budget of cost the coefficients cut nothing
    cost = (2.0, 0.0, 0.0, 1.0, 0.0)
    assert differences(inputs({"batch_cost": None}), inputs({"batch_cost": None, "cost": cost})) == []


@pytest.mark.parametrize("worlds", [(1, 3), (2, 1), (3, 2)])
def test_an_epoch_that_drops_its_end_drops_the_same_after_a_resume(
    data: tuple[StreamSettings, list[int]], worlds: tuple[int, int]
) -> None:
    """Trained on or dropped, every request is one of both, once; at which step the epoch ends does not depend on kills
    or workers."""
    how, keys = data
    how = replace(how, ingest=how.ingest.model_copy(update={"drop_last": True}))
    whole, run = Run(how), Run(how)
    assert whole.go(1, None, 10**9)
    assert not run.go(worlds[0], len(whole.steps) // 2, 1)
    assert run.go(worlds[1], None, 3)
    assert run.steps == whole.steps
    assert sorted(run.dropped) == sorted(whole.dropped)
    assert whole.dropped
    assert Counter(key for step in [*run.steps, run.dropped] for key in step) == Counter(keys)
    # from the last checkpoint, at the end: nothing is left to train on, and the same is dropped
    again = Run(how)
    again.saved, again.steps = run.saved, list(run.steps)
    assert again.go(worlds[0], None, 1)
    assert (again.steps, sorted(again.dropped)) == (whole.steps, sorted(whole.dropped))
