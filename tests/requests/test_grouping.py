"""Grouping against a brute-force reference; exploding is its inverse; conflicts are found and named."""

import datetime
import random
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.errors import DataError
from roo_ray.requests.copies import Dealt, SharedCopies
from roo_ray.requests.grouping import (
    explode_in_slices,
    explode_requests,
    group_impressions,
    group_parts,
    group_with_findings,
    request_row_schema,
)
from roo_ray.requests.report import counts_of
from roo_ray.schema import Schema, parse_schema
from roo_ray.sources import compare
from roo_ray.sources.compare import differing_rows, digest_rows, sort_codes
from roo_ray.sources.hashing import hash_rows
from tests.requests.tables import (
    TYPES,
    canonical,
    group_by_hand,
    impression_logs,
    impression_row,
    request_row,
    small_schema,
    table_of,
)

SCHEMA = small_schema()


@settings(max_examples=80, deadline=None)
@given(impression_logs())
def test_grouping_equals_the_reference_and_explode_is_its_inverse(rows: list[dict[str, object]]) -> None:
    table = table_of(rows)
    requests = group_impressions(table, SCHEMA)
    assert requests.schema == request_row_schema(TYPES, SCHEMA)
    expected = pa.Table.from_pylist(group_by_hand(rows, SCHEMA), requests.schema)
    assert [repr(row) for row in requests.to_pylist()] == [repr(row) for row in expected.to_pylist()]
    exploded = explode_requests(requests, SCHEMA)
    assert exploded.schema == table.select(SCHEMA.columns).schema
    assert canonical(exploded) == canonical(table.select(SCHEMA.columns))
    for impressions, values in ((1, 100), (7, 1), (99, 99)):
        parts = list(explode_in_slices(requests, SCHEMA, impressions, values))
        assert all(part.num_rows for part in parts)
        assert canonical(pa.concat_tables([exploded.slice(0, 0), *parts])) == canonical(exploded)


@settings(max_examples=40, deadline=None)
@given(impression_logs(), st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(rows: list[dict[str, object]], rng: random.Random) -> None:
    """Not even where position and impression key are tied, or the schema has neither."""
    loose = small_schema(lambda text: text.replace(", impression: item, position: position", ""))
    shuffled = rng.sample(rows, len(rows))
    for schema in (SCHEMA, loose):
        tables = [
            group_impressions(table_of(r).select(TYPES.names), schema) for r in (rows + rows[:3], rows[:3] + shuffled)
        ]
        assert tables[0].equals(tables[1]) or str(tables[0].to_pylist()) == str(tables[1].to_pylist())


def test_chunked_input_of_many_requests() -> None:
    """3,000 requests, unsorted, in chunks that cut requests apart."""
    rng = np.random.default_rng(0)
    count = rng.integers(1, 6, 3000)  # impressions of request 0, 1, ...
    rid = np.repeat(np.arange(3000), count)
    item = np.concatenate([np.arange(n) for n in count])
    order = rng.permutation(len(rid))
    table = pa.table({"rid": rid, "user": rid % 7, "time": rid, "item": item, "click": item % 2}).take(order)
    schema = parse_schema(
        "{name: s, keys: {request: rid, user: user, time: time, impression: item}, "
        "tables: {t: {rows: 9, dim: 1}}, "
        "features: [{name: f, level: impression, kind: ids, columns: item, table: t}], "
        "labels: [{name: c, column: click}]}"
    )
    chunked = pa.concat_tables([table.slice(i, 997) for i in range(0, len(table), 997)])
    requests = group_impressions(chunked, schema)
    assert requests.column("rid").to_pylist() == list(range(3000))
    assert requests.column("num_impressions").to_pylist() == count.tolist()
    assert requests.column("item").to_pylist() == [list(range(n)) for n in count]


def conflicting(**changes: object) -> pa.Table:
    """Two requests; in the second, the impression at position 1 has other request-level values."""
    rows = [impression_row(request_row(number), i) for number in (6, 7) for i in range(3)]
    rows[4] |= changes
    return table_of(rows)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"age": 3.0}, "27.0 and 3.0"),
        ({"age": None}, "27.0 and None"),
        ({"note": "other"}, "note 7 and other"),
        ({"time": datetime.datetime(2023, 1, 1)}, "2023-02-28 23:00:00 and 2023-01-01 00:00:00"),
        ({"tags": ["b"]}, r"\['a'\] and \['b'\]"),
        ({"tags": None}, r"\['a'\] and None"),
        ({"h_item": [0, 1, 3]}, r"\[0, 1, 2\] and \[0, 1, 3\]"),
        ({"h_item": [0, 1]}, r"\[0, 1, 2\] and \[0, 1\]"),
        ({"h_dwell": [0.5, None, 0.5]}, r"\[0.5, 0.5, 0.5\] and \[0.5, None, 0.5\]"),
    ],
)
def test_varying_request_columns_fail_or_are_settled(changes: dict[str, object], values: str) -> None:
    table = conflicting(**changes)
    (column,) = changes
    message = rf"column '{column}' varies within 1 requests \(first: rid=r7, shard=1: {values}\).*on_request_conflict"
    with pytest.raises(DataError, match=message):
        group_impressions(table, SCHEMA)
    for choice in ("first", "last"):
        requests, findings = group_with_findings(table, SCHEMA, choice)
        assert counts_of(findings) == {f"request_conflicts.{column}": 1}
        settled = [finding for finding in findings if finding.found]
        assert [(f.subject, f.looked_at, f.rule, f.status) for f in settled] == [(column, 2, choice, "repaired")]
        assert requests.column(column)[1].as_py() == request_row(7)[column]  # position 1 is neither
    first = conflicting(position=-1, **changes)
    assert group_impressions(first, SCHEMA, "first").column(column)[1].as_py() == changes[column]
    last = conflicting(position=9, **changes)
    assert group_impressions(last, SCHEMA, "last").column(column)[1].as_py() == changes[column]


