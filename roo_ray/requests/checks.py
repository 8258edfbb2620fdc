"""Checks of request rows against the schema, before anything is published; they count and they refuse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError
from roo_ray.lists import as_array, is_list, list_parts
from roo_ray.requests.grouping import NUM_IMPRESSIONS, describe_request
from roo_ray.requests.times import epoch_seconds, is_time_type
from roo_ray.schema import Feature, Schema


def check_requests(table: pa.Table, schema: Schema) -> dict[str, int]:
    """Checks request rows; returns counts: ``null_labels``, ``empty_histories`` (requests whose sequences are all
    empty), ``history_events``, ``leaking_history_events`` (at or after their request's time; the model never
    sees them).

    Raises DataError that names column, first offending request, value and what to do: null keys, unequal list
    lengths, requests without impressions, labels other than 0, 1 and null (NaN included), ids outside their
    table, nulls where the schema gives no fill, columns of the wrong type.
    """
    counts = {"null_labels": 0, "empty_histories": 0, "history_events": 0, "leaking_history_events": 0}
    _check_keys(table, schema)
    lengths = np.asarray(as_array(table.column(NUM_IMPRESSIONS))).astype(np.int64)
    _refuse(table, schema, lengths == 0, NUM_IMPRESSIONS, "a request has no impressions; leave it out of the source")
    _check_list_lengths(table, schema, lengths)
    for label in schema.labels:
        counts["null_labels"] += _check_label(table, schema, label.column)
    for feature in schema.features:
        if feature.kind == "dense":
            _check_dense(table, schema, feature)
        elif feature.kind == "ids":
            _check_ids(table, schema, feature, feature.columns[0], feature.table or "")
        else:
            for column in feature.sequence_ids:
                _check_ids(table, schema, feature, column.column, column.table or "")
            counts["leaking_history_events"] += _leaking_events(table, schema, feature)
    if schema.sequences:
        events = sum(list_parts(as_array(table.column(f.sequence[0].column)))[0] for f in schema.sequences)
        counts["empty_histories"] = int((np.asarray(events) == 0).sum())
        counts["history_events"] = int(np.asarray(events).sum())
    return counts


def _refuse(table: pa.Table, schema: Schema, wrong: npt.NDArray[np.bool_], column: str, why: str) -> None:
    """Raises DataError for the first request where ``wrong`` (requests,) holds."""
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"column '{column}', request {describe_request(table, schema, row)}: {why} "
            f"({int(wrong.sum())} requests are like this)"
        )


def _check_keys(table: pa.Table, schema: Schema) -> None:
    for column in [*schema.keys.request, schema.keys.user, schema.keys.time]:
        nulls = np.asarray(pc.is_null(as_array(table.column(column)), nan_is_null=True))
        _refuse(table, schema, nulls, column, "a key is null; every request needs its key, user and time")
    kind = table.column(schema.keys.time).type
    if not is_time_type(kind):
        raise DataError(
            f"column '{schema.keys.time}' (keys.time) has type {kind}; use timestamps, or numbers since the epoch"
        )


def _check_list_lengths(table: pa.Table, schema: Schema, lengths: npt.NDArray[np.int64]) -> None:
    for column in schema.impression_columns:
        array = as_array(table.column(column))
        if not is_list(array.type):
            raise DataError(f"column '{column}' is impression-level and has type {array.type}; expected lists")
        found = list_parts(array)[0]
        _refuse(
            table,
            schema,
            found != lengths,
            column,
            "the list has another length than the request has impressions",
        )
    for feature in schema.sequences:
        first = feature.source_columns[0]
        for column in feature.source_columns:
            array = as_array(table.column(column))
            if not is_list(array.type):
                raise DataError(f"column '{column}' of sequence '{feature.name}' has type {array.type}, not a list")
            same = list_parts(array)[0] == list_parts(as_array(table.column(first)))[0]
            why = f"the list has another length than '{first}' of the same sequence '{feature.name}'"
            _refuse(table, schema, ~same, column, why)


def _request_of_value(table: pa.Table, column: str, wrong: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(requests,) whether a request has a wrong value; ``wrong`` is per value of the (list) column."""
    array = as_array(table.column(column))
    if not is_list(array.type):
        return wrong
    lengths = list_parts(array)[0]
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(rows[wrong], minlength=len(lengths)) > 0


