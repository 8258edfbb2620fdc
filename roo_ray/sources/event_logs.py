"""Source kind ``event_logs``: request log, impression log and event logs in Parquet, as a serving system writes
them. They meet by the request key; ``attribution`` joins what meets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import Schema
from roo_ray.source_config import EventFiles, EventLogsSource, LogFiles
from roo_ray.sources.attribution import (
    EVENT_TIME,
    EVENT_VALUE,
    IMPRESSION_TIME,
    IMPRESSIONS,
    REQUESTS,
    JoinRules,
    join_logs,
)
from roo_ray.sources.base import (
    Assembled,
    Log,
    ParquetInput,
    ReadUnit,
    codecs,
    common_schema,
    make_units,
    read_footers,
    read_group,
    stream_unit,
)
from roo_ray.sources.times import epoch_micros, is_time_type

INSTANT = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class LogColumns:
    """One log's columns: ``names`` here -> name in the files; ``types`` here; ``never_null``: keys and times."""

    names: dict[str, str]
    types: pa.Schema
    never_null: tuple[str, ...]


@dataclass(frozen=True)
class EventLogs:
    """Logs whose footers were read and agree; see ``open_event_logs``."""

    rules: JoinRules
    columns: dict[str, LogColumns]
    all_units: list[ReadUnit]
    codec: str

    @property
    def row_schema(self) -> pa.Schema:
        """Request rows: impression-level columns and labels are lists."""
        return self.rules.row_schema

    @property
    def logs(self) -> dict[str, Log]:
        """``requests``, ``impressions``, and the event logs by name; they meet by the request key."""
        return {name: Log(log.types, self.rules.request_key) for name, log in self.columns.items()}

    def units(self) -> list[ReadUnit]:
        """The units of all logs."""
        return self.all_units

    def disk_bytes(self) -> None:
        """None: no log is the impression-level table."""
        return

    def counts(self) -> dict[str, int]:
        """``observed_until_seconds.<label>``: up to when its events are known, in whole seconds since 1970; what the
        join counts comes from ``assemble``."""
        until = self.rules.observed_until
        return {f"observed_until_seconds.{label}": micros // 10**6 for label, micros in until.items()}

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's rows in tables of bounded size. Raises DataError that names the file: also for null keys and
        times, and keys that do not fit the other logs' type."""
        log = self.columns[unit.log]
        for batch in stream_unit(unit, list(dict.fromkeys(log.names.values()))):
            columns = []
            for field in log.types:
                column = batch.column(log.names[field.name])
                if field.name in log.never_null and column.null_count:
                    raise DataError(
                        f"{unit.path}: column '{log.names[field.name]}' of the log '{unit.log}' is null in "
                        f"{column.null_count} rows, and keys and times must be known; remove these rows from the log"
                    )
                columns.append(_cast(column, field, unit))
            yield pa.table(columns, schema=log.types)

    def assemble(self, parts: dict[str, pa.Table]) -> Assembled:
        """Joins one bucket; see ``attribution.join_logs``."""
        return join_logs(parts, self.rules)


def _cast(column: pa.Array, field: pa.Field, unit: ReadUnit) -> pa.Array:
    if field.name in (EVENT_TIME, IMPRESSION_TIME):
        return pa.array(epoch_micros(column, field.name)).cast(INSTANT)
    try:
        return column if column.type == field.type else column.cast(field.type)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{unit.path}: column '{field.name}' of the log '{unit.log}' does not fit type {field.type}, which it has "
            f"in the log that names it first ({error}); write all logs with one type"
        ) from None


# ---- opening -------------------------------------------------------------------------------------


