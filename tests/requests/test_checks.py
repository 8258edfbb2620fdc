"""What the checks refuse, with a message that names column, request and what to do; and what they count."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from roo_ray.errors import DataError
from roo_ray.requests.checks import check_requests
from roo_ray.requests.grouping import group_impressions
from tests.requests.reference import schema, to_table
from tests.requests.test_grouping import base_row


def requests(**changes: Any) -> pa.Table:
    """Two request rows; ``changes`` replaces a column's values."""
    rows = [base_row(), base_row(item=2, position=1, clicked=None), base_row(session="b", history_item=[], dwell=[])]
    rows[2]["history_time"] = []
    table = group_impressions(to_table(rows), schema())[0].sort_by("session")
    for name, value in changes.items():
        array = pa.array(value, pa.list_(pa.float64()) if name == "clicked" else table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), name, array)
    return table


def test_good_requests_are_counted() -> None:
    counts = check_requests(requests(), schema())
    assert counts == {"null_labels": 1, "empty_histories": 1, "history_events": 2, "leaking_history_events": 0}


def test_events_at_or_after_the_request_are_counted() -> None:
    late = [[1_700_000_000_000_000, 1_700_000_000_000_001], []]
    assert check_requests(requests(history_time=late), schema())["leaking_history_events"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clicked": [[0.0, math.nan], [1.0]]}, r"column 'clicked', request session=a, number=1: a label is NaN"),
        ({"clicked": [[0.0, 1.0], [2.0]]}, r"column 'clicked', request session=b, number=1: a label is 2; labels"),
        ({"clicked": [[0.0, 1.0], []]}, r"column 'clicked', request session=b.*another length than the request"),
        ({"item": [[1, 50], [1]]}, r"column 'item', request session=a.*id 50 is outside table 'item' of 50 rows"),
        ({"item": [[1, 2], [-1]]}, r"column 'item', request session=b.*id -1 is outside table 'item'"),
        ({"item": [[1, None], [1]]}, r"column 'item', request session=a.*no fill_id; set fill_id"),
        ({"history_item": [[1, 77], []]}, r"column 'history_item', request session=a.*id 77 is outside"),
        ({"dwell": [[1.0], []]}, r"column 'dwell', request session=a.*another length than 'history_item'"),
        ({"num_impressions": [2, 0], "clicked": [[0, 0], []]}, r"request session=b.*no impressions"),
        ({"user": [None, 1]}, r"column 'user', request session=a.*a key is null"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_requests(requests(**changes), schema())


def test_dense_without_fill_refuses_nulls() -> None:
    features = [f.model_copy(update={"fill": None}) if f.name == "price" else f for f in schema().features]
    strict = schema().model_copy(update={"features": features})
    with pytest.raises(DataError, match=r"column 'price', request session=a.*feature 'price' has no fill"):
        check_requests(requests(price=[[1.0, None], [1.0]]), strict)


def test_string_ids_need_a_hashed_table() -> None:
    table = requests()
    words = pa.array([["x", "y"], ["z"]])
    table = table.set_column(table.schema.get_field_index("item"), "item", words)
    with pytest.raises(DataError, match=r"column 'item' has ids of type string, and table 'item' is not hashed"):
        check_requests(table, schema())
