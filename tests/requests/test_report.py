"""Repairs and rules of the checks, findings that add up, and the report that they make."""

import datetime
import json
import pickle
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.config import Build
from roo_ray.errors import DataError
from roo_ray.requests.examine import check_requests, examine
from roo_ray.requests.grouping import group_impressions
from roo_ray.requests.report import (
    CheckFailed,
    Finding,
    counts_of,
    merge_findings,
    report_json,
    report_table,
    require_passed,
    stops_writing,
)
from tests.requests.tables import Row, canonical, impression_logs, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()


def rows(**changes: Any) -> list[Row]:
    """Requests r6, r7, r8 with three impressions each; ``changes`` go into all rows of r7."""
    made = [impression_row(request_row(number), item) for number in (6, 7, 8) for item in range(3)]
    return [row | changes if row["rid"] == "r7" else row for row in made]


def look(impressions: list[Row], **build: Any) -> tuple[pa.Table, dict[str, Finding]]:
    requests, findings = examine(table_of(impressions), SCHEMA, "impressions", Build(**build))
    return requests, {finding.check: finding for finding in findings if finding.found}


# ---- leaking histories ---------------------------------------------------------------------------


def leaking() -> list[Row]:
    time = request_row(7)["time"]
    before = time - datetime.timedelta(seconds=1)
    return rows(h_time=[time, before, time.replace(year=2024)], h_item=[1, 2, 3], h_dwell=[0.1, None, 0.3])


def test_events_at_or_after_the_request_fail_by_default() -> None:
    requests = group_impressions(table_of(leaking()), SCHEMA)
    message = (
        r"column 'h_time': 2 values of sequence 'history' are at or after their request's time \(first: 2023-02-28 "
        r"23:00:00 in request rid=r7, shard=1\).*build.on_leaking_history to drop or count"
    )
    with pytest.raises(CheckFailed, match=message):
        check_requests(requests, SCHEMA)
    counted = check_requests(requests, SCHEMA, Build(on_leaking_history="count"))
    assert counted["leaking_history_events"] == 2


def test_leaking_events_are_dropped_from_all_columns_of_the_sequence() -> None:
    requests, found = look(leaking(), on_leaking_history="drop")
    row = requests.to_pylist()[1]
    assert (row["h_item"], row["h_dwell"], len(row["h_time"])) == ([2], [None], 1)
    assert requests.column("h_item").to_pylist()[0] == request_row(6)["h_item"]
    finding = found["history at or after request"]
    assert (finding.found, finding.looked_at, finding.status) == (2, 5, "repaired")
    counts = counts_of(found.values())
    assert (counts["leaking_history_events"], counts["dropped_history_events"]) == (2, 2)


@settings(max_examples=15, deadline=None)
@given(impression_logs(), st.integers(0, 30))
def test_dropping_leaks_is_cutting_the_history_first(log: list[Row], hours: int) -> None:
    """Against Python: rows whose histories were cut at the request's time by hand."""
    late = [row | {"time": row["time"] - datetime.timedelta(hours=hours, days=1)} for row in log]
    by_hand = []
    for row in late:
        keep = [at < row["time"] for at in row["h_time"] or []]
        cut = {
            name: row[name] and [value for value, kept in zip(row[name], keep, strict=True) if kept]
            for name in ("h_item", "h_dwell", "h_time")
        }
        by_hand.append(row | cut)
    dropped, findings = examine(table_of(late), SCHEMA, "impressions", Build(on_leaking_history="drop"))
    assert canonical(dropped) == canonical(group_impressions(table_of(by_hand), SCHEMA))
    lost = {row["rid"] + str(row["shard"]): len(row["h_time"] or []) for row in late}
    left = {row["rid"] + str(row["shard"]): len(row["h_time"] or []) for row in by_hand}
    assert counts_of(findings).get("dropped_history_events", 0) == sum(lost.values()) - sum(left.values())


# ---- duplicates, empty histories -----------------------------------------------------------------


def test_duplicate_impressions_are_dropped_and_counted() -> None:
    doubled = rows()
    doubled += [dict(doubled[4]), doubled[4] | {"position": 7, "click": 1}]  # item 1 of r7 three times
    with pytest.raises(DataError, match=r"2 impressions repeat the key.*on_duplicate_impression: drop"):
        require_passed(list(look(doubled)[1].values()))
    requests, found = look(doubled, on_duplicate_impression="drop")
    assert canonical(requests) == canonical(group_impressions(table_of(rows()), SCHEMA))
    assert counts_of(found.values())["dropped_impressions"] == 2
    assert found["duplicate impression"].status == "repaired"
    assert found["duplicate impression"].looked_at == 11


