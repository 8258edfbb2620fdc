"""Instants in whole microseconds: of every type that ``epoch_seconds`` reads, and equal to it."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.errors import DataError
from roo_ray.sources.times import epoch_micros, epoch_seconds

MOMENT = st.datetimes(datetime.datetime(1975, 1, 1), datetime.datetime(2200, 1, 1))


@given(st.lists(MOMENT, max_size=5))
def test_timestamps_and_numbers_of_one_instant_are_equal(moments: list[datetime.datetime]) -> None:
    exact = pa.array(moments, pa.timestamp("us"))
    micros = np.asarray(exact.cast(pa.int64()))
    expected = micros.tolist()
    assert epoch_micros(exact).tolist() == expected
    assert epoch_micros(pa.chunked_array([exact])).tolist() == expected
    assert epoch_micros(exact.cast(pa.timestamp("ns"))).tolist() == expected
    assert epoch_micros(exact.cast(pa.timestamp("us", tz="Europe/Berlin"))).tolist() == expected
    whole = [value // 1000 * 1000 for value in expected]
    assert epoch_micros(exact.cast(pa.timestamp("ms"), safe=False)).tolist() == whole
    assert epoch_micros(pa.array([value // 1000 for value in expected], pa.int64())).tolist() == whole
    seconds = [value // 10**6 for value in expected]
    assert epoch_micros(pa.array(seconds, pa.int64())).tolist() == [value * 10**6 for value in seconds]
    assert np.allclose(epoch_micros(exact) / 1e6, epoch_seconds(exact), rtol=0, atol=1e-6)


def test_dates_floats_and_refusals() -> None:
    assert epoch_micros(pa.array([datetime.date(1970, 1, 2)])).tolist() == [86_400 * 10**6]
    assert epoch_micros(pa.array([1_700_000_000.25])).tolist() == [1_700_000_000_250_000]
    with pytest.raises(DataError, match="column 'at' has 1 null times"):
        epoch_micros(pa.array([None, 1]), "at")
    with pytest.raises(DataError, match="column 'at' has type string, which is no time"):
        epoch_micros(pa.array(["now"]), "at")
