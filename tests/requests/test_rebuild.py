"""Late data: some days built again, all else carried over; counts and ledger are those of the whole data set."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.config import Build, Config, load_config
from roo_ray.errors import ConfigError, DataError
from roo_ray.requests.exchange import plan_exchange, survey_rows
from roo_ray.requests.forget import forget_users
from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.join import build_requests
from roo_ray.requests.manifest import Manifest, ShardFile, Unit, load_manifest
from roo_ray.requests.rebuild import exchange_record, merge_files, missing_days, same_shards
from roo_ray.requests.versions import named_files
from roo_ray.source_config import ImpressionSource
from roo_ray.sources.times import day_name
from tests.requests.data_sets import files_below, read_all
from tests.requests.tables import START, Row, canonical, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()
DAYS = ["2023-02-27", "2023-02-28", "2023-03-01"]


def log() -> list[Row]:
    """Twelve users, each with two requests on each of three days."""
    rows = []
    for number in range(72):
        day, user = number % 3, number // 6
        time = START + datetime.timedelta(days=day, minutes=number)
        request = request_row(number, user=user, time=time)
        rows += [impression_row(request, item, click=None if item == 2 else item % 2) for item in range(1 + number % 4)]
    return rows


def settings_for(folder: Path, rows: list[Row], days: list[str] | None = None, requests: str = "requests") -> Config:
    """A config whose source holds the rows now, in two files."""
    (folder / "log").mkdir(exist_ok=True)
    for number in range(2):
        pq.write_table(table_of(rows[number::2]), folder / "log" / f"part-{number}.parquet")
    return Config(
        name="test",
        schema=SCHEMA,
        source=ImpressionSource(kind="impressions", path=[str(folder / "log")]),
        requests=str(folder / requests),
        build=Build(row_group_requests=4, buckets=4, days=days or []),
    )


def build(config: Config) -> Manifest:
    return build_requests(config, lambda line: None)


def day(row: Row) -> str:
    return str(row["time"].date())


def test_a_day_is_built_again_and_all_else_is_carried_over(tmp_path: Path, local_ray: None) -> None:
    rows = log()
    first = build(settings_for(tmp_path, rows))
    assert first.days == DAYS
    newest = datetime.date.fromisoformat(DAYS[-1])
    for after, missing in ((-1, 0), (0, 0), (1, 1), (3, 3)):  # the last after two nights that have failed
        through = newest + datetime.timedelta(after)
        days = missing_days(str(tmp_path / "requests"), through)
        assert len(days) == missing
        assert days == sorted(days)
        assert all(DAYS[-1] < day <= through.isoformat() for day in days)
    assert (first.origin.kind, first.origin.parent, first.counts["rows_read"]) == ("full", None, len(rows))
    content = {path: (tmp_path / "requests" / path).read_bytes() for path in named_files(first)}

    late = [dict(row) for row in rows]
    for row in late:  # a late click of one user on the second day; the third day's are not asked for
        if (row["user"] == 5 and day(row) == DAYS[1]) or day(row) == DAYS[2]:
            row["click"] = 1
    late.append(late[-1] | {"item": 40, "time": START + datetime.timedelta(days=5), "rid": "new", "position": 9})
    second = build(settings_for(tmp_path, late, [DAYS[1]]))
    mixed = [row for row in late if day(row) == DAYS[1]] + [row for row in rows if day(row) != DAYS[1]]

    stored = read_all(tmp_path / "requests", second)
    assert canonical(explode_requests(stored, SCHEMA)) == canonical(table_of(mixed).select(SCHEMA.columns))
    assert (second.origin.kind, second.origin.parent, second.origin.days) == ("days", 1, [DAYS[1]])
    assert second.origin.created_at >= first.origin.created_at
    assert second.origin.writer != first.origin.writer
    new = {file.path: file for file in second.files if file.path not in content}
    assert [file.day for file in new.values()] == [DAYS[1]]  # one shard of one day
    untouched = {(file.day, file.shard) for file in first.files} - {(file.day, file.shard) for file in new.values()}
    assert len(untouched) == len(first.files) - 1
    assert {file.path for file in second.files} - set(new) == {
        file.path for file in first.files if (file.day, file.shard) in untouched
    }
    assert files_below(tmp_path / "requests") == sorted(
        ["_manifests/v000001.json", "_manifests/v000002.json", *content, *new]
    )
    assert load_manifest(str(tmp_path / "requests"), 1) == first
    assert all((tmp_path / "requests" / path).read_bytes() == data for path, data in content.items())

    # accounts of the whole data set, against one built from the same rows at once
    whole = build(settings_for(tmp_path, mixed, requests="whole"))
    outside = sum(day(row) != DAYS[1] for row in late)
    read = {"rows_outside_days": outside, "rows_read": len(late), "impressions_read": len(late) - outside}
    assert {name: second.counts[name] for name in read} == read
    assert {name: n for name, n in second.counts.items() if name not in read} == {
        name: n for name, n in whole.counts.items() if name not in read
    }
    assert second.counts["impressions"] == len(mixed)
    for name, entry in second.ledger["columns"].items():
        expected = whole.ledger["columns"][name]
        assert entry["elements"] == expected["elements"]
        assert entry.get("kept") == expected.get("kept")
        assert entry["disk_bytes"]["request"] == expected["disk_bytes"]["request"]
        # as logged: by share of impressions, of differently sorted logs
        logged = [side["disk_bytes"]["impression"] for side in (entry, expected)]
        assert max(logged) <= 2 * min(logged)
    assert {name: second.accounts[name] for name in DAYS[::2]} == {name: first.accounts[name] for name in DAYS[::2]}
    assert [file.digest for file in second.files] == [file.digest for file in whole.files]

    # once more, with nothing new: no file is written; with a late impression in a day: only its shards are
    third = build(settings_for(tmp_path, late, [DAYS[1]]))
    assert (third.version, third.files, third.accounts) == (3, second.files, second.accounts)
    late.append(next(row for row in late if day(row) == DAYS[1] and row["user"] == 2) | {"item": 45, "position": 9})
    fourth = build(settings_for(tmp_path, late, [DAYS[1]]))
    changed = [file for file in fourth.files if file not in third.files]
    assert 1 <= len(changed) <= 2
    assert fourth.impressions == len(mixed) + 1

    # forgetting works on what was carried over, and purges every version that holds the user
    report = forget_users(str(tmp_path / "requests"), "5", Build(), lambda line: None)
    left = [row for row in [*mixed, late[-1]] if row["user"] != 5]
    fifth = load_manifest(str(tmp_path / "requests"))
    assert report.purged == [1, 2, 3, 4]
    assert canonical(explode_requests(read_all(tmp_path / "requests", fifth), SCHEMA)) == canonical(
        table_of(left).select(SCHEMA.columns)
    )
    assert fifth.counts["null_labels"] == sum(row["click"] is None for row in left)


def test_what_is_refused(tmp_path: Path, local_ray: None) -> None:
    rows = log()
    with pytest.raises(DataError, match=r"has no version yet; build it whole first \(build.days=\[\]\)"):
        build(settings_for(tmp_path, rows, [DAYS[0]]))
    with pytest.raises(DataError, match="has no day yet, after which others could be missing"):
        missing_days(str(tmp_path / "requests"), datetime.date(2023, 3, 1))
    first = build(settings_for(tmp_path, rows))
    before = files_below(tmp_path / "requests")

    other = settings_for(tmp_path, rows, [DAYS[0]])
    narrower = small_schema(lambda text: text.replace("max_length: 8", "max_length: 7"))
    with pytest.raises(DataError, match=r"build.days: version 1 of .* has another schema .* build .* whole"):
        build(other.model_copy(update={"request_schema": narrower}))
    with pytest.raises(DataError, match=r"the source has no request of 2023-02-28, which version 1 has; nothing"):
        build(settings_for(tmp_path, [row for row in rows if day(row) != DAYS[1]], DAYS[:2]))
    with pytest.raises(DataError, match=r"the source has no request of 2024-01-01; nothing is published"):
        build(settings_for(tmp_path, rows, ["2024-01-01"]))
    assert files_below(tmp_path / "requests") == before
    assert load_manifest(str(tmp_path / "requests")) == first


def test_days_in_a_config(tmp_path: Path) -> None:
    text = "{name: x, schema: s.yaml, requests: r, build: {days: [2023-02-27, '2023-02-28']}}"
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "s.yaml").write_text(SCHEMA.to_yaml())
    assert load_config(tmp_path / "c.yaml").build.days == DAYS[:2]
    assert load_config(tmp_path / "c.yaml", ["build.days=2023-03-01"]).build.days == DAYS[2:]
    with pytest.raises(ConfigError, match=r"build\.days\.0: '2023-02-30' is no day; write it as YYYY-MM-DD"):
        load_config(tmp_path / "c.yaml", ["build.days=['2023-02-30']"])


# ---- without Ray ---------------------------------------------------------------------------------


def manifest_of(days: dict[str, int], exchange: dict[str, list[tuple[int, int]]]) -> Manifest:
    files = [shard_file(name, 0, "x", impressions) for name, impressions in days.items()]
    return Manifest(version=1, schema_yaml="", schema_digest="", files=files, exchange=exchange)


def shard_file(name: str, shard: int, digest: str, impressions: int = 1, path: str = "") -> ShardFile:
    unit = Unit(requests=1, impressions=impressions, tokens=0)
    return ShardFile(
        path=path or f"{name}-{shard}-{digest}", day=name, shard=shard, requests=1, impressions=impressions, tokens=0,
        bytes=1, digest=digest, time_min=0, time_max=0, units=[unit],
    )  # fmt: skip


def rows_of(draw: Any, size: int) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(draw)
    users = generator.integers(0, 30, size)
    hashes = np.random.default_rng(7).integers(0, 2**64, 30, np.uint64)
    return generator.integers(100, 104, size), hashes[users], generator.integers(0, 2**64, size, np.uint64)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(0, 80), st.integers(1, 6), st.integers(200, 10**6))
def test_rows_keep_their_shard_whatever_comes_late(seed: int, size: int, late: int, shards: int, memory: int) -> None:
    build = Build(buckets=shards, bucket_bytes=memory)
    days, users, requests = rows_of(seed, size)
    first = plan_exchange(survey_rows(days, users, requests, 100 * size), build, True)
    named = {day_name(int(d)): int((days == d).sum()) for d in np.unique(days)}
    parent = manifest_of(named, exchange_record(first))
    more = [np.concatenate(pair) for pair in zip((days, users, requests), rows_of(seed + 1, late), strict=True)]
    planned = plan_exchange(survey_rows(*more, 100 * len(more[0])), build, True)
    counted = {day_name(int(d)): int((more[0] == d).sum()) for d in np.unique(more[0])}
    chosen = [day_name(int(d)) for d in np.unique(more[0])][:2]
    again = same_shards(planned, counted, chosen, parent)
    assert [day_name(int(d)) for d in again.days] == chosen
    assert [s.first for s in again.shards] == [0, *(s.last for s in again.shards)][:-1]

    def placed(exchange: Any) -> list[tuple[int, int, int]]:
        mine = np.isin(days, again.days)
        at = exchange.bucket_of(days[mine], users[mine], requests[mine])
        shard = {bucket: s for s in exchange.shards for bucket in range(s.first, s.last)}
        return [(shard[b].day, shard[b].number, b - shard[b].first) for b in at.tolist()]

    stable = [name for name in chosen if named.get(name) and counted[name] <= 2 * named[name]]
    before, after = placed(first), placed(again)
    for old, new in zip(before, after, strict=True):
        assert old[0] == new[0]
        assert old == new or day_name(old[0]) not in stable


def test_equal_bytes_keep_the_old_file() -> None:
    parent = manifest_of({}, {}).model_copy(
        update={"files": [shard_file("a", 0, "1"), shard_file("a", 1, "2"), shard_file("b", 0, "3")]}
    )
    built = [shard_file("a", 0, "1", path="new0"), shard_file("a", 1, "9", path="new1"), shard_file("a", 2, "2")]
    merged = merge_files(["a"], built, parent)
    assert [file.path for file in merged] == ["a-0-1", "new1", "a-2-2", "b-0-3"]


def test_a_request_key_of_a_day_that_is_not_built(tmp_path: Path, local_ray: None) -> None:
    """Only the days that are built are read from the source; the others' keys are in the version before."""
    rows = log()
    build(settings_for(tmp_path, rows))
    other = next(row for row in rows if day(row) == DAYS[0])
    twice = next(row for row in rows if day(row) == DAYS[1]) | {name: other[name] for name in SCHEMA.keys.request}
    late = [row for row in rows if day(row) == DAYS[1]] + [twice | {"user": 11}]
    config = settings_for(tmp_path, late, [DAYS[1]])
    with pytest.raises(DataError, match="the request key names several requests: 1 keys have different users or times"):
        build(config)
    assert load_manifest(str(tmp_path / "requests")).version == 1
    unchecked = config.model_copy(update={"build": config.build.model_copy(update={"check_other_days": False})})
    assert build(unchecked).version == 2
