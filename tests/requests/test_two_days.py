"""Rows of one request with times on several days: settled by the rule, else refused."""

from __future__ import annotations

import datetime
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roo_ray.config import Build, Config
from roo_ray.errors import DataError
from roo_ray.requests import join, settling, two_days
from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.join import build_requests
from roo_ray.requests.manifest import Manifest, manifest_versions
from roo_ray.requests.report import CheckFailed
from roo_ray.requests.staging import pieces_of
from roo_ray.requests.two_days import find_two_days, stage_days
from roo_ray.source_config import ImpressionSource
from tests.requests.data_sets import read_all
from tests.requests.in_process import run_tasks
from tests.requests.tables import START, TYPES, Row, canonical, impression_row, request_row, small_schema

SCHEMA = small_schema(
    lambda text: text.replace("position: position}", "position: position, impression_time: shown}").replace(
        "impression: [slot]", "impression: [slot, shown]"
    )
)
SHOWN = TYPES.append(pa.field("shown", pa.timestamp("us")))
RULES = ("first", "last", "max_time")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds without Ray."""
    for module in (join, settling):
        monkeypatch.setattr(module, "run_tasks", run_tasks)


def make(folder: Path, rows: list[Row], to: str = "requests", **build: Any) -> Manifest:
    """The data set of a log of two files."""
    (folder / "log").mkdir(exist_ok=True)
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(rows[number::2], SHOWN), folder / "log" / f"part-{number}.parquet")
    config = Config(
        name="test",
        schema=SCHEMA,
        source=ImpressionSource(kind="impressions", path=[str(folder / "log")]),
        requests=str(folder / to),
        build=Build(**{"buckets": 1, "max_empty_history_share": 1.0, "on_leaking_history": "count"} | build),
    )
    return build_requests(config, lambda line: None)


def log(requests: list[list[tuple[int, int]]]) -> list[Row]:
    """Requests of impressions, each given as (days after the first, hour at which it was shown)."""
    rows = []
    for number, impressions in enumerate(requests):
        for item, (days, hour) in enumerate(impressions):
            time = START + datetime.timedelta(days=days, minutes=number)
            request = request_row(number, time=time, note=f"of day {days}")
            rows.append(impression_row(request, item, shown=START + datetime.timedelta(hours=hour)))
    return rows


def mended(rows: list[Row], rule: str) -> list[Row]:
    """The log in which every row says what its request keeps, one request after the other."""
    result = []
    for _, some in itertools.groupby(rows, key=lambda row: row["rid"]):
        own = sorted(some, key=lambda row: row["position"])
        best = max(own, key=lambda row: (row["shown"], row["position"]))
        kept = {"first": own[0], "last": own[-1], "max_time": best}[rule]
        result += [row | {name: kept[name] for name in SCHEMA.request_columns} for row in own]
    return result


LOGS = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=4), min_size=1, max_size=8
)


@given(LOGS, st.sampled_from(RULES), st.integers(1, 3), st.integers(1, 3), st.randoms())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_settled_as_if_the_log_had_said_so(
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    requests: list[list[tuple[int, int]]],
    rule: str,
    together: int,
    shards: int,
    random: Any,
) -> None:
    """The same bytes as of the log that has the kept values everywhere; all conflicts counted."""
    monkeypatch.setattr(two_days, "TOGETHER", together)
    rows = log(requests)
    expected = mended(rows, rule)
    random.shuffle(rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = make(folder, expected, "plain")
        found = make(folder, rows, on_request_conflict=rule)
        assert [(f.day, f.digest) for f in found.files] == [(f.day, f.digest) for f in plain.files]
        cut = make(folder, rows, "cut", on_request_conflict=rule, buckets=shards)
        stored = explode_requests(read_all(folder / "cut", cut), SCHEMA)
        assert canonical(stored) == canonical(pa.Table.from_pylist(expected, SHOWN).select(SCHEMA.columns))
    several = sum(len({days for days, _ in request}) > 1 for request in requests)
    assert found.counts.get("requests_of_two_days", 0) == several
    assert found.counts.get("request_conflicts.time", 0) == several
    entries = [check for check in found.report["checks"] if check["check"] == "request with times on two days"]
    assert [(entry["found"], entry["rule"], entry["status"]) for entry in entries] == (
        [(several, rule, "repaired")] if several else []
    )


ASTRIDE = [[(0, 0)], [(0, 1), (1, 0), (1, 0)], [(1, 0)], [(2, 0)]]


def test_the_default_refuses_and_says_what_can_be_done(in_process: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 keys have different users or times.*time=2023-02-27.*on_request_conflict"):
        make(tmp_path, log(ASTRIDE))
    assert manifest_versions(str(tmp_path / "requests")) == []


def test_two_users_are_two_requests_whatever_the_rule(in_process: None, tmp_path: Path) -> None:
    rows = log(ASTRIDE)
    rows[1]["user"] = 4
    with pytest.raises(CheckFailed, match="user column 'user' varies within 1 requests") as caught:
        make(tmp_path, rows, on_request_conflict="first")
    assert "rid=r1" in str(caught.value)


def test_days_that_are_built_again(in_process: None, tmp_path: Path) -> None:
    """Both days of a request are decided together; requests of other days stay out, and are counted."""
    rows = log([*ASTRIDE, [(2, 0), (3, 0)]])
    first = make(tmp_path, rows, on_request_conflict="last")
    assert first.days == ["2023-02-27", "2023-02-28", "2023-03-01", "2023-03-02"]
    with pytest.raises(DataError, match=r"request rid=r1, shard=1 has times on 2023-02-27 and 2023-02-28.*build.days"):
        make(tmp_path, rows, on_request_conflict="last", days=["2023-02-28"])
    again = make(tmp_path, rows, on_request_conflict="last", days=["2023-02-27", "2023-02-28"])
    assert again.files == first.files  # the same bytes: the same files
    assert (again.counts["requests_of_two_days"], again.counts["rows_outside_days"]) == (1, 3)


def test_a_flood_of_conflicts_is_a_wrong_column(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_days, "MOST_REQUESTS", 2)
    rows = log([[(0, 0), (1, 0)]] * 3)
    with pytest.raises(DataError, match="more than 2 requests have times 'time' on several UTC days"):
        make(tmp_path, rows, on_request_conflict="first")
    assert make(tmp_path, log([[(0, 0), (1, 0)]] * 2), on_request_conflict="first").requests == 2


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), max_size=40), st.integers(1, 5), st.data())
@settings(max_examples=50, deadline=None)
def test_hashes_with_several_days(pairs: list[tuple[int, int]], ranges: int, data: Any) -> None:
    """Found over all units and ranges, each once."""
    some = [value for value, _ in pairs] or [0]
    pairs = pairs + data.draw(st.lists(st.tuples(st.sampled_from(some), st.integers(0, 3)), max_size=20))
    built = data.draw(st.sets(st.integers(0, 3)))
    with tempfile.TemporaryDirectory() as folder:

        class Plan:
            staging = folder

        runs = [
            stage_days(
                folder,
                unit,
                [(np.array([p[0] for p in part], np.uint64), np.array([p[1] for p in part], np.int64))],
                ranges,
            )
            for unit, part in enumerate([pairs[0::2], pairs[1::2]])
        ]
        found = [find_two_days(Plan(), pieces, sorted(built)).tolist() for pieces in pieces_of(runs, ranges)]
    days_of: dict[int, set[int]] = {}
    for value, day in pairs:
        days_of.setdefault(value, set()).add(day)
    wanted = {value for value, days in days_of.items() if len(days) > 1 and (not built or days & built)}
    assert sorted(itertools.chain(*found)) == sorted(wanted)


def test_on_ray(local_ray: None, tmp_path: Path) -> None:
    found = make(tmp_path, log(ASTRIDE), on_request_conflict="max_time")
    assert (found.requests, found.impressions, found.days) == (4, 6, ["2023-02-27", "2023-02-28", "2023-03-01"])
    assert [file.requests for file in found.files] == [2, 1, 1]  # shown last on the first day