def open_event_logs(source: EventLogsSource, schema: Schema) -> EventLogs:
    """Reads the footers of all logs, and the latest event times where ``observed_until`` is not given.

    Raises ConfigError where labels or columns of the source do not fit the schema, DataError where files are
    missing, broken or unlike, or key columns have unlike types in two logs.
    """
    request_key = tuple(schema.keys.request)
    impression_key = tuple(name for name in schema.keys.impression if name not in request_key)
    made = _check_config(source, schema, impression_key)
    shown = [name for name in schema.impression_columns if name not in made]
    files: dict[str, LogFiles] = {REQUESTS: source.requests, IMPRESSIONS: source.impressions, **source.events}
    wanted: dict[str, dict[str, str]] = {
        REQUESTS: _mapped(REQUESTS, source.requests, schema.request_columns),
        IMPRESSIONS: _mapped(IMPRESSIONS, source.impressions, [*request_key, *shown]),
    }
    if source.impressions.time is not None:
        wanted[IMPRESSIONS][IMPRESSION_TIME] = source.impressions.time
    for name, events in source.events.items():
        wanted[name] = _mapped(name, events, [*request_key, *impression_key]) | {EVENT_TIME: events.time}
        if events.value is not None:
            wanted[name][EVENT_VALUE] = events.value

    inputs = {name: read_footers(log.path) for name, log in files.items()}
    columns: dict[str, LogColumns] = {}
    for name, names in wanted.items():
        found = common_schema(inputs[name], list(dict.fromkeys(names.values())))
        types = {here: found.field(there).type for here, there in names.items()}
        for key in (*request_key, *impression_key):
            owner = REQUESTS if key in request_key else IMPRESSIONS
            if key in types and name != owner:
                types[key] = _key_type(key, columns[owner].types.field(key).type, owner, types[key], name)
        columns[name] = _log_columns(name, names, types, (*request_key, *impression_key))

    units: list[ReadUnit] = []
    for name, log in columns.items():
        of_log = make_units(inputs[name], set(log.names.values()), "requests")
        if not of_log and name in (REQUESTS, IMPRESSIONS):
            raise DataError(f"{', '.join(files[name].path)}: the log '{name}' has no rows")
        units += [replace(unit, index=len(units) + n, log=name) for n, unit in enumerate(of_log)]
    rules = JoinRules(
        request_key=request_key,
        impression_key=impression_key,
        order=tuple(dict.fromkeys([*([schema.keys.position] if schema.keys.position else []), *impression_key])),
        request_time=schema.keys.time,
        labels=source.labels,
        observed_until=_observed_until(source, inputs),
        open_is_null=source.open_windows == "null",
        row_schema=_row_schema(schema, columns, made),
    )
    return EventLogs(rules, columns, units, codecs([item for found in inputs.values() for item in found]))


def _check_config(source: EventLogsSource, schema: Schema, impression_key: Sequence[str]) -> dict[str, pa.DataType]:
    """The columns that the join makes, with their types."""
    if not impression_key:
        raise ConfigError(
            f"schema '{schema.name}': separate logs are joined by the impression's key; name it in keys.impression"
        )
    known = {label.column for label in schema.labels}
    unknown = [name for name in source.labels if name not in known]
    if unknown:
        raise ConfigError(
            f"source.labels: '{unknown[0]}' is no label column of schema '{schema.name}' ({', '.join(sorted(known))})"
        )
    made: dict[str, pa.DataType] = dict.fromkeys(source.labels, pa.int8())
    for rule in source.labels.values():
        if rule.value_column is not None:
            if rule.value_column not in schema.carry.impression or rule.value_column in made:
                raise ConfigError(
                    f"source.labels: value_column '{rule.value_column}' must stand in carry.impression of schema "
                    f"'{schema.name}' (it is an outcome), and be made by one label only"
                )
            made[rule.value_column] = pa.float64()
    for name in (EVENT_TIME, EVENT_VALUE, IMPRESSION_TIME):
        if name in schema.keys.request or name in schema.impression_columns:
            raise ConfigError(
                f"schema '{schema.name}': column '{name}' bears a name that the join uses itself; give it another "
                "one, and map it with 'columns'"
            )
    return made


