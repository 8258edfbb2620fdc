"""Separate logs: attribution against a brute-force reference, and every way the logs can disagree."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import parse_schema
from roo_ray.source_config import EventLogsSource
from roo_ray.sources import open_source
from roo_ray.sources.base import ReadUnit
from roo_ray.sources.event_logs import EventLogs
from tests.sources.joined import assemble
from tests.sources.made_logs import (
    SCHEMA,
    TYPES,
    Row,
    at,
    click,
    dwell,
    impression,
    purchase,
    request,
    source_of,
    write_logs,
)

# ---- the reference -------------------------------------------------------------------------------


def join_by_hand(logs: dict[str, list[Row]], source: EventLogsSource) -> tuple[list[Row], Counter[str]]:
    """Request rows and counts, one Python row at a time; times in seconds after noon."""
    counts: Counter[str] = Counter()
    requests: dict[str, Row] = {}
    for row in logs["requests"]:
        counts["repeated_requests"] += row["rid"] in requests
        requests[row["rid"]] = row
    impressions: dict[tuple[str, str], Row] = {}
    for row in logs["impressions"]:
        if row["request_id"] in requests:
            impressions[row["request_id"], row["item_id"]] = dict(row)
        else:
            counts["impressions_without_request"] += 1
    for name, log in source.events.items():
        distinct: dict[tuple[Any, ...], None] = {}
        for row in logs[name]:
            values = {ours: row[log.columns.get(ours, ours)] for ours in ("request_id", "item_id")}
            moment = row["ms"] / 1000 - at(0).timestamp() if name == "dwell" else seconds(row["at"])
            distinct[(*values.values(), moment, row.get("seconds"))] = None
        counts[f"events.{name}"] = len(logs[name])
        counts[f"repeated_events.{name}"] = len(logs[name]) - len(distinct)
        found = []
        for rid, item, moment, value in distinct:
            if rid not in requests:
                counts[f"events_without_request.{name}"] += 1
            elif (rid, item) not in impressions:
                counts[f"events_without_impression.{name}"] += 1
            elif moment < seconds(impressions[rid, item]["shown_at"]):
                counts[f"events_before_impression.{name}"] += 1
            else:
                found.append((rid, item, moment - seconds(impressions[rid, item]["shown_at"]), value))
        for label, rule in source.labels.items():
            if rule.event != name:
                continue
            inside = [event for event in found if event[2] <= rule.window]
            counts[f"events_after_window.{label}"] += len(found) - len(inside)
            reached = [e for e in inside if rule.min_value is None or (e[3] is not None and e[3] >= rule.min_value)]
            if rule.min_value is not None:
                counts[f"events_below_min_value.{label}"] += len(inside) - len(reached)
            counts[f"attributed_events.{label}"] += len(reached)
            assert source.observed_until is not None
            for (rid, item), row in impressions.items():
                positive = any(event[:2] == (rid, item) for event in reached)
                is_open = not positive and seconds(row["shown_at"]) + rule.window > seconds(source.observed_until)
                counts[f"positives.{label}"] += positive
                counts[f"open_windows.{label}"] += is_open
                row[label] = None if is_open and source.open_windows == "null" else int(positive)
                if rule.value_column:
                    values = [e[3] for e in inside if e[:2] == (rid, item) and e[3] is not None]
                    row[rule.value_column] = max(values, default=None)
    rows = []
    for rid, row in sorted(requests.items()):
        shown = [item for (owner, _), item in impressions.items() if owner == rid]
        shown.sort(key=lambda item: (item["position"], item["item_id"]))
        counts["requests_without_impressions"] += not shown
        if shown:
            made = {"request_id": rid} | {name: row[name] for name in SCHEMA.request_columns if name != "request_id"}
            rows.append(made | {name: [item[name] for item in shown] for name in SCHEMA.impression_columns})
    return rows, counts


def seconds(time: Any) -> float:
    return float((time.replace(tzinfo=at(0).tzinfo) - at(0)).total_seconds())


@pytest.fixture(scope="module")
def plain_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that tell the source their types; the property's rows do not go through files."""
    folder = tmp_path_factory.mktemp("logs")
    write_logs(folder, **logs_of())
    return folder


OPENED: dict[str, EventLogs] = {}


def opened_once(config: EventLogsSource) -> EventLogs:
    """The source with the config's times, opened once for all examples."""
    if "source" not in OPENED:
        found = open_source(config, SCHEMA)
        assert isinstance(found, EventLogs)
        OPENED["source"] = found
    source, until = OPENED["source"], config.observed_until
    assert until is not None
    micros = dict.fromkeys(config.labels, round(until.timestamp() * 1e6))
    rules = replace(source.rules, observed_until=micros, open_is_null=config.open_windows == "null")
    return replace(source, rules=rules)


