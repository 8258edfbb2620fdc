"""Checks of column types against the schema, before any row is read: see ``examine`` for the checks of rows."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.requests.grouping import NUM_IMPRESSIONS
from roo_ray.schema import Schema
from roo_ray.sources.columns import is_list
from roo_ray.sources.times import is_time_type

Test = Callable[[pa.DataType], bool]


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
    if table is not None and schema.tables[table].unbounded:
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
    if keys.impression_time:
        need(keys.impression_time, "keys.impression_time", is_time_type, "timestamps, dates or numbers since 1970")
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