def test_equal_nans_do_not_conflict() -> None:
    rows = [impression_row(request_row(1, age=float("nan"), h_dwell=[float("nan")]), i) for i in range(3)]
    assert {finding.status for finding in group_with_findings(table_of(rows), SCHEMA)[1]} == {"passed"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 3))), min_size=1, max_size=12))
def test_max_time_takes_the_values_at_the_latest_impression(shown: list[tuple[int, int | None]]) -> None:
    """Against a loop: the latest time, of equal ones the last position; null times come before all."""
    schema = small_schema(lambda text: text.replace("position: position}", "position: position, impression_time: at}"))
    rows = [
        impression_row(request_row(6 + request), number, age=float(number)) | {"at": at}
        for number, (request, at) in enumerate(shown)
    ]
    table = pa.Table.from_pylist(rows, TYPES.append(pa.field("at", pa.int64())))
    requests, findings = group_with_findings(table, schema, "max_time")
    for request in requests.to_pylist():
        members = [row for row in rows if row["rid"] == request["rid"]]
        assert (
            request["age"] == max(members, key=lambda row: (-1 if row["at"] is None else row["at"], row["age"]))["age"]
        )
        assert request["at"] == [row["at"] for row in members]
    several = sum(sum(row["rid"] == f"r{6 + n}" for row in rows) > 1 for n in range(3))
    assert counts_of(findings).get("request_conflicts.age", 0) == several


def test_two_users_in_a_request_are_always_an_error() -> None:
    with pytest.raises(
        DataError, match=r"'user' varies within 1 requests \(first: rid=r7.*add columns to keys.request"
    ):
        group_impressions(conflicting(user=99), SCHEMA, "first")


def test_null_request_keys_are_an_error() -> None:
    with pytest.raises(DataError, match="column 'rid' of the request key is null in 1 rows"):
        group_impressions(conflicting(rid=None), SCHEMA)


def arrays(values: st.SearchStrategy[object], kind: pa.DataType) -> st.SearchStrategy[pa.Array]:
    """Arrays of a type, with nulls."""
    return st.lists(st.one_of(st.none(), values), max_size=8).map(lambda v: pa.array(v, kind))


INTS = st.integers(0, 2)
SCALARS = st.one_of(
    arrays(st.integers(-3, 3), pa.int64()),
    arrays(st.integers(0, 2**64 - 1), pa.uint64()),
    st.lists(st.integers(2**63 - 2, 2**63 + 1), max_size=8).map(lambda v: pa.array(v, pa.uint64())),
    arrays(st.sampled_from([0.0, -0.0, 1.5, float("nan")]), pa.float64()),
    arrays(st.text(max_size=2), pa.string()),
    arrays(st.booleans(), pa.bool_()),
    arrays(st.dates(), pa.date32()),
    arrays(st.decimals(-2, 2, places=1), pa.decimal128(5, 1)),
    arrays(st.none(), pa.null()),
)
NESTED = st.one_of(
    arrays(st.lists(st.one_of(st.none(), st.lists(INTS, max_size=2)), max_size=3), pa.list_(pa.list_(pa.int8()))),
    arrays(
        st.fixed_dictionaries({"a": INTS, "b": st.one_of(st.none(), st.text(max_size=1))}),
        pa.struct([("a", pa.int64()), ("b", pa.string())]),
    ),
)