def table_of(name: str, rows: list[Row], source: EventLogs) -> pa.Table:
    """Rows as ``batches`` yields them."""
    log = source.columns[name]
    table = pa.Table.from_pylist(rows, TYPES[name])
    columns = [table.column(log.names[field.name]) for field in log.types]
    if name == "dwell":
        columns = [c.cast(pa.timestamp("ms")) if pa.types.is_int64(c.type) else c for c in columns]
    return pa.table(
        [column.cast(field.type) for column, field in zip(columns, log.types, strict=True)], schema=log.types
    )


NUMBER, ITEM, MOMENT = st.integers(0, 3), st.integers(0, 2), st.integers(0, 20)
LOGS = st.fixed_dictionaries(
    {
        "requests": st.lists(st.builds(lambda n: request(n, n), NUMBER), min_size=1, max_size=6),
        "impressions": st.lists(
            st.builds(impression, st.integers(0, 4), ITEM, st.integers(0, 1), MOMENT),
            min_size=1,
            max_size=10,
            unique_by=lambda row: (row["request_id"], row["item_id"]),
        ),
        "clicks": st.lists(st.builds(click, st.integers(0, 5), st.integers(0, 3), MOMENT), max_size=12),
        "dwell": st.lists(
            st.builds(dwell, NUMBER, ITEM, MOMENT, st.sampled_from([None, 0.0, 9.5, 10.0, 30.0])), max_size=12
        ),
        "purchases": st.lists(st.builds(purchase, NUMBER, ITEM, MOMENT), max_size=4),
    }
)
WINDOWS = {
    "clicked": {"event": "clicks", "window": "5s"},
    "stayed": {"event": "dwell", "window": "9s", "min_value": 10, "value_column": "dwell_seconds"},
    "bought": {"event": "purchases", "window": "15s"},
}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(logs=LOGS, until=MOMENT, open_windows=st.sampled_from(["null", "negative"]), seed=st.integers(0, 9))
def test_the_join_equals_brute_force_in_any_order(
    logs: dict[str, list[Row]], until: int, open_windows: str, seed: int, plain_logs: Path
) -> None:
    config = source_of(plain_logs, labels=WINDOWS, observed_until=at(until), open_windows=open_windows)
    source = opened_once(config)
    parts = {name: table_of(name, rows, source) for name, rows in logs.items()}
    result = assemble(source, parts=parts)
    rows, counts = join_by_hand(logs, config)
    assert result.rows.to_pylist() == rows
    assert +Counter(result.counts) == +counts
    for reason, table in result.aside.items():
        assert table.num_rows == counts[reason] > 0
    assert set(result.aside) == {
        name for name in +counts if "_without_" in name or "_before_" in name or "after" in name
    }

    shuffled = assemble(source, seed=seed, parts=parts)
    assert shuffled.rows.equals(result.rows)
    assert shuffled.counts == result.counts
    assert {n: t.to_pylist() for n, t in shuffled.aside.items()} == {n: t.to_pylist() for n, t in result.aside.items()}
    dealt = assemble(source, buckets=3, seed=seed, parts=parts)
    assert dealt.rows.sort_by("request_id").equals(result.rows)
    assert dealt.counts == result.counts

    for name, label in (("clicks", "clicked"), ("dwell", "stayed"), ("purchases", "bought")):
        by_name = ("repeated_events", "events_without_request", "events_without_impression", "events_before_impression")
        ways = [result.counts[f"{way}.{name}"] for way in by_name]
        ways += [result.counts.get(f"{way}.{label}", 0) for way in ("events_after_window", "events_below_min_value")]
        assert sum(ways) + result.counts[f"attributed_events.{label}"] == result.counts[f"events.{name}"]


# ---- examples ------------------------------------------------------------------------------------


def logs_of(**changes: list[Row]) -> dict[str, list[Row]]:
    """Two requests with two impressions each, and one event of each kind."""
    logs = {
        "requests": [request(1, 0), request(2, 100)],
        "impressions": [impression(n, item, 2 - item, 100 * n + item) for n in (1, 2) for item in (1, 2)],
        "clicks": [click(1, 1, 110)],
        "dwell": [dwell(1, 1, 111, 30.0)],
        "purchases": [purchase(2, 2, 500)],
    }
    return logs | changes


