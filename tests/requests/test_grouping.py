"""The grouping kernel against plain Python, its inverse, its independence of row order, and what it refuses."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.errors import DataError
from roo_ray.requests.grouping import explode_requests, group_impressions
from tests.requests.reference import group_by_loop, impression_rows, schema, to_table


def by_key(table: pa.Table) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(row[name] for name in schema().keys.request): row for row in table.to_pylist()}


def as_values(rows: dict[tuple[Any, ...], dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Reference rows with the same Python types as Arrow gives back (timestamps)."""
    return by_key(pa.Table.from_pylist(list(rows.values()), schema=group_impressions(EMPTY, schema())[0].schema))


EMPTY = to_table([])


@settings(max_examples=80, deadline=None)
@given(rows=impression_rows())
def test_equals_a_plain_loop(rows: list[dict[str, Any]]) -> None:
    grouped, repaired = group_impressions(to_table(rows), schema())
    assert repaired == {}
    assert by_key(grouped) == as_values(group_by_loop(rows, schema()))


@settings(max_examples=50, deadline=None)
@given(rows=impression_rows(), data=st.data())
def test_row_order_does_not_matter(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    assert group_impressions(to_table(rows), schema())[0].equals(group_impressions(to_table(shuffled), schema())[0])


@settings(max_examples=50, deadline=None)
@given(rows=impression_rows())
def test_explode_gives_the_log_back(rows: list[dict[str, Any]]) -> None:
    table = to_table(rows).select(schema().columns)
    back = explode_requests(group_impressions(table, schema())[0], schema())
    assert back.schema.equals(table.schema)
    assert sorted(map(repr, back.to_pylist())) == sorted(map(repr, table.to_pylist()))


def test_no_position_and_no_impression_key_is_still_deterministic() -> None:
    plain = schema().model_copy(update={"keys": schema().keys.model_copy(update={"position": None, "impression": []})})
    rows = [base_row(item=i % 3, clicked=i % 2) for i in range(6)]
    one, other = (group_impressions(to_table(r), plain)[0] for r in (rows, rows[::-1]))
    assert one.equals(other)


def base_row(**values: Any) -> dict[str, Any]:
    row = {"session": "a", "number": 1, "user": 1, "time": 1_700_000_000_000_000, "age": 3.0, "note": "n"}
    row |= {"history_item": [1, 2], "dwell": [0.5, 1.0], "history_time": [1, 2], "item": 1, "position": 0}
    return row | {"price": 1.0, "clicked": 0, "tags": None} | values


@pytest.mark.parametrize(
    ("column", "value"),
    [("age", 4.0), ("age", None), ("note", "other"), ("user", 2), ("history_item", [1, 3]), ("history_item", [1])],
)
def test_varying_request_column_is_refused_or_repaired(column: str, value: Any) -> None:
    rows = [base_row(), base_row(item=2, position=1, **{column: value})]
    with pytest.raises(DataError, match=rf"column '{column}' is request-level and varies within 1 requests") as error:
        group_impressions(to_table(rows), schema())
    assert "session=a, number=1" in str(error.value)
    for policy, expected in (("first", rows[0][column]), ("last", value)):
        grouped, counts = group_impressions(to_table(rows[::-1]), schema(), policy)  # type: ignore[arg-type]
        assert grouped.column(column).to_pylist() == [expected]
        assert counts == {f"request_conflicts.{column}": 1}


def test_duplicate_impressions_are_refused() -> None:
    rows = [base_row(), base_row(item=2, position=1), base_row(position=2), base_row(session="b")]
    with pytest.raises(DataError, match=r"1 duplicate impressions: request session=a, number=1 has item=1"):
        group_impressions(to_table(rows), schema())


def test_one_huge_request_and_many_small_ones() -> None:
    rows = [base_row(item=i % 50, position=i) for i in range(5_000)]
    rows += [base_row(session="b", number=i) for i in range(50)]
    keys = schema().keys.model_copy(update={"impression": []})
    grouped, _ = group_impressions(to_table(rows), schema().model_copy(update={"keys": keys}))
    assert sorted(grouped.column("num_impressions").to_pylist())[-2:] == [1, 5_000]
    assert grouped.num_rows == 51