EMPTY = {"h_item": [], "h_dwell": [], "h_time": []}


def test_all_histories_empty_fail_and_a_share_is_settable() -> None:
    made = [row | EMPTY for row in rows()]
    _, found = look(made)
    assert not stops_writing(found.values())  # a share is judged on the whole data set
    message = r"sequence 'history': 3 of 3 histories are empty.*max_empty_history_share 0.99.*user ids"
    with pytest.raises(CheckFailed, match=message):
        require_passed(merge_findings([list(found.values())]))
    _, found = look(made, max_empty_history_share=1)
    require_passed(list(found.values()))
    full = examine(table_of(rows()), SCHEMA, "impressions", Build())[1]  # r8 is empty
    require_passed(merge_findings([list(look(made)[1].values()), full]))  # 4 of 6
    strict = [look(rows(), max_empty_history_share=0.3)[1]["empty history"]]
    with pytest.raises(CheckFailed, match="1 of 3 histories"):
        require_passed(strict)


# ---- findings and the report ---------------------------------------------------------------------


def test_everything_that_is_wrong_is_in_one_report() -> None:
    made = rows(age=None, h_item=[1, 50, 2])
    made[0]["click"] = 2
    made[4]["item"] = -1
    made[1]["note"] = "other"
    made[2]["click"] = None
    _, findings = examine(table_of(made), SCHEMA, "impressions", Build())
    with pytest.raises(CheckFailed) as caught:
        require_passed(findings)
    assert str(caught.value).startswith("column 'note' varies within 1 requests")
    assert len(str(caught.value).splitlines()) == 1
    assert "also failed: label not 0 or 1 (click), id outside its table (h_item: item)" in str(caught.value)
    report = json.loads(json.dumps(report_json(caught.value.findings)))
    assert report["status"] == "failed"
    by_name = {f"{c['check']} ({c['subject']})": c for c in report["checks"]}
    assert len(by_name) == len(report["checks"])
    label = by_name["label not 0 or 1 (click)"]
    assert (label["found"], label["looked_at"], label["of"], label["rule"]) == (1, 9, "values", "fail")
    assert label["first"] == "2 in request rid=r6, shard=0"
    assert by_name["null label (click)"]["status"] == "counted"
    assert by_name["null or NaN value (age)"]["rule"] == "fill"
    header, lines, note = report_table(report)
    assert {len(line) for line in lines} == {len(header)}
    assert sum(line[5] == "FAILED" for line in lines) == 4
    assert note == f"{len(report['checks'])} checks: failed"


def test_a_clean_report() -> None:
    made = [row | {"age": 1.0} for row in rows() if row["rid"] != "r8"]
    report = report_json(examine(table_of(made), SCHEMA, "impressions", Build())[1])
    assert report["status"] == "passed"
    assert {check["status"] for check in report["checks"]} == {"passed"}
    _, lines, _ = report_table(report)
    assert len(lines) == len({check["check"] for check in report["checks"]})


def test_rows_too_broken_for_more_checks_still_give_a_report() -> None:
    requests = group_impressions(table_of(rows()), SCHEMA).drop_columns("num_impressions")
    price = requests.column("price").to_pylist()
    price[1] = price[1][:2]
    at = requests.column_names.index("price")
    broken = requests.set_column(at, "price", pa.array(price, pa.list_(pa.float64())))
    _, findings = examine(broken, SCHEMA, "requests", Build())
    assert [finding.check for finding in findings if finding.found] == ["unequal list lengths"]
    assert stops_writing(findings)


def test_findings_of_parts_are_those_of_the_whole() -> None:
    made = rows(age=None)
    made[0]["click"] = made[4]["click"] = None
    made[8]["click"] = 2
    parts = [[row for row in made if row["rid"] == rid] for rid in ("r6", "r7", "r8")]
    merged = merge_findings(examine(table_of(part), SCHEMA, "impressions", Build())[1] for part in parts)
    assert merged == examine(table_of(made), SCHEMA, "impressions", Build())[1]


def test_a_refusal_travels_between_processes() -> None:
    refused = CheckFailed("no", [Finding("check", "column", 3, "rows", 1, "fail", "x", "{found} wrong")])
    again = pickle.loads(pickle.dumps(refused))
    assert (str(again), again.findings) == ("no", refused.findings)
    assert refused.findings[0].message == "1 wrong"
