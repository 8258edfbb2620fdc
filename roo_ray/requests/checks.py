"""Checks of request rows against the schema: before anything is published, each with one clear error.

``check_types`` looks at column types alone, before any row is read; ``check_requests`` at the rows. Errors name
the column, the first offending request, its value, and what to do; what is legal but worth knowing is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError
from roo_ray.requests.compare import Mask, same_as_previous, sort_codes
from roo_ray.requests.grouping import NUM_IMPRESSIONS, describe_key, require_keys
from roo_ray.requests.times import epoch_seconds, is_time_type
from roo_ray.schema import Feature, Schema
from roo_ray.schema import Table as IdTable
from roo_ray.sources.columns import as_array, is_list, list_parts

Test = Callable[[pa.DataType], bool]


# ---- types ---------------------------------------------------------------------------------------


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return any(test(kind) for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_null))


def _is_id(kind: pa.DataType) -> bool:
    types = pa.types
    return any(test(kind) for test in (types.is_integer, types.is_boolean, types.is_null))


def _is_hashable(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (
        types.is_integer,
        types.is_boolean,
        types.is_string,
        types.is_binary,
        types.is_temporal,
        types.is_null,
    )
    return any(test(kind) for test in tests)


def _is_scalar(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind)


def _id_rule(schema: Schema, table: str | None) -> tuple[Test, str]:
    if table is not None and schema.tables[table].hash:
        return _is_hashable, "integers, strings or timestamps"
    return _is_id, f"integers (or hash: true for table '{table}')"


def check_types(rows: pa.Schema, schema: Schema, kind: str) -> None:
    """Raises DataError naming the first column whose type the schema cannot use. ``rows``: the columns' types;
    ``kind`` ``requests``: impression-level columns are wrapped in lists."""
    types = {field.name: field.type for field in rows}
    if NUM_IMPRESSIONS in schema.columns:
        raise DataError(f"the schema names a column '{NUM_IMPRESSIONS}', which request rows have for themselves")
    if kind == "requests":
        for name in schema.impression_columns:
            if not is_list(types[name]):
                raise DataError(
                    f"column '{name}' has type {types[name]}; in rows that are requests an impression-level "
                    "column is a list with one value per impression"
                )
            types[name] = types[name].value_type

    def need(name: str, role: str, test: Test, wanted: str, inside_list: bool = False) -> None:
        found = types[name]
        if inside_list and not is_list(found):
            raise DataError(f"column '{name}' has type {found}, but {role} needs a list of {wanted}")
        if not test(found.value_type if inside_list else found):
            what = f"a list of {wanted}" if inside_list else wanted
            raise DataError(
                f"column '{name}' has type {found}, but {role} needs {what}; correct the schema or cast the column"
            )

    keys = schema.keys
    for name in keys.request:
        need(name, "the request key", _is_hashable, "integers, strings or timestamps")
    need(keys.user, "the user key", _is_hashable, "integers, strings or timestamps")
    need(keys.time, "the request time", is_time_type, "timestamps, dates or numbers since 1970")
    for name in [*keys.impression, *([keys.position] if keys.position else [])]:
        need(name, "keys.impression or keys.position", _is_scalar, "scalar values")
    for feature in schema.features:
        role = f"feature '{feature.name}' ({feature.kind})"
        if feature.kind == "dense":
            for name in feature.columns:
                need(name, role, _is_number, "numbers or booleans")
        elif feature.kind == "ids":
            (name,) = feature.columns
            pooled_list = feature.pooling != "none" and is_list(types[name])
            need(name, role, *_id_rule(schema, feature.table), inside_list=pooled_list)
        else:
            for column in feature.sequence:
                if column.table:
                    need(column.column, role, *_id_rule(schema, column.table), inside_list=True)
                else:
                    need(column.column, role, _is_number, "numbers or booleans", inside_list=True)
            if feature.time:
                need(feature.time, role, is_time_type, "timestamps or numbers since 1970", inside_list=True)
    for label in schema.labels:
        need(label.column, f"label '{label.name}'", _is_number, "0, 1 or null")
        if label.oracle:
            need(label.oracle, f"the oracle of label '{label.name}'", _is_number, "probabilities")


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaves:
    """The innermost values of a column, and the list lengths on the way to them, outermost first."""

    values: pa.Array
    levels: list[npt.NDArray[np.int64]]

    @staticmethod
    def of(array: pa.Array) -> _Leaves:
        levels = []
        while is_list(array.type):
            lengths, array = list_parts(array)
            levels.append(lengths)
        return _Leaves(array, levels)

    def row(self, position: int) -> int:
        """The row that a value belongs to."""
        for lengths in reversed(self.levels):
            position = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
        return position


class _Checker:
    def __init__(self, requests: pa.Table, schema: Schema) -> None:
        self.requests = requests
        self.schema = schema
        self.counts: dict[str, int] = {}

    def array(self, name: str) -> pa.Array:
        return as_array(self.requests.column(name))

    def where(self, row: int) -> str:
        return f"request {describe_key(self.requests, row, self.schema.keys.request)}"

    def count(self, name: str, number: int, of: str, several: bool) -> None:
        """Adds to a count, and to the count of one label or sequence where there are several."""
        for key in [name, *([f"{name}.{of}"] if several else [])]:
            self.counts[key] = self.counts.get(key, 0) + number

    def refuse(self, name: str, leaves: _Leaves, wrong: Mask, what: str, advice: str) -> None:
        """Raises DataError at the first value that is wrong, if any."""
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"column '{name}': {int(wrong.sum())} values {what} (first: {leaves.values[first].as_py()} in "
                f"{self.where(leaves.row(first))}); {advice}"
            )

    def lengths(self, name: str) -> npt.NDArray[np.int64]:
        return list_parts(self.array(name))[0]

    def aligned(self, names: Sequence[str], what: str) -> npt.NDArray[np.int64]:
        """The list lengths that all columns share. Raises DataError where they differ."""
        first = self.lengths(names[0])
        for name in names[1:]:
            other = self.lengths(name)
            if not np.array_equal(first, other):
                row = int(np.flatnonzero(first != other)[0])
                unequal = int((first != other).sum())
                raise DataError(
                    f"{what} have unequal lengths in {unequal} requests (first: '{names[0]}' has {first[row]} "
                    f"and '{name}' {other[row]} in {self.where(row)}); they must have one value each "
                    "per element: correct the source"
                )
        return first

    # ---- the checks --------------------------------------------------------------------------------

    def impressions(self) -> None:
        names = self.schema.impression_columns
        for name in names:
            nulls = self.array(name)
            if nulls.null_count:
                row = int(np.flatnonzero(np.asarray(nulls.is_null()))[0])
                raise DataError(f"column '{name}': the list of impressions is null in {self.where(row)}")
        lengths = self.aligned(names, "impression-level columns")
        declared = np.asarray(self.requests.column(NUM_IMPRESSIONS)).astype(np.int64)
        if not np.array_equal(lengths, declared):
            row = int(np.flatnonzero(lengths != declared)[0])
            raise DataError(
                f"'{NUM_IMPRESSIONS}' is {declared[row]} and the lists have {lengths[row]} values in "
                f"{self.where(row)}; correct the source"
            )
        if (lengths == 0).any():
            row = int(np.flatnonzero(lengths == 0)[0])
            raise DataError(
                f"{int((lengths == 0).sum())} requests have no impressions (first: {self.where(row)}); remove "
                "them from the source"
            )

    def unique_impressions(self) -> None:
        keys = [n for n in self.schema.keys.impression if n not in self.schema.keys.request]
        if not keys or not self.schema.keys.impression:
            return
        lengths = self.lengths(keys[0])
        row = np.repeat(np.arange(len(lengths)), lengths)  # (impressions,)
        values = [list_parts(self.array(name))[1] for name in keys]
        codes = [row, *(sort_codes(array) for array in values)]
        order = np.lexsort(codes[::-1])
        repeated = order[same_as_previous(codes, order)]
        if len(repeated):
            first = int(repeated.min())
            named = ", ".join(f"{n}={a[first].as_py()}" for n, a in zip(keys, values, strict=True))
            raise DataError(
                f"{len(repeated)} impressions repeat the key of another one of their request (first: "
                f"{named} in {self.where(int(row[first]))}); remove the duplicates from the source, or correct "
                "keys.impression"
            )

    def unique_requests(self) -> None:
        keys = self.schema.keys.request
        codes = [sort_codes(self.requests.column(name)) for name in keys]
        order = np.lexsort(codes[::-1])
        repeated = order[same_as_previous(codes, order)]
        if len(repeated):
            raise DataError(
                f"{len(repeated)} requests repeat the key of another request (first: "
                f"{self.where(int(repeated.min()))}); remove the duplicates from the source, or add columns to "
                "keys.request"
            )

    def labels(self) -> None:
        for label in self.schema.labels:
            leaves = _Leaves.of(self.array(label.column))
            known = np.asarray(leaves.values.is_valid())
            values = _floats(leaves.values)
            advice = "a label is 0 or 1, or null where it is unknown: correct the source"
            self.refuse(label.column, leaves, known & np.isnan(values), "are NaN", advice)
            self.refuse(label.column, leaves, known & (values != 0) & (values != 1), "are neither 0 nor 1", advice)
            self.count("null_labels", int((~known).sum()), label.column, len(self.schema.labels) > 1)

    def dense(self, feature: Feature) -> None:
        for name in feature.columns:
            leaves = _Leaves.of(self.array(name))
            values = _floats(leaves.values)
            if feature.fill is None:
                advice = f"give feature '{feature.name}' a fill, or remove the nulls from the source"
                self.refuse(name, leaves, np.isnan(values), "are null or NaN", advice)
            self.refuse(name, leaves, np.isinf(values), "are infinite as float32", "correct the source")

    def ids(self, feature: Feature) -> None:
        name, table = feature.columns[0], self.schema.tables[str(feature.table)]
        leaves = _Leaves.of(self.array(name))
        single = feature.pooling == "none"
        scalar = len(leaves.levels) == (0 if feature.level == "request" else 1)
        if (single and feature.fill_id is None) or not scalar:
            advice = f"give feature '{feature.name}' a fill_id, or correct the source" if single else "remove them"
            self.refuse(name, leaves, np.asarray(leaves.values.is_null()), "are null", advice)
        self.in_table(name, leaves, table, str(feature.table))

    def in_table(self, name: str, leaves: _Leaves, table: IdTable, table_name: str) -> None:
        values = leaves.values
        if table.hash or pa.types.is_null(values.type) or len(values) == 0:
            return
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.uint8())
        outside = pc.greater_equal(values, table.rows)
        if not pa.types.is_unsigned_integer(values.type):
            outside = pc.or_(outside, pc.less(values, 0))
        self.refuse(
            name,
            leaves,
            np.asarray(pc.fill_null(outside, False)),
            f"are outside table '{table_name}', whose ids are 0 .. {table.rows - 1}",
            "raise the table's rows, or set hash: true",
        )

    def sequence(self, feature: Feature, request_times: npt.NDArray[np.float64]) -> None:
        lengths = self.aligned(feature.source_columns, f"the columns of sequence '{feature.name}'")
        several = len(self.schema.sequences) > 1
        self.count("empty_histories", int((lengths == 0).sum()), feature.name, several)
        for column in feature.sequence:
            leaves = _Leaves.of(self.array(column.column))
            if column.table:
                nulls = np.asarray(leaves.values.is_null())
                self.refuse(column.column, leaves, nulls, "are null", "remove these events from the source")
                self.in_table(column.column, leaves, self.schema.tables[column.table], column.table)
            else:
                values = _floats(leaves.values)
                self.refuse(column.column, leaves, np.isinf(values), "are infinite as float32", "correct the source")
                self.count("null_history_values", int(np.isnan(values).sum()), column.column, True)
        if feature.time:
            leaves = _Leaves.of(self.array(feature.time))
            nulls = np.asarray(leaves.values.is_null())
            self.refuse(feature.time, leaves, nulls, "are null", "every event needs its time: correct the source")
            late = epoch_seconds(leaves.values, feature.time) >= np.repeat(request_times, lengths)
            self.count("leaking_history_events", int(late.sum()), feature.name, several)


def _floats(values: pa.Array) -> npt.NDArray[np.float32]:
    """(N,) float32, NaN where null."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    with np.errstate(over="ignore"):
        floats: npt.NDArray[np.float32] = values.to_numpy(zero_copy_only=False).astype(np.float32)
    return floats