def same(a: object, b: object) -> bool:
    return a == b or (a != a and b != b)


@settings(max_examples=150, deadline=None)
@given(st.one_of(SCALARS, NESTED), st.data())
def test_comparisons_against_python(array: pa.Array, data: st.DataObject) -> None:
    array = array.slice(data.draw(st.integers(0, len(array))))
    values = array.to_pylist()
    pairs = [(i, j) for i in range(len(values)) for j in range(len(values))]
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    expected = [not same(values[i], values[j]) for i, j in pairs]
    assert differing_rows(array, left, right).tolist() == expected
    digests = digest_rows(array)
    assert (digests[left] != digests[right]).tolist() == expected
    if not (pa.types.is_nested(array.type)):
        codes = sort_codes(array)
        assert (codes[left] != codes[right]).tolist() == expected
        known = [v for v in values if v is not None and v == v]
        by_code = sorted(range(len(values)), key=lambda i: codes[i])
        assert [values[i] for i in by_code][: len(known)] == sorted(known)


def test_long_lists_are_compared_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TOKENS_AT_ONCE", 7)
    lists = [[1] * n for n in range(12)] + [[1] * 4 + [2] * (n - 4) for n in range(5, 12)]
    array = pa.array(lists)
    left, right = np.array([(i, j) for i in range(19) for j in range(19)]).T
    assert differing_rows(array, left, right).tolist() == [
        lists[i] != lists[j] for i, j in zip(left, right, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(impression_logs(), st.integers(1, 4), st.sampled_from(["first", "last"]), st.sampled_from([1, 500, 10_000_000]))
def test_shared_copies_group_as_whole_rows_do(
    rows: list[dict[str, object]], tables: int, on_conflict: Literal["first", "last"], most_bytes: int
) -> None:
    """Dealt in several tables, with one copy of what equal rows share: the same requests and conflicts."""
    for number, row in enumerate(rows):
        row["age"] = [row["age"], 1.0, 2.0][number % 3]  # conflicts within most requests
        row["user"] = 1
    table = table_of(rows).select(SCHEMA.columns)
    expected = group_with_findings(table, SCHEMA, on_conflict)
    shared = SharedCopies(SCHEMA, 1, most_bytes)
    copies, impressions, copy_of = [], [], []
    for part in np.array_split(np.arange(len(rows)), tables):
        some = table.take(pa.array(part, pa.int64()))
        hashes = hash_rows(some, ["rid"])  # coarser than the request key: runs may hold several requests
        order = np.argsort(hashes, kind="stable")
        dealt = Dealt(order, np.zeros(len(part), np.int64), hashes[order])
        keeps, copy, kept = shared.share(some.select(SCHEMA.request_columns), dealt)
        assert kept.num_rows == keeps.sum()
        copies.append(kept)
        impressions.append(some.select(SCHEMA.impression_columns).take(pa.array(order)))
        copy_of.append(copy)
    parts = [pa.concat_tables(copies), pa.concat_tables(impressions)]
    result = group_parts(*parts, np.concatenate(copy_of).astype(np.int64), SCHEMA, on_conflict)
    assert repr(result[0].to_pylist()) == repr(expected[0].to_pylist())
    assert result[1] == expected[1]


def shared_of(tables: list[tuple[pa.Table, list[int]]], most_bytes: int = 10_000_000) -> list[tuple[list[int], ...]]:
    """For each (table, bucket of each row), by request r: the rows that keep their copy, and each row's copy."""
    shared = SharedCopies(SCHEMA, 2, most_bytes)
    results = []
    for table, buckets in tables:
        hashes, of = hash_rows(table, ["rid"]), np.array(buckets)
        order = np.lexsort([hashes, of])
        keeps, copy, _ = shared.share(table.select(SCHEMA.request_columns), Dealt(order, of[order], hashes[order]))
        back = np.argsort(order)
        results.append((np.flatnonzero(keeps[back]).tolist(), copy[back].tolist()))
    return results


def test_equal_rows_share_one_copy_over_all_tables_of_a_task() -> None:
    rows = [impression_row(request_row(n), item) for n in range(3) for item in range(5)]
    rows[7]["note"] = "differs"
    table = table_of(rows)
    [(first, copy), (second, copy_again)] = shared_of([(table, [0] * 15), (table, [0] * 15)])
    assert set(first) == {0, 5, 7, 10}
    assert [len(set(copy[:5])), len(set(copy[10:])), len(set(copy[5:7] + copy[8:10]))] == [1, 1, 1]
    assert sorted(set(copy)) == [0, 1, 2, 3]
    assert second == [7]  # not what is known of its request: kept again
    assert copy_again[7] == 4
    assert copy_again[:7] + copy_again[8:] == copy[:7] + copy[8:]


@pytest.mark.parametrize("columns", [["rid", "note"], ["note"], ["rid"], None])
def test_no_more_copies_are_remembered_than_allowed(columns: list[str] | None) -> None:
    """Whatever the columns are of; what was staged just before is found again all the same."""
    schema = SimpleNamespace(request_columns=columns or SCHEMA.request_columns)
    shared = SharedCopies(cast(Schema, schema), 1, 20_000)
    most = 0
    for first in range(0, 2000, 50):
        rows = [impression_row(request_row(n), 1) | {"note": f"{n:090d}"} for n in range(first, first + 50)]
        table = table_of(rows).select(schema.request_columns)
        dealt = Dealt(np.arange(50), np.zeros(50, np.int64), np.arange(first, first + 50).astype(np.uint64))
        assert shared.share(table, dealt)[0].all()
        assert not shared.share(table, dealt)[0].any()
        most = max(most, shared.bytes)
    assert 0 < most <= 20_000


def test_a_known_copy_is_of_the_same_bucket_and_forgotten_in_time() -> None:
    table = table_of([impression_row(request_row(n), 1) for n in range(4)])
    moved = shared_of([(table, [0, 0, 1, 1]), (table, [0, 0, 1, 0])])
    assert moved[1][0] == [3]
    assert moved[1][1][3] == 2  # the third copy of bucket 0
    assert shared_of([(table, [0] * 4), (table, [0] * 4)], most_bytes=1)[1][0] == [0, 1, 2, 3]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "a", "b", ""]),
            st.sampled_from([None, 1.5, float("nan"), -0.0, 0.0]),
            st.none() | st.lists(st.sampled_from([None, 1, 2]), max_size=3),
            st.none() | st.lists(st.sampled_from(["x", "y"]), max_size=2),
            st.sampled_from([None, True, False]),
        ),
        min_size=2,
        max_size=12,
    ),
    st.integers(1, 11),
)
def test_rows_of_two_columns_compare_as_of_one(rows: list[tuple[Any, ...]], cut: int) -> None:
    cut = min(cut, len(rows) - 1)
    kinds = [pa.string(), pa.float32(), pa.list_(pa.int32()), pa.list_(pa.string()), pa.bool_()]
    left, right = (grid.ravel() for grid in np.meshgrid(np.arange(cut), np.arange(len(rows) - cut)))
    for values, kind in zip(zip(*rows, strict=True), kinds, strict=True):
        whole = pa.array(values, kind)
        apart = differing_rows(whole.slice(0, cut), left, right, whole.slice(cut))
        assert apart.tolist() == differing_rows(whole, left, right + cut).tolist()


@given(
    st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.5, float("nan"), None]), max_size=3), min_size=1, max_size=8),
    st.sampled_from([pa.float32(), pa.float64()]),
    st.booleans(),
)
def test_lists_compare_by_value_whatever_their_bytes(
    lists: list[list[float | None]], kind: pa.DataType, nulls: bool
) -> None:
    lists = lists if nulls else [[x for x in values if x is not None] for values in lists]
    column = pa.array([[9.0], *lists], pa.list_(kind)).slice(1)
    left, right = (grid.ravel() for grid in np.meshgrid(np.arange(len(lists)), np.arange(len(lists))))

    def same(a: float | None, b: float | None) -> bool:
        return a == b or (a is not None and b is not None and a != a and b != b)

    expected = [
        len(lists[i]) != len(lists[j]) or not all(same(a, b) for a, b in zip(lists[i], lists[j], strict=True))
        for i, j in zip(left, right, strict=True)
    ]
    assert differing_rows(column, left, right).tolist() == expected