def _values(table: pa.Table, column: str) -> pa.Array:
    """The column's values, lists flattened."""
    array = as_array(table.column(column))
    return array.flatten() if is_list(array.type) else array


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _check_label(table: pa.Table, schema: Schema, column: str) -> int:
    values = _values(table, column)
    if not (_is_number(values.type) or pa.types.is_null(values.type)):
        raise DataError(f"label column '{column}' has type {values.type}; expected 0, 1 or null")
    numbers = np.asarray(values.cast(pa.float64()).fill_null(0.0))
    nan = np.isnan(numbers)
    why = "a label is NaN; write null for an unknown label"
    _refuse(table, schema, _request_of_value(table, column, nan), column, why)
    wrong = (numbers != 0) & (numbers != 1)
    if wrong.any():
        why = f"a label is {numbers[np.flatnonzero(wrong)[0]]:g}; labels are 0, 1 or null"
        _refuse(table, schema, _request_of_value(table, column, wrong), column, why)
    return int(values.null_count)


def _check_dense(table: pa.Table, schema: Schema, feature: Feature) -> None:
    for column in feature.columns:
        values = _values(table, column)
        if is_list(values.type) or not (_is_number(values.type) or pa.types.is_null(values.type)):
            raise DataError(f"column '{column}' of dense feature '{feature.name}' has type {values.type}, not a number")
        if feature.fill is None:
            nulls = np.asarray(pc.is_null(values, nan_is_null=True))
            why = f"null or NaN, and feature '{feature.name}' has no fill; set fill: 0 (or what it means) in the schema"
            _refuse(table, schema, _request_of_value(table, column, nulls), column, why)


def _check_ids(table: pa.Table, schema: Schema, feature: Feature, column: str, name: str) -> None:
    values = _values(table, column)
    if is_list(values.type):
        values = values.flatten()  # impression-level bags
    elif feature.kind == "ids" and feature.pooling == "none" and feature.fill_id is None:
        nulls = np.asarray(pc.is_null(values))
        why = f"null id, and feature '{feature.name}' has no fill_id; set fill_id in the schema"
        _refuse(table, schema, _request_of_value(table, column, nulls), column, why)
    if feature.kind == "sequence" and values.null_count:
        raise DataError(f"column '{column}' of sequence '{feature.name}' has {values.null_count} null ids; fill them")
    spec = schema.tables[name]
    if spec.hash or pa.types.is_null(values.type):
        return
    if not pa.types.is_integer(values.type):
        raise DataError(
            f"column '{column}' has ids of type {values.type}, and table '{name}' is not hashed; use integers "
            f"0 .. {spec.rows - 1}, or set hash: true for the table"
        )
    bounds = pc.min_max(values).as_py()
    for value in (bounds["min"], bounds["max"]):
        if value is not None and not 0 <= value < spec.rows:
            where = _where_id(table, schema, column, value)
            raise DataError(
                f"column '{column}', {where}: id {value} is outside table '{name}' of {spec.rows} rows; raise the "
                "table's rows or set hash: true for it"
            )


def _where_id(table: pa.Table, schema: Schema, column: str, value: int) -> str:
    values = _values(table, column)
    if is_list(values.type):
        return "in a list of ids"
    wrong = np.asarray(pc.fill_null(pc.equal(values, value), False))
    rows = np.flatnonzero(_request_of_value(table, column, wrong))
    return f"request {describe_request(table, schema, int(rows[0]))}"


def _leaking_events(table: pa.Table, schema: Schema, feature: Feature) -> int:
    if not feature.time:
        return 0
    lengths, times = list_parts(as_array(table.column(feature.time)))
    asked = np.repeat(epoch_seconds(table.column(schema.keys.time)), lengths)
    return int((epoch_seconds(times, feature.time) >= asked).sum())