def _mapped(name: str, log: LogFiles, columns: Sequence[str]) -> dict[str, str]:
    unknown = [column for column in log.columns if column not in columns]
    if unknown:
        where = f"source.{name}" if name in (REQUESTS, IMPRESSIONS) else f"source.events.{name}"
        raise ConfigError(
            f"{where}.columns: '{unknown[0]}' is not read from this log, which gives {', '.join(columns)}"
        )
    return {column: log.columns.get(column, column) for column in columns}


def _key_type(key: str, first: pa.DataType, owner: str, kind: pa.DataType, name: str) -> pa.DataType:
    tests = (pa.types.is_integer, pa.types.is_string, pa.types.is_timestamp)
    if first == kind or any(test(first) and test(kind) for test in tests):
        return first
    raise DataError(
        f"key column '{key}' has type {first} in the log '{owner}' and {kind} in the log '{name}', which would never "
        "match; write all logs with one type"
    )


def _log_columns(name: str, names: dict[str, str], types: dict[str, pa.DataType], keys: Sequence[str]) -> LogColumns:
    for time in (EVENT_TIME, IMPRESSION_TIME):
        if time in types:
            if not is_time_type(types[time]):
                raise DataError(
                    f"column '{names[time]}' of the log '{name}' has type {types[time]}, which is no time; use a "
                    "timestamp, or a number of seconds, milliseconds, microseconds or nanoseconds since 1970"
                )
            types[time] = INSTANT
    if EVENT_VALUE in types:
        kind = types[EVENT_VALUE]
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(f"column '{names[EVENT_VALUE]}' of the log '{name}' has type {kind}; a value is a number")
        types[EVENT_VALUE] = pa.float64()
    needed = [here for here in types if here in keys or here in (EVENT_TIME, IMPRESSION_TIME)]
    return LogColumns(names, pa.schema([pa.field(here, types[here]) for here in names]), tuple(needed))


def _row_schema(schema: Schema, columns: dict[str, LogColumns], made: dict[str, pa.DataType]) -> pa.Schema:
    fields = [columns[REQUESTS].types.field(name) for name in schema.request_columns]
    for name in schema.impression_columns:
        kind = made[name] if name in made else columns[IMPRESSIONS].types.field(name).type
        fields.append(pa.field(name, pa.list_(kind)))
    return pa.schema(fields)


# ---- until when events are known -----------------------------------------------------------------


def _observed_until(source: EventLogsSource, inputs: dict[str, list[ParquetInput]]) -> dict[str, int]:
    """Label -> microseconds: the configured time, or the latest one in the label's event log."""
    if source.observed_until is not None:
        (fixed,) = epoch_micros(pa.array([source.observed_until], pa.timestamp("us")))
        return dict.fromkeys(source.labels, int(fixed))
    latest = {name: _latest(name, log, inputs[name]) for name, log in source.events.items()}
    return {label: latest[rule.event] for label, rule in source.labels.items()}


def _latest(name: str, log: EventFiles, inputs: Sequence[ParquetInput]) -> int:
    found = []
    for item in inputs:
        paths = [item.metadata.schema.column(i).path for i in range(item.metadata.num_columns)]
        leaf, kind = paths.index(log.time), item.schema.field(log.time).type
        for group in range(item.metadata.num_row_groups):
            times = _latest_in_footer(item.metadata.row_group(group).column(leaf).statistics, kind)
            if times is None:
                times = read_group(item, group, [log.time]).column(0).drop_null()
            if len(times):
                found.append(int(np.max(epoch_micros(times, log.time))))
    if not found:
        raise ConfigError(
            f"the event log '{name}' ({', '.join(log.path)}) has no rows, so it does not tell up to when events are "
            "known; set source.observed_until"
        )
    return max(found)


def _latest_in_footer(statistics: Any, kind: pa.DataType) -> pa.Array | None:
    """The largest value of a row group as an array of one; None where the footer does not tell."""
    if statistics is None or not statistics.has_min_max:
        return None
    try:
        return pa.array([statistics.max], kind)
    except (ValueError, OverflowError, TypeError, pa.ArrowException):
        return None
