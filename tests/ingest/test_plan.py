"""The plan: every unit once, balanced lanes, a pure function of its inputs; and the holdout's two sides."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import ConfigError, DataError
from roo_ray.ingest.holdout import check_sides, rows_of_side, select_files
from roo_ray.ingest.plan import (
    EpochPlan,
    Mode,
    Position,
    derive_seed,
    lanes_of_rank,
    permutation,
    plan_digest,
    plan_epoch,
    unit_costs,
)
from roo_ray.ingest.units import Units, units_of
from roo_ray.requests.manifest import Manifest, ShardFile, Unit
from roo_ray.requests.shards import WriteOptions, write_shards
from roo_ray.sources.hashing import mix64
from tests.ingest import shard_maker
from tests.ingest.shard_maker import random_rows, write_data_set


def shard(day: str, name: str, units: list[Unit]) -> ShardFile:
    return ShardFile(
        path=f"data/{day}/{name}.parquet", day=day, requests=sum(u.requests for u in units),
        impressions=sum(u.impressions for u in units), tokens=sum(u.tokens for u in units), bytes=1,
        time_min=0, time_max=0, units=units,
    )  # fmt: skip


unit_sizes = st.builds(
    lambda r, i, t: Unit(requests=r, impressions=r * i, tokens=r * t),
    st.integers(0, 20), st.integers(1, 30), st.integers(0, 200),
)  # fmt: skip
file_sizes = st.lists(st.lists(unit_sizes, max_size=6), min_size=1, max_size=8)


def units(sizes: list[list[Unit]]) -> Units:
    return units_of([shard("2024-01-01", f"{n:03d}", of) for n, of in enumerate(sizes)])


def sorted_groups(groups: list[int | None]) -> list[int | None]:
    """As they lie in a file."""
    return sorted(groups, key=lambda group: -1 if group is None else group)


def read_by(plan: EpochPlan, lanes: list[int]) -> list[tuple[str, int]]:
    return [(u.path, u.row_group) for window in plan.reading_order(lanes) for u in window.units]


@given(
    file_sizes,
    st.integers(0, 99),
    st.integers(1, 7),
    st.integers(1, 4),
    st.sampled_from(["shuffled", "sequential"]),
)
@settings(max_examples=80, deadline=None)
def test_every_unit_is_read_once_and_lanes_are_balanced(
    sizes: list[list[Unit]], seed: int, lanes: int, window_units: int, mode: Mode
) -> None:
    of = units(sizes)
    plan = plan_epoch(of, seed=seed, epoch=1, lanes=lanes, window_units=window_units, mode=mode)
    wanted = [
        (f"data/2024-01-01/{n:03d}.parquet", g) for n, u in enumerate(sizes) for g in range(len(u)) if u[g].requests
    ]
    assert sorted(read_by(plan, list(range(lanes)))) == sorted(wanted)
    costs = unit_costs(of)
    loads = [costs[of_lane].sum() for of_lane in plan.lanes]
    assert max(loads) - min(loads) <= costs.max(initial=0) + 1e-9
    for lane in range(lanes):
        windows = [plan.window(lane, n) for n in range(plan.num_windows(lane))]
        assert all(len(w.units) == window_units for w in windows[:-1])
        assert all((w.shuffle is None) == (mode == "sequential") for w in windows)
        if mode == "sequential":
            stored = [(u.path, u.row_group) for w in windows for u in w.units]
            assert stored == sorted(stored)


@given(
    st.lists(st.lists(st.sampled_from([None, 0, 1, 2]), max_size=12).map(sorted_groups), min_size=1, max_size=5),
    st.integers(0, 99),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["shuffled", "sequential"]),
)
@settings(max_examples=80, deadline=None)
def test_units_that_share_a_row_group_are_read_together(
    groups: list[list[int | None]], seed: int, lanes: int, window_units: int, mode: Mode
) -> None:
    """As far as a window goes: every unit once, windows no larger than they may be, and no more of a row group than
    there must be."""
    of = units([[Unit(requests=2, impressions=4, tokens=1, row_group=g) for g in file] for file in groups])
    plan = plan_epoch(of, seed=seed, epoch=1, lanes=lanes, window_units=window_units, mode=mode)
    windows = list(plan.reading_order(range(lanes)))
    assert sorted((u.path, u.row_group) for w in windows for u in w.units) == [
        (f"data/2024-01-01/{n:03d}.parquet", u) for n, file in enumerate(groups) for u in range(len(file))
    ]
    assert all(0 < len(window.units) <= window_units for window in windows)
    read: Counter[tuple[str, int | None]] = Counter()
    for window in windows:
        of_window = {(u.path, groups[int(u.path[-11:-8])][u.row_group]) for u in window.units}
        read.update(pair for pair in of_window if pair[1] is not None)
    for n, file in enumerate(groups):
        for group in {g for g in file if g is not None}:
            assert read[f"data/2024-01-01/{n:03d}.parquet", group] == -(-file.count(group) // window_units)


def test_the_plan_is_a_function_of_its_inputs() -> None:
    of = units([[Unit(requests=5, impressions=50, tokens=9)] * 4] * 10)
    how = {"lanes": 3, "window_units": 2}

    def order(seed: int, epoch: int, **other: int) -> list[tuple[str, int]]:
        plan = plan_epoch(of, seed=seed, epoch=epoch, **{**how, **other})
        return read_by(plan, list(range(other.get("lanes", 3))))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 0, lanes=4)


def test_window_seeds_differ() -> None:
    of = units([[Unit(requests=5, impressions=50, tokens=9)] * 4] * 10)
    seeds = [
        window.shuffle
        for seed in range(3)
        for epoch in range(3)
        for window in plan_epoch(of, seed=seed, epoch=epoch, lanes=4, window_units=2).reading_order(range(4))
    ]
    assert len(set(seeds)) == len(seeds) == 9 * 20


@pytest.mark.parametrize(("world", "lanes"), [(1, 4), (2, 4), (3, 4), (4, 4), (5, 12)])
def test_ranks_share_the_lanes(world: int, lanes: int) -> None:
    owned = [lane for rank in range(world) for lane in lanes_of_rank(rank, world, lanes)]
    assert sorted(owned) == list(range(lanes))


def test_more_ranks_than_lanes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 workers share 4 lanes.*ingest\.lanes"):
        lanes_of_rank(0, 5, 4)


def test_a_lane_is_read_in_its_own_order_whoever_owns_it() -> None:
    of = units([[Unit(requests=3, impressions=n + 1, tokens=n) for n in range(5)]] * 6)
    plan = plan_epoch(of, seed=3, epoch=0, lanes=4, window_units=2)
    for lanes in ([0], [0, 2], [0, 1, 2, 3]):
        mine = [w for w in plan.reading_order(lanes) if w.lane == 0]
        assert mine == [plan.window(0, n) for n in range(plan.num_windows(0))]


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_permutation_is_one(seed: int, count: int) -> None:
    order = permutation(count, seed)
    assert np.array_equal(np.sort(order), np.arange(count))


def test_permutation_is_uniform_enough() -> None:
    """Each of 6 orders of 3 items about 1000 times in 6000: chi-square with 5 degrees of freedom below 20.5."""
    drawn = [tuple(permutation(3, derive_seed(n)).tolist()) for n in range(6000)]
    counts = np.array([drawn.count(order) for order in set(drawn)])
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5


def test_known_seeds_stay_what_they_are() -> None:
    """A change here changes the stream of every run in progress: raise plan.PLAN_FORMAT with it."""
    assert derive_seed(7, 3) == 6260190806041092815
    assert permutation(8, 42).tolist() == [4, 1, 6, 2, 3, 0, 7, 5]


def test_the_digest_depends_on_the_stream_and_on_nothing_else() -> None:
    schema = shard_maker.schema()

    def manifest(version: int) -> Manifest:
        return Manifest(version=version, schema_yaml="", schema_digest="", files=[shard("2024-01-01", "a", [])])

    def digest(ingest: Ingest = Ingest(), version: int = 1, seed: int = 0, mode: Mode = "shuffled") -> str:  # noqa: B008
        return plan_digest(manifest(version), schema, ingest, Holdout(), "train", seed, mode)

    assert digest() == digest(Ingest(reader="thread", prefetch_batches=9))
    others = [
        digest(Ingest(lanes=5)), digest(Ingest(batch_impressions=7)), digest(Ingest(window_units=9)),
        digest(version=2), digest(seed=1), digest(mode="sequential"),
    ]  # fmt: skip
    assert len({digest(), *others}) == 7


# ---- time -------------------------------------------------------------------------------------------------


def timed(ranges: list[tuple[float, float]], requests: int = 10) -> Units:
    files = [
        shard("2024-01-01", f"{n:03d}", [Unit(requests=requests, impressions=requests * (1 + n % 3), tokens=0)])
        for n in range(len(ranges))
    ]
    return units_of(
        [f.model_copy(update={"time_min": a, "time_max": b}) for f, (a, b) in zip(files, ranges, strict=True)]
    )


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 3), st.randoms())
@settings(max_examples=50, deadline=None)
def test_by_time_all_lanes_are_at_the_same_place(
    count: int, lanes: int, window_units: int, draw: random.Random
) -> None:
    place = list(range(count))
    draw.shuffle(place)
    of = timed([(10.0 * p, 10.0 * p + 10) for p in place])  # written in any order; a time may end where the next begins
    plan = plan_epoch(of, seed=0, epoch=0, lanes=lanes, window_units=window_units, mode="time")
    times = [[of.time_min[unit] / 10 for unit in lane] for lane in plan.lanes]
    assert sorted(t for lane in times for t in lane) == list(range(count))
    for lane in times:
        assert lane == sorted(lane)
        assert all(t // lanes == n for n, t in enumerate(lane))  # round n of consecutive units, one for every lane
    assert all(window.by_time and window.shuffle is None for window in plan.reading_order(range(lanes)))
    loads = [of.impressions[lane].sum() for lane in plan.lanes]
    assert max(loads) - min(loads) <= 2 * of.impressions.max()


def test_a_layout_that_is_not_time_ordered_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 of 2 neighbouring units overlap.*000\.parquet row group 0.*001\.parquet"):
        plan_epoch(timed([(0, 11), (10, 20), (20, 30)]), seed=0, epoch=0, lanes=2, window_units=1, mode="time")
    by_user = units([[Unit(requests=5, impressions=5, tokens=0)] * 3])  # one file, whose units have its times
    by_user.time_max[:] = 5
    with pytest.raises(DataError, match="2 of 2 neighbouring units overlap in time"):
        plan_epoch(by_user, seed=0, epoch=0, lanes=2, window_units=1, mode="time")


def test_units_with_times_of_their_own_are_ordered_within_a_file(tmp_path: Path) -> None:
    """As a build writes them; one without them keeps the digest that its manifest had."""
    rows = pa.table(
        {
            "request_id": range(40), "site": ["a"] * 40,
            "user_id": [n % 7 for n in range(40)], "num_impressions": [1] * 40,
            "request_time": pa.array([1_709_251_200 + n * 7 % 40 for n in range(40)], pa.timestamp("s", tz="UTC")),
        }
    )  # fmt: skip
    schema = shard_maker.schema().model_copy(update={"features": [], "labels": []})
    options = WriteOptions(row_group_requests=8, compression_level=1, order="time")
    ((file, _),) = write_shards(rows, schema, options, str(tmp_path), 1, 0)
    assert len(file.units) == 5
    plan = plan_epoch(units_of([file]), seed=0, epoch=0, lanes=2, window_units=1, mode="time")
    assert sorted(len(lane) for lane in plan.lanes) == [2, 3]
    assert [u.time_min for u in file.units] == sorted(1_709_251_200.0 + n for n in range(0, 40, 8))
    untimed = Unit(requests=3, impressions=4, tokens=5)
    json_of = TypeAdapter(Unit)
    assert json_of.dump_json(untimed) == b'{"requests":3,"impressions":4,"tokens":5,"first_row":null}'
    assert json_of.validate_json(json_of.dump_json(file.units[0])) == file.units[0]


# ---- holdout ---------------------------------------------------------------------------------------------


def manifest_of_days(*days: str) -> Manifest:
    one = [Unit(requests=1000, impressions=5000, tokens=0)]
    files = [shard(day, name, one) for day in days for name in "ab"]
    return Manifest(version=1, schema_yaml="", schema_digest="", files=files)


def test_the_last_days_are_held_out() -> None:
    manifest = manifest_of_days("2024-01-03", "2024-01-01", "2024-01-07")
    held_out = select_files(manifest, Holdout(days=2), "evaluation")
    assert {f.day for f in held_out} == {"2024-01-03", "2024-01-07"}
    train = select_files(manifest, Holdout(days=2), "train")
    assert [f.day for f in train] == ["2024-01-01"] * 2
    assert len(train) + len(held_out) == len(manifest.files)


def test_by_request_both_sides_read_all_files_and_no_request_is_on_both() -> None:
    manifest = manifest_of_days("2024-01-01")
    holdout = Holdout(by="request", fraction=0.25)
    assert select_files(manifest, holdout, "train") == select_files(manifest, holdout, "evaluation") == manifest.files
    keys = mix64(np.arange(40_000, dtype=np.uint64))
    train, evaluation = (rows_of_side(keys, holdout, side) for side in ("train", "evaluation"))
    assert train is not None
    assert evaluation is not None
    assert np.array_equal(train, ~evaluation)
    assert evaluation.mean() == pytest.approx(0.25, abs=0.01)
    shuffled = keys[::-1]
    again = rows_of_side(shuffled, holdout, "evaluation")
    assert again is not None
    assert np.array_equal(again, evaluation[::-1])


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 50)), min_size=1, max_size=60), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_what_units_fill_decides_the_order_of_reading_alone(sizes: list[tuple[int, float]], lanes: int) -> None:
    """A lane's windows and what is in them are the same, from any position on; across lanes the window that begins
    after the least comes first."""
    made = [Unit(requests=1, impressions=count, tokens=0) for count, _ in sizes]
    plan = plan_epoch(units([made]), seed=3, epoch=1, lanes=lanes, window_units=2)
    other = replace(plan, fills=np.array([fill for _, fill in sizes]))
    start = Position(1, tuple((min(1, plan.num_windows(lane)), 0) for lane in range(lanes)))
    for at in (None, start):
        one, two = list(plan.reading_order(range(lanes), at)), list(other.reading_order(range(lanes), at))
        for lane in range(lanes):
            assert [w for w in one if w.lane == lane] == [w for w in two if w.lane == lane]
        read = dict.fromkeys(range(lanes), 0.0)
        begins = []
        for window in two:
            begins.append(read[window.lane])
            read[window.lane] += sum(sizes[unit.row_group][1] for unit in window.units)
        assert begins == pytest.approx(sorted(begins))


def test_the_split_is_independent_of_hash_buckets() -> None:
    """Shards are hash buckets of the same key: each bucket must have its share of both sides."""
    keys = mix64(np.arange(80_000, dtype=np.uint64))
    held_out = rows_of_side(keys, Holdout(by="request", fraction=0.2), "evaluation")
    assert held_out is not None
    shares = [held_out[keys % np.uint64(8) == b].mean() for b in range(8)]
    shares += [held_out[keys >> np.uint64(61) == b].mean() for b in range(8)]
    assert min(shares) > 0.17
    assert max(shares) < 0.23


def test_a_side_without_data_is_refused(tmp_path: Path) -> None:
    schema = shard_maker.schema()
    with pytest.raises(DataError, match=r"1 day\(s\).*nothing to train on.*holdout\.days"):
        select_files(manifest_of_days("2024-01-01"), Holdout(days=1), "train")
    empty = Manifest(version=3, schema_yaml="", schema_digest="", files=[])
    with pytest.raises(DataError, match="version 3 of the data set has no requests"):
        select_files(empty, Holdout(), "train")
    manifest = write_data_set(tmp_path, random_rows([1, 1, 1], 0), schema, row_group=2)
    with pytest.raises(DataError, match=r"fraction=0\.001 of 3 requests leaves nothing to evaluate on"):
        check_sides(str(tmp_path), manifest, schema, Holdout(by="request", fraction=0.001))
    with pytest.raises(DataError, match=r"fraction=0\.999 of 3 requests leaves nothing to train on"):
        check_sides(str(tmp_path), manifest, schema, Holdout(by="request", fraction=0.999))


def test_evaluation_alone_needs_nothing_to_train_on(tmp_path: Path) -> None:
    one_day = manifest_of_days("2024-01-01")
    assert select_files(one_day, Holdout(days=1), "evaluation") == one_day.files
    two_days = manifest_of_days("2024-01-01", "2024-01-02")
    everything = Holdout(by="all")
    assert select_files(two_days, everything, "evaluation") == two_days.files
    assert rows_of_side(np.zeros(3, np.uint64), everything, "evaluation") is None
    with pytest.raises(DataError, match=r"holdout\.by=all .* nothing to train on"):
        select_files(two_days, everything, "train")
    manifest = write_data_set(tmp_path, random_rows([1, 1, 1], 0), shard_maker.schema(), row_group=2)
    check_sides(str(tmp_path), manifest, shard_maker.schema(), Holdout(by="request", fraction=0.999), "evaluation")