def opened(folder: Path, logs: dict[str, list[Row]], **changes: Any) -> EventLogs:
    write_logs(folder, **logs)
    source = open_source(source_of(folder, **changes), SCHEMA)
    assert isinstance(source, EventLogs)
    return source


def test_windows_are_closed_at_both_ends_to_the_microsecond(tmp_path: Path) -> None:
    shown = [impression(1, item, item, 0.000001) for item in range(5)]
    events = [click(1, 0, 0), click(1, 1, 0.000001), click(1, 2, 1800.000001), click(1, 3, 1800.000002)]
    result = assemble(opened(tmp_path, logs_of(impressions=shown, clicks=events), observed_until=at(1800)))
    # observed until just before the window's end: what is not clicked is not known
    assert result.rows.column("clicked").to_pylist() == [[None, 1, 1, None, None]]
    assert result.counts["events_before_impression.clicks"] == result.counts["events_after_window.clicked"] == 1
    later = opened(tmp_path, logs_of(impressions=shown, clicks=events), observed_until=at(1800.000001))
    assert assemble(later).rows.column("clicked").to_pylist() == [[0, 1, 1, 0, 0]]


def test_times_default_to_the_request_and_the_latest_event(tmp_path: Path) -> None:
    """Without a time of their own, impressions have their request's; without ``observed_until``, each event log is
    complete up to its latest event, of whatever type its times are."""
    logs = logs_of(clicks=[click(1, 1, 1), click(2, 1, 1850)], dwell=[dwell(1, 1, 3700, 30.0)])
    impressions = {"path": str(tmp_path / "impressions")}
    result = assemble(opened(tmp_path, logs, observed_until=None, impressions=impressions))
    # request 1 at 0 s, request 2 at 100 s; clicks are known up to 1850 s and dwell up to 3700 s
    assert result.rows.column("clicked").to_pylist() == [[0, 1], [None, 1]]
    assert result.rows.column("stayed").to_pylist() == [[0, 0], [0, 0]]
    assert result.counts["events_after_window.stayed"] == 1
    assert result.counts["open_windows.bought"] == 3
    until = opened(tmp_path, logs, observed_until=None, impressions=impressions).counts()
    assert until["observed_until_seconds.clicked"] == at(1850).timestamp()
    assert until["observed_until_seconds.stayed"] == at(3700).timestamp()
    negative = opened(tmp_path, logs, observed_until=None, impressions=impressions, open_windows="negative")
    assert assemble(negative).rows.column("clicked").to_pylist() == [[0, 1], [0, 1]]
    (tmp_path / "empty").mkdir()
    pq.write_table(pq.read_table(tmp_path / "clicks").slice(0, 0), tmp_path / "empty" / "a.parquet")
    events = source_of(tmp_path).model_dump()["events"]
    events["clicks"]["path"] = str(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"event log 'clicks' .* has no rows.* set source\.observed_until"):
        opened(tmp_path, logs, observed_until=None, events=events)
    assert assemble(opened(tmp_path, logs, events=events)).counts["events.clicks"] == 0


def test_units_of_all_logs_in_many_files(tmp_path: Path) -> None:
    shown = [impression(n, item, item, n) for n in range(200) for item in range(3)]
    logs = logs_of(requests=[request(n, n) for n in range(200)], impressions=shown)
    write_logs(tmp_path, files=3, **logs)
    source = pickle.loads(pickle.dumps(open_source(source_of(tmp_path), SCHEMA)))
    assert {unit.log for unit in source.units()} == set(source.logs)
    assert len({unit.path for unit in source.units() if unit.log == "impressions"}) == 3
    result = assemble(source, buckets=4)
    assert result.rows.num_rows == 200
    assert source.disk_bytes() is None
    assert source.codec == "snappy"


def test_requests_and_impressions_logged_twice(tmp_path: Path) -> None:
    same = opened(tmp_path, logs_of(requests=[request(1, 0), request(2, 100), request(1, 0)]))
    assert assemble(same).counts["repeated_requests"] == 1
    other = opened(tmp_path, logs_of(requests=[request(1, 0), request(2, 100), request(1, 0, age=9.0)]))
    with pytest.raises(DataError, match=r"two rows for request_id=r1 that differ in column 'age' \(21\.0 and 9\.0\)"):
        assemble(other)
    longer = request(2, 100, history_item=["a"], history_time=[at(1)])
    with pytest.raises(DataError, match=r"request_id=r2 that differ in column 'history_item'"):
        assemble(opened(tmp_path, logs_of(requests=[request(1, 0), request(2, 100), longer])))
    twice = logs_of(impressions=[*logs_of()["impressions"], impression(2, 1, 5, 300)])
    with pytest.raises(DataError, match=r"1 rows of the impression log repeat .*request_id=r2, item_id=i1\); remove"):
        assemble(opened(tmp_path, twice))


