"""The checks of rows: every table of a build is examined before any of it is written.

``examine`` makes request rows, checks them, mends what the config says to mend, and returns what it found: it
does not raise where a check fails, so that a report can tell all that is wrong. Findings name the column, the
first offending request, its value, and what to do; what is legal but worth knowing is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.config import Build
from roo_ray.requests.grouping import NUM_IMPRESSIONS, group_with_findings, require_keys, short
from roo_ray.requests.notes import BrokenRows, Leaves, Notes
from roo_ray.requests.report import COUNT, FAIL, Finding, counts_of, require_passed
from roo_ray.schema import Feature, Schema
from roo_ray.schema import Table as IdTable
from roo_ray.sources.base import RowKind
from roo_ray.sources.columns import as_array, list_parts, offsets_of
from roo_ray.sources.compare import Mask, same_as_previous, sort_codes
from roo_ray.sources.times import Seconds, epoch_seconds


def examine(table: pa.Table, schema: Schema, kind: RowKind, build: Build) -> tuple[pa.Table, list[Finding]]:
    """(request rows with ``num_impressions``, findings) of all impressions, or rows that are requests, with some
    request keys: all rows with a key must be in the table. The rows may be written unless ``stops_writing``.
    Raises DataError for null request keys."""
    findings: list[Finding] = []
    if kind == "impressions":
        table, findings = group_with_findings(table, schema, build.on_request_conflict)
    else:
        require_keys(table, schema)
        findings.append(Finding("null request key", _names(schema.keys.request), table.num_rows, "requests", 0, FAIL))
        lengths, _ = list_parts(as_array(table.column(schema.impression_columns[0])))
        table = table.append_column(NUM_IMPRESSIONS, pa.array(lengths.astype(np.int32)))
    requests, found = examine_requests(table, schema, build)
    return requests, [*findings, *found]


def examine_requests(requests: pa.Table, schema: Schema, build: Build) -> tuple[pa.Table, list[Finding]]:
    """(the request rows, repaired by the rules of ``build``; findings) of request rows with ``num_impressions``, of
    which all with one key are in the table."""
    examiner = _Examiner(requests, schema, build)
    examiner.run()
    return examiner.requests, list(examiner.findings.values())


def check_requests(requests: pa.Table, schema: Schema, build: Build | None = None) -> dict[str, int]:
    """Checks request rows (with ``num_impressions``); all requests with one key must be in one table.

    Returns counts: ``null_labels``; per history ``empty_histories``, ``leaking_history_events`` (events at or
    after the request's time) and ``null_history_values.<column>`` (null or NaN dense values, which become 0);
    ``null_users``. Where there are several labels or histories, also each by name (``null_labels.<column>``).

    Raises CheckFailed (a DataError) for: null or repeated request keys, null times, requests without
    impressions, repeated impressions of a request (``keys.impression``), lists of unequal length, labels other
    than 0, 1 and null, nulls and NaNs in dense and id features without ``fill`` / ``fill_id``, ids outside a
    table that does not hash, null events, leaking events, and too many empty histories.
    """
    require_keys(requests, schema)
    _, findings = examine_requests(requests, schema, build or Build())
    require_passed(findings)
    return counts_of(findings)


def _names(columns: Sequence[str]) -> str:
    return ", ".join(columns)


def _floats(values: pa.Array) -> npt.NDArray[np.float32]:
    """(N,) float32, NaN where null."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    with np.errstate(over="ignore"):
        floats: npt.NDArray[np.float32] = values.to_numpy(zero_copy_only=False).astype(np.float32)
    return floats


def keep_values(array: pa.Array, keep: Mask) -> pa.Array:
    """A list array with only those of its values (all lists' together) that are to be kept; nulls stay null."""
    lengths, values = list_parts(array)
    row = np.repeat(np.arange(len(lengths)), lengths)
    kept = np.bincount(row[keep], minlength=len(lengths)).astype(np.int64)
    mask = array.is_null() if array.null_count else None
    return pa.ListArray.from_arrays(offsets_of(kept), values.filter(pa.array(keep)), type=array.type, mask=mask)


class _Examiner(Notes):
    def __init__(self, requests: pa.Table, schema: Schema, build: Build) -> None:
        super().__init__(requests, schema)
        self.build = build

    def run(self) -> None:
        """All checks, or those up to one after which no other makes sense."""
        try:
            self.unique_requests()
            self.impressions()
            self.unique_impressions()
            times = self.times()
            self.labels()
            for feature in self.schema.features:
                if feature.kind == "dense":
                    self.dense(feature)
                elif feature.kind == "ids":
                    self.ids(feature)
                else:
                    self.sequence(feature, times)
            users = self.array(self.schema.keys.user)
            nulls = np.asarray(users.is_null())
            counts_as = ["null_users"] if nulls.any() else []
            self.rows("null user", self.schema.keys.user, nulls, "requests", COUNT, counts_as=counts_as)
        except BrokenRows:
            return

    # ---- the checks --------------------------------------------------------------------------------

    def unique_requests(self) -> None:
        keys = self.schema.keys.request
        codes = [sort_codes(self.requests.column(name)) for name in keys]
        order = np.lexsort(codes[::-1])
        repeated = np.zeros(self.requests.num_rows, np.bool_)
        repeated[order[same_as_previous(codes, order)]] = True
        problem = (
            "{found} requests repeat the key of another request (first: {first}); remove the duplicates from the "
            "source, or add columns to keys.request"
        )
        self.rows("repeated request key", _names(keys), repeated, "requests", FAIL, problem)

    def impressions(self) -> None:
        names = self.schema.impression_columns
        for name in names:
            nulls = np.asarray(self.array(name).is_null())
            problem = f"column '{name}': the list of impressions is null in {{first}}"
            self.rows("null list of impressions", name, nulls, "requests", FAIL, problem, needed=True)
        lengths = self.aligned(names, "impressions", "impression-level columns")
        if lengths is None:
            raise BrokenRows
        declared = np.asarray(self.requests.column(NUM_IMPRESSIONS)).astype(np.int64)
        wrong = lengths != declared
        row = int(np.flatnonzero(wrong)[0]) if wrong.any() else 0
        problem = (
            f"'{NUM_IMPRESSIONS}' is {declared[row]} and the lists have {lengths[row]} values in {{first}}; correct "
            "the source"
            if wrong.any()
            else ""
        )
        self.rows("wrong num_impressions", NUM_IMPRESSIONS, wrong, "requests", FAIL, problem, needed=True)
        problem = "{found} requests have no impressions (first: {first}); remove them from the source"
        self.rows("no impressions", "impressions", lengths == 0, "requests", FAIL, problem, needed=True)

    def unique_impressions(self) -> None:
        keys = [n for n in self.schema.keys.impression if n not in self.schema.keys.request]
        if not keys:
            return
        lengths = list_parts(self.array(keys[0]))[0]
        row = np.repeat(np.arange(len(lengths)), lengths)  # (impressions,)
        values = [list_parts(self.array(name))[1] for name in keys]
        codes = [row, *(sort_codes(array) for array in values)]
        order = np.lexsort(codes[::-1])
        repeated = order[same_as_previous(codes, order)]
        rule = self.build.on_duplicate_impression
        first = problem = ""
        if len(repeated):
            at = int(repeated.min())
            named = ", ".join(f"{n}={short(a[at].as_py())}" for n, a in zip(keys, values, strict=True))
            first = f"{named} in {self.where(int(row[at]))}"
            problem = (
                f"{{found}} impressions repeat the key of another one of their request (first: {first}); remove the "
                "duplicates from the source, correct keys.impression, or set build.on_duplicate_impression: drop"
            )
        counts_as = ("dropped_impressions",) if rule == "drop" else ()
        self.add(
            Finding(
                "duplicate impression",
                _names(keys),
                len(row),
                "impressions",
                len(repeated),
                rule,
                first,
                problem,
                counts_as=counts_as,
            )
        )
        if rule == "drop" and len(repeated):
            keep = np.ones(len(row), np.bool_)
            keep[repeated] = False
            for name in self.schema.impression_columns:
                self.replace(name, keep_values(self.array(name), keep))
            left = np.bincount(row[keep], minlength=len(lengths)).astype(np.int32)
            self.replace(NUM_IMPRESSIONS, pa.array(left))

    def replace(self, name: str, array: pa.Array) -> None:
        self.requests = self.requests.set_column(self.requests.column_names.index(name), name, array)

    def times(self) -> Seconds:
        name = self.schema.keys.time
        leaves = Leaves.of(self.array(name))
        nulls = np.asarray(leaves.values.is_null())
        advice = "every request needs its time: correct the source"
        self.values("null request time", name, leaves, nulls, FAIL, "are null", advice, needed=True)
        return epoch_seconds(leaves.values, name)

    def labels(self) -> None:
        several = len(self.schema.labels) > 1
        for label in self.schema.labels:
            name = label.column
            leaves = Leaves.of(self.array(name))
            known = np.asarray(leaves.values.is_valid())
            values = _floats(leaves.values)
            advice = "a label is 0 or 1, or null where it is unknown: correct the source"
            nan = known & np.isnan(values)
            self.values("NaN label", name, leaves, nan, FAIL, "are NaN", advice)
            wrong = known & ~nan & (values != 0) & (values != 1)
            self.values("label not 0 or 1", name, leaves, wrong, FAIL, "are neither 0 nor 1", advice)
            counts_as = ["null_labels", *([f"null_labels.{name}"] if several else [])]
            self.values("null label", name, leaves, ~known, COUNT, "are null", "", counts_as=counts_as)

    def dense(self, feature: Feature) -> None:
        for name in feature.columns:
            leaves = Leaves.of(self.array(name))
            values = _floats(leaves.values)
            rule = FAIL if feature.fill is None else "fill"
            advice = f"give feature '{feature.name}' a fill, or remove the nulls from the source"
            self.values("null or NaN value", name, leaves, np.isnan(values), rule, "are null or NaN", advice)
            what = "are infinite as float32"
            self.values("infinite value", name, leaves, np.isinf(values), FAIL, what, "correct the source")

    def ids(self, feature: Feature) -> None:
        name, table = feature.columns[0], self.schema.tables[str(feature.table)]
        leaves = Leaves.of(self.array(name))
        single = feature.pooling == "none"
        scalar = len(leaves.levels) == (0 if feature.level == "request" else 1)
        fails = (single and feature.fill_id is None) or not scalar
        advice = f"give feature '{feature.name}' a fill_id, or correct the source" if single else "remove them"
        nulls = np.asarray(leaves.values.is_null())
        self.values("null id", name, leaves, nulls, FAIL if fails else "fill", "are null", advice)
        self.in_table(name, leaves, table, str(feature.table))

    def in_table(self, name: str, leaves: Leaves, table: IdTable, table_name: str) -> None:
        values = leaves.values
        if table.unbounded or pa.types.is_null(values.type) or len(values) == 0:
            return
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.uint8())
        outside = pc.greater_equal(values, table.rows)
        if not pa.types.is_unsigned_integer(values.type):
            outside = pc.or_(outside, pc.less(values, 0))
        self.values(
            "id outside its table",
            name,
            leaves,
            np.asarray(pc.fill_null(outside, False)),
            FAIL,
            f"are outside table '{table_name}', whose ids are 0 .. {table.rows - 1}",
            "raise the table's rows, or set hash: true",
            subject=f"{name}: {table_name}",
        )

    # ---- histories ---------------------------------------------------------------------------------

    def sequence(self, feature: Feature, request_times: Seconds) -> None:
        columns = feature.source_columns
        lengths = self.aligned(columns, feature.name, f"the columns of sequence '{feature.name}'")
        if lengths is None:
            return
        if feature.time and self.no_nulls(feature.time, "every event needs its time: correct the source"):
            lengths = self.leaks(feature, feature.time, lengths, request_times)
        limit = self.build.max_empty_history_share
        problem = (
            f"sequence '{feature.name}': {{found}} of {{looked_at}} histories are empty, a share above "
            f"build.max_empty_history_share {limit:g}; check that the histories belong to these users and times (user "
            "ids of one kind in all files), or raise the share to 1"
        )
        counts_as = self.count_names("empty_histories", feature)
        rule = "fail above a share"
        self.rows(
            "empty history", feature.name, lengths == 0, "requests", rule, problem, limit=limit, counts_as=counts_as
        )
        for column in feature.sequence:
            if column.table:
                leaves = Leaves.of(self.array(column.column))
                self.no_nulls(column.column, "remove these events from the source")
                self.in_table(column.column, leaves, self.schema.tables[column.table], column.table)
            else:
                leaves = Leaves.of(self.array(column.column))
                values = _floats(leaves.values)
                what = "are infinite as float32"
                wrong = np.isinf(values)
                self.values("infinite value", column.column, leaves, wrong, FAIL, what, "correct the source")
                counts = ("null_history_values", f"null_history_values.{column.column}")
                wrong = np.isnan(values)
                self.values("null history value", column.column, leaves, wrong, COUNT, "are null", "", counts_as=counts)

    def count_names(self, name: str, feature: Feature) -> list[str]:
        return [name, *([f"{name}.{feature.name}"] if len(self.schema.sequences) > 1 else [])]

    def no_nulls(self, name: str, advice: str) -> bool:
        leaves = Leaves.of(self.array(name))
        nulls = np.asarray(leaves.values.is_null())
        return self.values("null history event", name, leaves, nulls, FAIL, "are null", advice)

    def leaks(
        self, feature: Feature, time: str, lengths: npt.NDArray[np.int64], request_times: Seconds
    ) -> npt.NDArray[np.int64]:
        """Events at or after their request's time; returns the lengths that are left."""
        leaves = Leaves.of(self.array(time))
        late = epoch_seconds(leaves.values, time) >= np.repeat(request_times, lengths)
        rule = self.build.on_leaking_history
        advice = (
            "they would tell the model what followed: cut the history at the request's time in the source, or set "
            "build.on_leaking_history to drop or count"
        )
        names = self.count_names("leaking_history_events", feature)
        names += ["dropped_history_events"] if rule == "drop" and late.any() else []
        self.values(
            "history at or after request",
            time,
            leaves,
            late,
            rule,
            f"of sequence '{feature.name}' are at or after their request's time",
            advice,
            subject=feature.name,
            counts_as=names,
        )
        if rule != "drop" or not late.any():
            return lengths
        sharing = [name for other in self.schema.sequences if other.time == time for name in other.source_columns]
        for name in dict.fromkeys(sharing):
            if np.array_equal(list_parts(self.array(name))[0], lengths):  # else its own check fails
                self.replace(name, keep_values(self.array(name), ~late))
        return list_parts(self.array(time))[0]
