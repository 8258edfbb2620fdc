"""Times as seconds since the epoch (UTC), whatever type a log keeps them in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError

Seconds = npt.NDArray[np.float64]
PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
DAY = 86_400.0
# Numbers carry no unit. 1e11 seconds is the year 5138 and 1e11 ms is 1973, so the magnitude tells them apart.
MAGNITUDES = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6))


def is_time(kind: pa.DataType) -> bool:
    """Whether ``epoch_seconds`` reads values of this type."""
    types = pa.types
    return any(test(kind) for test in (types.is_timestamp, types.is_date, types.is_integer, types.is_floating))


def epoch_seconds(array: pa.Array | pa.ChunkedArray) -> Seconds:
    """(N,) float64 seconds since the epoch (UTC), NaN for null.

    Timestamps and dates by their unit (without time zone: UTC). Plain numbers by the magnitude of each value:
    below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, above nanoseconds. Raises DataError
    for other types.
    """
    kind = array.type
    if isinstance(array, pa.ChunkedArray):
        parts = [epoch_seconds(chunk) for chunk in array.chunks]
        return np.concatenate(parts) if parts else np.zeros(0)
    if not is_time(kind):
        raise DataError(f"values of type {kind} are not times; use timestamps, or numbers since the epoch")
    if pa.types.is_date(kind):
        array = array.cast(pa.timestamp("ms"))
    per_second = PER_SECOND[array.type.unit] if pa.types.is_timestamp(array.type) else None
    if per_second is not None:
        array = array.cast(pa.int64())
    nulls = array.null_count > 0
    zero = pa.scalar(0, array.type)
    values = np.asarray(pc.fill_null(array, zero) if nulls else array).astype(np.float64)
    if per_second is None:
        size = np.abs(values)
        divisor = np.full(len(values), 1e9)
        for limit, unit in reversed(MAGNITUDES):
            divisor[size < limit] = unit
        values = values / divisor
    else:
        values = values / per_second
    return np.where(np.asarray(pc.is_null(array)), np.nan, values) if nulls else values


def utc_days(seconds: Seconds) -> npt.NDArray[np.datetime64]:
    """(N,) datetime64[D]: the UTC day of each time."""
    return np.floor(seconds / DAY).astype(np.int64).astype("datetime64[D]")
