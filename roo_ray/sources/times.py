"""Times of any Arrow type as seconds since the epoch (UTC): the one rule that all parts share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_ray.errors import DataError

SECONDS_A_DAY = 86_400
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Numbers carry no unit: below the first limit they are seconds (to the year 5138), then milliseconds, ...
LIMITS = np.array([10**11, 10**14, 10**17])
UNITS = np.array([1, 10**3, 10**6, 10**9])

Seconds = npt.NDArray[np.float64]


def is_time_type(kind: pa.DataType) -> bool:
    """Whether ``epoch_seconds`` reads values of this type."""
    types = pa.types
    checks = (types.is_timestamp, types.is_date, types.is_integer, types.is_floating)
    return any(check(kind) for check in checks)


def _split(values: npt.NDArray[np.int64], per_second: int | npt.NDArray[np.int64]) -> Seconds:
    # whole seconds and the rest apart: nanoseconds since 1970 do not fit into a double
    whole, rest = np.divmod(values, per_second)
    seconds: Seconds = whole + rest / per_second
    return seconds


def epoch_seconds(array: pa.Array | pa.ChunkedArray, name: str = "time") -> Seconds:
    """(N,) float64 seconds since 1970-01-01 UTC.

    Timestamps of any unit; those without a time zone are taken as UTC. Dates are their midnight UTC. Integers
    and floats are read value by value by their size: below 1e11 seconds, below 1e14 milliseconds, below 1e17
    microseconds, else nanoseconds (so times in seconds reach to the year 5138, and times in milliseconds begin
    in March 1973). Equal instants give equal results whatever their unit, to 0.24 microseconds.

    Raises DataError naming the column ``name`` for nulls, NaN or infinity, and types that are no times.
    """
    if isinstance(array, pa.ChunkedArray):
        parts = [epoch_seconds(chunk, name) for chunk in array.chunks]
        if parts or is_time_type(array.type):
            return np.concatenate(parts) if parts else np.zeros(0)
    kind = array.type
    if not is_time_type(kind):
        raise DataError(
            f"column '{name}' has type {kind}, which is no time; use a timestamp, a date, or a number of "
            "seconds, milliseconds, microseconds or nanoseconds since 1970"
        )
    if array.null_count:
        raise DataError(
            f"column '{name}' has {array.null_count} null times; every time must be known: remove these rows "
            "from the source"
        )
    if pa.types.is_timestamp(kind):
        return _split(np.asarray(array.cast(pa.int64())), PER_SECOND[kind.unit])
    if pa.types.is_date(kind):
        return _split(np.asarray(array.cast(pa.timestamp("ms")).cast(pa.int64())), 1000)
    values = np.asarray(array)
    if pa.types.is_integer(kind):
        whole = values.astype(np.int64)
        return _split(whole, UNITS[np.searchsorted(LIMITS, np.abs(whole), side="right")])
    numbers = values.astype(np.float64)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        raise DataError(
            f"column '{name}' has {int(wrong.sum())} times that are NaN or infinite; every time must be known: "
            "remove these rows from the source"
        )
    scaled: Seconds = numbers / UNITS[np.searchsorted(LIMITS, np.abs(numbers), side="right")]
    return scaled


def epoch_micros(array: pa.Array | pa.ChunkedArray, name: str = "time") -> npt.NDArray[np.int64]:
    """(N,) int64 microseconds since 1970-01-01 UTC, exact for whole microseconds (the rest is cut off): for
    comparing instants. Values are read as by ``epoch_seconds``, and the same errors are raised."""
    if isinstance(array, pa.ChunkedArray):
        parts = [epoch_micros(chunk, name) for chunk in array.chunks]
        if parts or is_time_type(array.type):
            return np.concatenate(parts) if parts else np.zeros(0, np.int64)
    kind = array.type
    whole = pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_integer(kind)
    if not whole or array.null_count:
        return np.round(epoch_seconds(array, name) * 1e6).astype(np.int64)
    if pa.types.is_date(kind):
        array = array.cast(pa.timestamp("ms"))
    values = np.asarray(array.cast(pa.int64()))
    if pa.types.is_integer(kind):
        per_second = UNITS[np.searchsorted(LIMITS, np.abs(values), side="right")]
    else:
        per_second = np.full(len(values), PER_SECOND[array.type.unit])
    coarse = np.maximum(10**6 // per_second, 1)
    micros: npt.NDArray[np.int64] = values * coarse // np.maximum(per_second // 10**6, 1)
    return micros


def utc_days(seconds: Seconds) -> npt.NDArray[np.int64]:
    """(N,) int64: days since 1970-01-01 UTC of times in seconds."""
    return np.floor(seconds / SECONDS_A_DAY).astype(np.int64)


def day_name(day: int) -> str:
    """``YYYY-MM-DD`` of a number of days since 1970-01-01."""
    return str(np.datetime64(day, "D"))
