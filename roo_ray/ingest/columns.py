"""From Arrow values to model values: ids into tables, dense floats, labels. Vectorised, and every refusal says
which column and, through ``where``, which request and file the offending value is in.

``Where``: position in the values -> words for the message.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError
from roo_ray.schema import Table
from roo_ray.sources.hashing import hash_array
from roo_ray.sources.times import epoch_seconds

Where = Callable[[int], str]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NO_ID = 0  # in a managed table: of a dummy request; no id of the data is it
_MANAGED = np.uint64(1 << 61)  # ids of the data in a managed table are from here on, those of nulls below

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6}


def plain_values(values: pa.Array) -> pa.Array:
    """The values, decoded where they are dictionary-encoded."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _first(mask: npt.NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _to_float(values: pa.Array, column: str) -> Floats:
    """(N,) float32, NaN where null."""
    values = plain_values(values)
    kind = values.type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(f"column '{column}' holds {kind}; a dense feature or label must be numeric or boolean")
    floats: Floats = pc.cast(values, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return floats


def ids_of(
    values: pa.Array, column: str, name: str, table: Table, where: Where, fill_id: int | None = None
) -> Integers:
    """(N,) int64 rows of the embedding table ``name``: hashed where the table says so, else checked. Of a managed
    table: hashes of 61 bits, to which the model gives rows; ``fill_id + 1`` for nulls; never ``NO_ID``.

    Raises DataError at a null without ``fill_id``, at an id outside the table, at a type that is no id.
    """
    values = plain_values(values)
    nulls = np.asarray(values.is_null()) if values.null_count else None
    if nulls is not None and fill_id is None:
        raise DataError(
            f"column '{column}' is null in {where(_first(nulls))}; give the feature a fill_id, or remove the nulls"
        )
    if table.managed:
        rows = ((hash_array(values) >> np.uint64(3)) | _MANAGED).astype(np.int64)
        fill_id = None if fill_id is None else fill_id + 1
    elif table.hash:
        rows = (hash_array(values) % np.uint64(table.rows)).astype(np.int64)
    else:
        rows = _checked_ids(values, column, name, table, where)
    return rows if nulls is None else np.where(nulls, fill_id or 0, rows)


def _checked_ids(values: pa.Array, column: str, name: str, table: Table, where: Where) -> Integers:
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"column '{column}' holds {kind}, and table '{name}' takes integers 0 to {table.rows - 1}; "
            f"set hash: true for table '{name}'"
        )
    filled = pc.fill_null(values, pa.scalar(0, kind)) if values.null_count else values
    # unsigned 64-bit ids wrap to negative numbers, which the check below refuses
    rows: Integers = pc.cast(filled, pa.int64(), safe=False).to_numpy(zero_copy_only=False)
    if rows.view(np.uint64).max(initial=0) >= table.rows:  # negative numbers are the largest then
        at = _first((rows < 0) | (rows >= table.rows))
        raise DataError(
            f"column '{column}' has id {values[at].as_py()}, and table '{name}' has {table.rows} rows "
            f"(ids 0 to {table.rows - 1}), in {where(at)}; raise the table's rows or set hash: true"
        )
    return rows


def dense_of(values: pa.Array, column: str, where: Where, fill: float | None, scale: str) -> Floats:
    """(N,) float32: nulls and NaNs become ``fill``, given in the column's units (an error without it); then
    ``scale: log1p`` makes it log(1 + max(x, 0)). Infinite values are an error."""
    floats = _to_float(values, column)
    if not np.isfinite(floats).all():
        missing = np.isnan(floats)
        if missing.any():
            if fill is None:
                raise DataError(
                    f"column '{column}' is null or NaN in {where(_first(missing))}; give the feature a fill, or "
                    "remove the nulls"
                )
            floats = np.where(missing, np.float32(fill), floats)
        infinite = np.isinf(floats)
        if infinite.any():
            at = _first(infinite)
            raise DataError(
                f"column '{column}' is {values[at]}, infinite as float32, in {where(at)}; one such value makes "
                "a whole model NaN: remove it"
            )
    return np.log1p(np.maximum(floats, np.float32(0))) if scale == "log1p" else floats


def labels_of(values: pa.Array, column: str, where: Where) -> tuple[Floats, Floats]:
    """((N,) float32 labels, (N,) float32 weights): null gives label 0 and weight 0.

    Raises DataError at a NaN, and at any other value than 0 and 1.
    """
    values = plain_values(values)
    floats = _to_float(values, column)
    known = np.asarray(values.is_valid())
    bad = known & (floats != 0) & (floats != 1)
    if bad.any():
        at = _first(bad)
        value = "NaN" if np.isnan(floats[at]) else f"{floats[at]:g}"
        raise DataError(f"label column '{column}' is {value} in {where(at)}; labels are 0 or 1, and null where unknown")
    return np.where(known, floats, np.float32(0)), known.astype(np.float32)


def oracle_of(values: pa.Array, column: str) -> Floats:
    """(N,) float32 true probabilities, NaN where null."""
    return _to_float(values, column)


def seconds_of(values: pa.Array, column: str, where: Where) -> npt.NDArray[np.float64]:
    """(N,) float64 seconds since the epoch. Raises DataError at a null, and at a type that is no time."""
    if values.null_count:
        at = _first(np.asarray(values.is_null()))
        raise DataError(f"time column '{column}' is null in {where(at)}; every event needs its time")
    if pa.types.is_timestamp(values.type) and values.type.unit in _PER_SECOND:
        # exact integers in a double, divided once: equal instants stay equal whatever their unit
        counts = np.asarray(values.cast(pa.int64()))
        seconds: npt.NDArray[np.float64] = counts / _PER_SECOND[values.type.unit]
        return seconds
    try:
        return epoch_seconds(values)
    except DataError as error:
        raise DataError(f"time column '{column}': {error}") from None
