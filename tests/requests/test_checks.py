"""Every check fails with its message, naming column, request and value; what is legal is counted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from roo_ray.errors import DataError
from roo_ray.requests.checks import check_types
from roo_ray.requests.examine import check_requests
from roo_ray.requests.grouping import group_impressions
from roo_ray.schema import Schema
from tests.requests.tables import START, TYPES, Row, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()


def rows(**changes: Any) -> list[Row]:
    """Requests r6, r7, r8 with three impressions each; ``changes`` go into all rows of r7."""
    made = [impression_row(request_row(number), item) for number in (6, 7, 8) for item in range(3)]
    return [row | changes if row["rid"] == "r7" else row for row in made]


def check(impressions: list[Row], schema: Schema = SCHEMA) -> dict[str, int]:
    return check_requests(group_impressions(table_of(impressions), schema), schema)


def test_a_clean_table_and_its_counts() -> None:
    made = rows()
    made[0]["click"] = made[4]["click"] = None
    assert check(made) == {
        "null_labels": 2,
        "empty_histories": 1,  # r8 has 8 % 4 = 0 events
        "null_history_values": 0,
        "null_history_values.h_dwell": 0,
        "leaking_history_events": 0,
    }
    assert check(rows(h_dwell=[None, float("nan"), 1.0]))["null_history_values"] == 2
    assert check(rows(user=None))["null_users"] == 1
    assert check(rows(h_item=None, h_dwell=None, h_time=None))["empty_histories"] == 2


def test_counts_by_name_where_there_are_several() -> None:
    schema = small_schema(
        lambda text: text.replace(
            "[{name: click, column: click}]", "[{name: a, column: click}, {name: b, column: slot}]"
        ).replace("carry: {request: [note], impression: [slot]}", "carry: {request: [note]}")
    )
    made = rows()
    made[0]["click"] = None
    counts = check(made, schema)
    assert (counts["null_labels"], counts["null_labels.click"], counts["null_labels.slot"]) == (10, 1, 9)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"h_item": [1, 2]}, r"columns of sequence 'history' have unequal lengths in 1 requests "
                         r"\(first: 'h_item' has 2 and 'h_dwell' 3 in request rid=r7, shard=1\)"),
    ({"h_item": [1, 50, 2]}, r"column 'h_item': 1 values are outside table 'item', whose ids are 0 .. 49 "
                             r"\(first: 50 in request rid=r7, shard=1\); raise the table's rows"),
    ({"h_item": [1, None, 2]}, r"column 'h_item': 1 values are null .*rid=r7"),
    ({"h_dwell": [1.0, float("inf"), 2.0]}, r"column 'h_dwell': 1 values are infinite as float32 .*rid=r7"),
    ({"h_time": [START, None, START]}, r"column 'h_time': 1 values are null .*rid=r7.*needs its time"),
    ({"item": -1, "position": 9}, r"'item': 1 values are outside table 'item'.*first: -1 in request rid=r7"),
    ({"item": None}, r"column 'item': 1 values are null \(first: None in request rid=r7.*fill_id"),
    ({"words": ["x", None]}, r"column 'words': 1 values are null .*rid=r7"),
    ({"price": float("inf")}, r"column 'price': 1 values are infinite"),
    ({"click": 2}, r"column 'click': 1 values are neither 0 nor 1 \(first: 2 in request rid=r7, shard=1\)"),
    ({"time": None}, r"column 'time': 1 values are null \(first: None in request rid=r7, shard=1\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    request_level = set(SCHEMA.request_columns) & set(changes)
    made = rows(**changes) if request_level else rows()
    if not request_level:
        made[4] |= changes
    with pytest.raises(DataError, match=message):
        check(made)


def test_dense_nulls_need_a_fill() -> None:
    schema = small_schema(lambda text: text.replace("[price], fill: 0", "[price]").replace("[age], fill: 0", "[age]"))
    made = rows()
    made[4]["price"] = float("nan")
    with pytest.raises(
        DataError, match=r"'price': 1 values are null or NaN \(first: nan in request rid=r7.*'price' a fill"
    ):
        check(made, schema)
    with pytest.raises(DataError, match=r"'age': 1 values are null or NaN \(first: None in request rid=r7"):
        check(rows(age=None), schema)
    check(made)


def test_nan_labels() -> None:
    types = TYPES.set(TYPES.get_field_index("click"), pa.field("click", pa.float32()))
    made = rows()
    made[4]["click"] = float("nan")
    with pytest.raises(DataError, match=r"'click': 1 values are NaN \(first: nan in request rid=r7"):
        check_requests(group_impressions(pa.Table.from_pylist(made, types), SCHEMA), SCHEMA)


def test_repeated_impressions() -> None:
    made = rows()
    made[4]["item"] = 0  # position stays its own
    with pytest.raises(DataError, match=r"1 impressions repeat the key.*\(first: item=0 in request rid=r7, shard=1\)"):
        check(made)
    other_request = rows()
    assert check(other_request)  # the same items in other requests are fine


def request_rows() -> pa.Table:
    return group_impressions(table_of(rows()), SCHEMA)


def with_column(table: pa.Table, name: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(
        index,
        table.schema.field(name),
        pa.array(change(table.column(name).to_pylist()), table.schema.field(name).type),
    )


def test_rows_that_are_requests_already() -> None:
    table = request_rows()
    with pytest.raises(DataError, match=r"1 requests repeat the key of another request \(first: request rid=r8"):
        check_requests(
            with_column(with_column(table, "rid", lambda v: ["r8", *v[1:]]), "shard", lambda v: [2, *v[1:]]),
            SCHEMA,
        )
    short = with_column(table, "price", lambda v: [v[0], v[1][:2], v[2]])
    with pytest.raises(
        DataError,
        match=r"impression-level columns have unequal lengths in 1 requests.*'price' 2 in request rid=r7",
    ):
        check_requests(short, SCHEMA)
    with pytest.raises(DataError, match=r"column 'price': the list of impressions is null in request rid=r7"):
        check_requests(with_column(table, "price", lambda v: [v[0], None, v[2]]), SCHEMA)
    with pytest.raises(DataError, match=r"'num_impressions' is 4 and the lists have 3 values in request rid=r8"):
        check_requests(with_column(table, "num_impressions", lambda v: [3, 3, 4]), SCHEMA)
    empty = table
    for name in [*SCHEMA.impression_columns, "num_impressions"]:
        empty = with_column(empty, name, lambda v: [v[0], [] if isinstance(v[1], list) else 0, v[2]])
    with pytest.raises(DataError, match=r"1 requests have no impressions \(first: request rid=r7, shard=1\)"):
        check_requests(empty, SCHEMA)
    with pytest.raises(DataError, match="column 'shard' of the request key is null in 1 rows"):
        check_requests(with_column(table, "shard", lambda v: [None, *v[1:]]), SCHEMA)


def test_the_first_offender_is_found_through_nested_lists() -> None:
    """The row of a value two lists deep, against Python, in a table whose arrays are slices."""
    schema = small_schema(lambda text: text.replace("word: {rows: 50, dim: 4, hash: true}", "word: {rows: 50, dim: 4}"))
    types = TYPES.set(TYPES.get_field_index("words"), pa.field("words", pa.list_(pa.int64())))
    types = types.set(types.get_field_index("tags"), pa.field("tags", pa.list_(pa.int64())))
    rng = np.random.default_rng(1)
    made = [
        impression_row(request_row(n, tags=[]), item, words=rng.integers(0, 50, rng.integers(0, 3)).tolist())
        for n in range(6, 20)
        for item in range(int(rng.integers(1, 4)))
    ]
    for target in (3, 11, len(made) - 1):
        wrong = [dict(row) for row in made]
        wrong[target]["words"] = [1, 77, *wrong[target]["words"]]
        requests = group_impressions(pa.Table.from_pylist(wrong, types), schema)
        with pytest.raises(DataError, match=rf"first: 77 in request rid={wrong[target]['rid']},"):
            check_requests(requests, schema)
        after = next(i for i, key in enumerate(requests.column("rid").to_pylist()) if key == wrong[target]["rid"])
        check_requests(requests.slice(after + 1), schema)


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("rid", pa.float64(), r"column 'rid' has type double, but the request key needs integers, strings"),
        ("time", pa.string(), r"column 'time' has type string, but the request time needs timestamps"),
        ("age", pa.string(), r"column 'age' has type string, but feature 'profile' \(dense\) needs numbers"),
        ("item", pa.string(), r"column 'item' has type string, but feature 'item' \(ids\) needs integers"),
        ("tags", pa.list_(pa.float32()), r"column 'tags' .* needs a list of integers, strings or timestamps"),
        ("h_item", pa.int32(), r"column 'h_item' has type int32, but feature 'history' .* needs a list"),
        ("h_time", pa.list_(pa.string()), r"column 'h_time' .* needs a list of timestamps"),
        ("click", pa.string(), r"column 'click' has type string, but label 'click' needs 0, 1 or null"),
        ("position", pa.list_(pa.int8()), r"column 'position' .* needs scalar values"),
    ],
)  # fmt: skip
def test_types_are_checked_before_any_row(column: str, kind: pa.DataType, message: str) -> None:
    check_types(TYPES, SCHEMA, "impressions")
    types = TYPES.set(TYPES.get_field_index(column), pa.field(column, kind))
    with pytest.raises(DataError, match=message):
        check_types(types, SCHEMA, "impressions")


def test_types_of_request_rows() -> None:
    check_types(request_rows().schema, SCHEMA, "requests")
    with pytest.raises(DataError, match=r"column 'item' has type int32; in rows that are requests.*is a list"):
        check_types(TYPES, SCHEMA, "requests")
    clash = small_schema(lambda text: text.replace("impression: [slot]", "impression: [num_impressions]"))
    with pytest.raises(DataError, match="the schema names a column 'num_impressions'"):
        check_types(TYPES.append(pa.field("num_impressions", pa.int32())), clash, "impressions")
