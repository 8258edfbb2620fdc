"""Hashes are stable, equal across integer widths and encodings, and spread over buckets."""

import datetime

import numpy as np
import pyarrow as pa
import pytest

from roo_ray.errors import DataError
from roo_ray.sources.hashing import hash_array, hash_rows


def test_value_not_width_or_encoding_decides() -> None:
    values = [0, 1, 5, None, 2**31 - 1]
    reference = hash_array(pa.array(values, pa.int64()))
    for kind in (pa.int32(), pa.uint32(), pa.uint64()):
        np.testing.assert_array_equal(hash_array(pa.array(values, kind)), reference)
    np.testing.assert_array_equal(hash_array(pa.array(values, pa.int64()).dictionary_encode()), reference)
    chunked = pa.chunked_array([pa.array(values[:2], pa.int64()), pa.array(values[2:], pa.int64())])
    np.testing.assert_array_equal(hash_array(chunked), reference)
    words = pa.array(["a", None, "b", "a"])
    np.testing.assert_array_equal(hash_array(words), hash_array(words.dictionary_encode()))
    np.testing.assert_array_equal(hash_array(words), hash_array(words.cast(pa.large_string())))
    times = pa.array([datetime.datetime(2023, 2, 27, 3, 4, 5)], pa.timestamp("us"))
    np.testing.assert_array_equal(hash_array(times), hash_array(times.cast(pa.timestamp("ms"))))
    assert len(hash_array(pa.chunked_array([], pa.string()))) == 0


def test_pinned_values() -> None:
    assert hash_array(pa.array([7], pa.int32())).tolist() == [7191089600892374487]
    assert hash_array(pa.array(["seven"])).tolist() == [5959363190923107299]


def test_columns_are_not_interchangeable_and_rows_spread() -> None:
    table = pa.table({"a": [1, 2], "b": [2, 1]})
    first, second = hash_rows(table, ["a", "b"])
    assert first != second
    counts = np.bincount(hash_rows(pa.table({"a": np.arange(20_000)}), ["a"]) % np.uint64(8), minlength=8)
    assert counts.min() > 2300
    assert counts.max() < 2700


def test_floats_are_refused_as_keys() -> None:
    with pytest.raises(DataError, match="double"):
        hash_array(pa.array([1.5]))