def bad_unit(source: EventLogs, log: str) -> ReadUnit:
    return next(unit for unit in source.units() if unit.log == log)


def test_null_keys_and_times_name_the_file(tmp_path: Path) -> None:
    lost = opened(tmp_path, logs_of(clicks=[click(1, 1, 5) | {"request_id": None}]))
    with pytest.raises(
        DataError, match=r"clicks/part-0\.parquet: column 'request_id' of the log 'clicks' is null in 1"
    ):
        list(lost.batches(bad_unit(lost, "clicks")))
    timeless = opened(tmp_path, logs_of(impressions=[impression(1, 1, 1, 1, shown_at=None)]))
    with pytest.raises(DataError, match=r"impressions/part-0\.parquet: column 'shown_at' of the log 'impressions'"):
        list(timeless.batches(bad_unit(timeless, "impressions")))


def test_logs_that_do_not_fit_each_other(tmp_path: Path) -> None:
    write_logs(tmp_path, **logs_of())
    path = tmp_path / "clicks" / "part-0.parquet"
    clicks = pq.read_table(path)

    def refuse(table: pa.Table, message: str) -> None:
        pq.write_table(table, path)
        with pytest.raises(DataError, match=message):
            open_source(source_of(tmp_path), SCHEMA)

    numbers = clicks.set_column(0, "request_id", pa.array([1]))
    refuse(numbers, r"key column 'request_id' has type string in the log 'requests' and int64 in the log 'clicks'")
    refuse(clicks.drop_columns("item_id"), r"part-0\.parquet: column 'item_id' of the schema is missing")
    refuse(clicks.set_column(2, "at", pa.array(["now"])), r"'at' of the log 'clicks' has type string, which is no time")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"part-0\.parquet is not a complete Parquet file"):
        open_source(source_of(tmp_path), SCHEMA)
    path.unlink()
    with pytest.raises(DataError, match=r"clicks holds no Parquet files"):
        open_source(source_of(tmp_path), SCHEMA)
    write_logs(tmp_path, **logs_of(impressions=[]))
    with pytest.raises(DataError, match=r"the log 'impressions' has no rows"):
        open_source(source_of(tmp_path), SCHEMA)


def test_configs_that_contradict_themselves_or_the_schema(tmp_path: Path) -> None:
    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            open_source(source_of(tmp_path, **changes), SCHEMA)

    write_logs(tmp_path, **logs_of())
    labels = source_of(tmp_path).model_dump()["labels"]
    refuse(r"'30 minutes' is no duration", labels={"clicked": {"event": "clicks", "window": "30 minutes"}})
    refuse(r"names event log 'click'", labels=labels | {"clicked": {"event": "click", "window": "1m"}})
    refuse(r"names no value column", labels=labels | {"clicked": {"event": "clicks", "window": "1m", "min_value": 1}})
    refuse(r"event log 'clicks' is read by no label", labels={"stayed": labels["stayed"], "bought": labels["bought"]})
    refuse(r"'liked' is no label column of schema 'shop'", labels=labels | {"liked": labels["clicked"]})
    refuse(
        r"value_column 'price_paid' must stand in carry",
        labels=labels | {"stayed": labels["stayed"] | {"value_column": "price_paid"}},
    )
    mapped = {"path": str(tmp_path / "impressions"), "time": "shown_at", "columns": {"age": "x"}}
    refuse(r"source\.impressions\.columns: 'age' is not read from this log", impressions=mapped)
    keyless = parse_schema(SCHEMA.to_yaml().replace("  impression:\n  - item_id\n", ""))
    with pytest.raises(ConfigError, match=r"name it in keys\.impression"):
        open_source(source_of(tmp_path), keyless)


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    logs = {
        "requests": [request(1, 0)],
        "impressions": [impression(1, 1, 0, 1), impression(1, 2, 1, 1), impression(1, 3, 2, 2400)],
        "clicks": [click(1, 1, 20), click(1, 1, 20), click(1, 2, 1860), click(1, 9, 300)],
    }
    result = assemble(opened(tmp_path, logs, observed_until=at(3600)))
    assert result.rows.column("item_id").to_pylist() == [["i1", "i2", "i3"]]
    assert result.rows.column("clicked").to_pylist() == [[1, 0, None]]
    names = ("repeated_events.clicks", "events_after_window.clicked", "open_windows.clicked")
    assert [result.counts[name] for name in (*names, "events_without_impression.clicks")] == [1, 1, 1, 1]