def check_requests(requests: pa.Table, schema: Schema) -> dict[str, int]:
    """Checks request rows (with ``num_impressions``); all requests with one key must be in one table.

    Returns counts: ``null_labels``; per history ``empty_histories``, ``leaking_history_events`` (events at or
    after the request's time) and ``null_history_values.<column>`` (null or NaN dense values, which become 0);
    ``null_users``. Where there are several labels or histories, also each by name (``null_labels.<column>``).

    Raises DataError for: null or repeated request keys, null times, requests without impressions, repeated
    impressions of a request (``keys.impression``), lists of unequal length, labels other than 0, 1 and null,
    nulls and NaNs in dense and id features without ``fill`` / ``fill_id``, ids outside a table that does not
    hash, null events.
    """
    check = _Checker(requests, schema)
    require_keys(requests, schema)
    check.unique_requests()
    check.impressions()
    check.unique_impressions()
    time = _Leaves.of(check.array(schema.keys.time))
    advice = "every request needs its time: correct the source"
    check.refuse(schema.keys.time, time, np.asarray(time.values.is_null()), "are null", advice)
    times = epoch_seconds(time.values, schema.keys.time)
    check.labels()
    for feature in schema.features:
        if feature.kind == "dense":
            check.dense(feature)
        elif feature.kind == "ids":
            check.ids(feature)
        else:
            check.sequence(feature, times)
    null_users = requests.column(schema.keys.user).null_count
    if null_users:
        check.counts["null_users"] = null_users
    return check.counts
