"""Times of every type and unit name the same instant; what is no time is refused by name."""

import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.errors import DataError
from roo_ray.sources.times import day_name, epoch_seconds, utc_days

INSTANT = datetime.datetime(2023, 2, 27, 3, 23, 27, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_and_numbers_of_every_unit_agree(unit: str) -> None:
    naive = pa.array([INSTANT.replace(tzinfo=None)], pa.timestamp(unit))
    zoned = pa.array([INSTANT], pa.timestamp(unit, tz="Europe/Copenhagen"))
    number = naive.cast(pa.int64())
    for array in (naive, zoned, number, number.cast(pa.float64(), safe=False)):
        assert epoch_seconds(array).tolist() == [INSTANT.timestamp()]


def test_dates_chunks_and_empty() -> None:
    day = pa.chunked_array([pa.array([datetime.date(2023, 2, 27)]), pa.array([datetime.date(1969, 12, 31)])])
    assert epoch_seconds(day).tolist() == [1677456000.0, -86400.0]
    assert epoch_seconds(day.cast(pa.date64())).tolist() == [1677456000.0, -86400.0]
    assert epoch_seconds(pa.chunked_array([], pa.timestamp("us"))).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(10**15), 4 * 10**15), min_size=1, max_size=20))
def test_microseconds_against_exact_arithmetic(micros: list[int]) -> None:
    seconds = epoch_seconds(pa.array(micros, pa.timestamp("us")))
    np.testing.assert_allclose(seconds, [m / 10**6 for m in micros], rtol=0, atol=2.4e-7)
    nanos = pa.array(micros, pa.timestamp("us")).cast(pa.timestamp("ns"))
    np.testing.assert_array_equal(epoch_seconds(nanos), seconds)
    np.testing.assert_array_equal(utc_days(seconds), [m // (86_400 * 10**6) for m in micros])


def test_day_name() -> None:
    assert day_name(int(utc_days(np.array([INSTANT.timestamp()]))[0])) == "2023-02-27"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array(["2023-02-27"]), r"column 'when' has type string, which is no time; use a timestamp"),
        (pa.array([True]), r"column 'when' has type bool"),
        (pa.array([1, None, None]), r"column 'when' has 2 null times"),
        (pa.array([1.0, float("nan")]), r"column 'when' has 1 times that are NaN"),
    ],
)
def test_what_is_no_time_is_refused(array: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        epoch_seconds(array, "when")
