"""Rows of list columns moved and compared as blocks of bytes, against Arrow's own take and Python's equality."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.ingest.lists import BLOCK, gather, ranges
from roo_ray.sources.columns import byte_rows, take_rows, take_table
from roo_ray.sources.compare import differing_rows, same_blocks

VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int8(): st.integers(-128, 127),
    pa.int32(): st.integers(0, 5),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.float64(): st.sampled_from([0.0, -0.0, 1.5]),
    pa.timestamp("us"): st.datetimes(datetime.datetime(2020, 1, 1), datetime.datetime(2026, 1, 1)),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(max_size=3),
}


@st.composite
def list_arrays(draw: st.DrawFn) -> pa.Array:
    """Lists of any of the types, some null, some with null values, cut out of a longer array."""
    kind = draw(st.sampled_from(list(VALUES)))
    of = pa.large_list if draw(st.booleans()) else pa.list_
    value = VALUES[kind] if draw(st.booleans()) else VALUES[kind] | st.none()
    one = st.lists(value, max_size=6)
    rows = draw(st.lists(one if draw(st.booleans()) else one | st.none(), min_size=1, max_size=20))
    first = draw(st.integers(0, len(rows) - 1))
    return pa.array(rows, of(kind)).slice(first, draw(st.integers(1, len(rows) - first)))


@settings(max_examples=150, deadline=None)
@given(list_arrays(), st.data())
def test_rows_are_taken_as_arrow_takes_them(array: pa.Array, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, len(array) - 1), max_size=30)), np.int64)
    taken = take_rows(array, rows)
    taken.validate(full=True)
    assert taken.type == array.type
    assert taken.to_pylist() == array.take(pa.array(rows)).to_pylist()
    table = take_table(pa.table({"a": pa.chunked_array([array, array]), "b": np.arange(2 * len(array))}), rows)
    assert table.column("a").to_pylist() == taken.to_pylist()
    assert table.column("b").to_pylist() == rows.tolist()


@settings(max_examples=150, deadline=None)
@given(list_arrays(), st.data())
def test_rows_differ_where_their_values_do(array: pa.Array, data: st.DataObject) -> None:
    some = st.lists(st.tuples(*[st.integers(0, len(array) - 1)] * 2), max_size=30)
    left, right = np.array(data.draw(some), np.int64).reshape(-1, 2).T
    values = array.to_pylist()
    expected = [values[a] != values[b] for a, b in zip(left, right, strict=True)]
    assert differing_rows(array, left, right).tolist() == expected
    other = array.take(pa.array(right))
    assert differing_rows(array, left, np.arange(len(right)), other).tolist() == expected
    same = same_blocks(array, left, other, np.arange(len(right)))
    assert not (same & np.array(expected, np.bool_)).any()
    alike = [repr(values[a]) == repr(values[b]) for a, b in zip(left, right, strict=True)]  # -0.0 looks different
    assert same[np.array(alike, np.bool_)].all()


def test_comparing_copies_no_more_than_the_rows_that_are_as_long() -> None:
    long = pa.array([list(range(100_000))], pa.list_(pa.int64()))
    short = pa.array([[0]] * 1000, pa.list_(pa.int64()))
    rows = np.arange(1000)
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        assert not same_blocks(short, rows, long, np.zeros(1000, np.int64)).any()
        assert same_blocks(short, rows, short, rows[::-1]).all()
    finally:
        pa.set_memory_pool(usual)
    assert 0 < pool.max_memory() < 50_000_000  # 800 MB, if the long list were copied for each row


def test_texts_are_compared_as_blocks() -> None:
    array, other = pa.array(["a", None, "", "bc"]), pa.array(["bc", "", None])
    left, right = np.array([0, 1, 2, 3, 1]), np.array([0, 2, 1, 0, 1])
    assert same_blocks(array, left, other, right).tolist() == [False, True, True, True, False]


def test_lists_without_a_value_of_a_staging_file_are_taken() -> None:
    stream = pa.BufferOutputStream()
    with pa.ipc.new_file(stream, pa.schema([("a", pa.list_(pa.int64()))])) as writer:
        writer.write_batch(pa.record_batch({"a": pa.array([[], []], pa.list_(pa.int64()))}))
    array = pa.ipc.open_file(stream.getvalue()).get_batch(0).column("a")
    assert take_rows(array, np.array([1, 0])).to_pylist() == [[], []]
    assert not differing_rows(array, np.array([0]), np.array([1])).any()


def test_plain_lists_are_moved_as_blocks_and_others_are_not() -> None:
    assert byte_rows(pa.array([[1, 2], None], pa.list_(pa.int32()))).to_pylist() == [b"\1\0\0\0\2\0\0\0", None]
    for array in (pa.array([[True]]), pa.array([["a"]]), pa.array([[[1]]]), pa.array([[1, None]]), pa.array([1])):
        assert byte_rows(array) is None


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float32(), pa.bool_()])
def test_ranges_of_values_are_gathered(kind: pa.DataType) -> None:
    rng = np.random.default_rng(0)
    for most in (3, 4 * BLOCK):  # single values, blocks
        lengths = rng.integers(0, most, 50)
        starts = rng.integers(0, 900 - lengths)
        values = pa.array(rng.integers(0, 2, 1000)).cast(kind).slice(7)
        for some in (np.arange(50), np.zeros(0, np.int64), np.flatnonzero(lengths == 0)):
            index = ranges(starts[some], lengths[some])
            assert gather(values, starts[some], lengths[some]).equals(values.take(pa.array(index)))
