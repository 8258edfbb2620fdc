"""The reading function: a window of units to packed batches, in Arrow and NumPy, without a loop over rows.

It runs wherever the reader wants: in Ray Data tasks or in a thread of the trainer. A packed batch is an Arrow
table with a row per request whose columns are numbers or lists of numbers, one for each tensor of
``RequestBatch``; ``tensors`` turns their buffers into tensors as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.config import Holdout
from roo_ray.errors import DataError
from roo_ray.ingest.holdout import Side, rows_of_side
from roo_ray.ingest.plan import Window
from roo_ray.lists import as_array, is_list, list_parts, offsets_of, starts_of, value_positions
from roo_ray.requests.grouping import NUM_IMPRESSIONS, describe_request
from roo_ray.requests.hashing import hash_array, hash_rows
from roo_ray.requests.shards import read_row_group
from roo_ray.requests.times import epoch_seconds
from roo_ray.schema import Feature, Schema

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackSettings:
    """What a window's batches depend on beside the window. ``batch_impressions``: the budget of a batch."""

    data_set: str
    schema: Schema
    holdout: Holdout
    side: Side
    batch_impressions: int


def pack_window(window: Window, settings: PackSettings) -> Iterator[pa.Table]:
    """The packed batches of a window, in order: every request of the side in exactly one of them.

    Batches are filled up to ``batch_impressions``; a request with more gets a batch of its own. Raises DataError
    that names file, column and request for what does not fit the schema.
    """
    columns = [*settings.schema.columns, NUM_IMPRESSIONS]
    tables = []
    for unit in window.units:
        table = read_row_group(settings.data_set, unit.path, unit.row_group, columns)
        try:
            tables.append(pack(_side_only(table, settings), settings.schema))
        except DataError as error:
            raise DataError(f"{settings.data_set}/{unit.path}: {error}") from None
    packed = pa.concat_tables(tables).combine_chunks()
    if window.seed is not None:
        order = np.random.default_rng(window.seed).permutation(packed.num_rows)
        packed = packed.take(pa.array(order)).combine_chunks()
    impressions = np.asarray(as_array(packed.column("num_impressions")))
    for start, stop in batch_bounds(impressions, settings.batch_impressions):
        yield packed.slice(start, stop - start)


def _side_only(table: pa.Table, settings: PackSettings) -> pa.Table:
    kept = rows_of_side(hash_rows(table, settings.schema.keys.request), settings.holdout, settings.side)
    return (table if kept is None else table.filter(pa.array(kept))).combine_chunks()


def batch_bounds(impressions: npt.NDArray[np.integer[Any]], budget: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of batches over requests in order: as many requests as fit the budget, at least one."""
    ends = np.cumsum(impressions, dtype=np.int64)
    start, used = 0, 0
    while start < len(ends):
        stop = max(int(np.searchsorted(ends, used + budget, side="right")), start + 1)
        yield start, stop
        start, used = stop, int(ends[stop - 1])


def pack(table: pa.Table, schema: Schema) -> pa.Table:
    """Request rows -> packed rows: ids hashed or checked, histories cut, nulls filled, labels and weights."""
    lengths = np.asarray(as_array(table.column(NUM_IMPRESSIONS))).astype(np.int64)
    columns: dict[str, pa.Array] = {
        "num_impressions": pa.array(lengths),
        "request_key": pa.array(hash_rows(table, schema.keys.request).view(np.int64)),
        "user_key": pa.array(hash_rows(table, [schema.keys.user]).view(np.int64)),
        "request_time": pa.array(epoch_seconds(table.column(schema.keys.time))),
        "impression_index": _lists(lengths, value_positions(np.zeros_like(lengths), lengths)),
    }
    for level in ("request", "impression"):
        per_row = np.ones_like(lengths) if level == "request" else lengths
        dense = [
            _dense(table, schema, feature, column)
            for feature in schema.select(level, "dense")  # type: ignore[arg-type]
            for column in feature.columns
        ]
        columns[f"{level}_dense"] = _interleaved(per_row, dense)
    for feature in schema.features:
        if feature.kind == "sequence":
            columns |= _sequence(table, schema, feature)
        elif feature.kind == "ids":
            columns |= _ids(table, schema, feature, lengths)
    columns |= _labels(table, schema, lengths)
    return pa.table(columns)


def _lists(lengths: Lengths, values: npt.NDArray[Any]) -> pa.Array:
    return pa.ListArray.from_arrays(offsets_of(lengths), pa.array(values))


def _interleaved(per_row: Lengths, columns: list[npt.NDArray[np.float32]]) -> pa.Array:
    """Lists of ``width`` floats for each of a row's values: column j of value i at i * width + j."""
    if not columns:
        return _lists(np.zeros_like(per_row), np.zeros(0, np.float32))
    return _lists(per_row * len(columns), np.stack(columns, axis=1).ravel())


def _refuse(
    table: pa.Table, schema: Schema, column: str, wrong: npt.NDArray[np.bool_], why: Callable[[int], str]
) -> None:
    """Raises DataError for the first wrong value of a (list) column; ``why`` gets its position."""
    if not wrong.any():
        return
    position = int(np.flatnonzero(wrong)[0])
    row = position
    array = as_array(table.column(column))
    if is_list(array.type):
        row = int(np.searchsorted(np.cumsum(list_parts(array)[0]), position, side="right"))
    raise DataError(
        f"column '{column}', request {describe_request(table, schema, row)}: {why(position)} "
        f"({int(wrong.sum())} values are like this)"
    )


def _flat(table: pa.Table, column: str) -> pa.Array:
    array = as_array(table.column(column))
    return list_parts(array)[1] if is_list(array.type) else array


def _floats(array: pa.Array, fill: float) -> npt.NDArray[np.float64]:
    return np.asarray(pc.fill_null(array.cast(pa.float64()), fill))


def _scaled(values: npt.NDArray[np.float64], scale: str) -> npt.NDArray[np.float32]:
    return (np.log1p(np.maximum(values, 0)) if scale == "log1p" else values).astype(np.float32)


def _dense(table: pa.Table, schema: Schema, feature: Feature, column: str) -> npt.NDArray[np.float32]:
    values = _floats(_flat(table, column), np.nan)
    missing = np.isnan(values)
    if feature.fill is None:
        why = f"null or NaN, and feature '{feature.name}' has no fill; set fill in the schema"
        _refuse(table, schema, column, missing, lambda _: why)
    else:
        values = np.where(missing, feature.fill, values)
    return _scaled(values, feature.scale)


def _table_ids(table: pa.Table, schema: Schema, column: str, name: str, ids: pa.Array) -> npt.NDArray[np.int64]:
    """Rows of an embedding table for ids without nulls: hashed, or checked to be inside."""
    spec = schema.tables[name]
    if spec.hash:
        return (hash_array(ids) % np.uint64(spec.rows)).astype(np.int64)
    if pa.types.is_null(ids.type):
        return np.zeros(0, np.int64)
    if not pa.types.is_integer(ids.type):
        raise DataError(f"column '{column}' has ids of type {ids.type} and table '{name}' is not hashed")
    values = np.asarray(ids).astype(np.int64)
    outside = (values < 0) | (values >= spec.rows)
    if outside.any():
        shown = values[np.flatnonzero(outside)[0]]
        message = f"id {shown} is outside table '{name}' of {spec.rows} rows; raise its rows or set hash: true"
        flat = len(_flat(table, column)) == len(values)
        _refuse(table, schema, column, outside if flat else np.ones(1, np.bool_), lambda _: message)
    return values


def _ids(table: pa.Table, schema: Schema, feature: Feature, impressions: Lengths) -> dict[str, pa.Array]:
    column, name = feature.columns[0], feature.table or ""
    values = _flat(table, column) if feature.level == "impression" else as_array(table.column(column))
    per_row = np.ones_like(impressions) if feature.level == "request" else impressions
    key = f"ids:{feature.name}"
    if feature.pooling == "none":
        if values.null_count:
            if feature.fill_id is None:
                why = f"null id, and feature '{feature.name}' has no fill_id; set fill_id in the schema"
                _refuse(table, schema, column, np.asarray(pc.is_null(values)), lambda _: why)
            nulls = np.asarray(pc.is_null(values))
            found = np.full(len(values), feature.fill_id, np.int64)
            found[~nulls] = _table_ids(table, schema, column, name, values.drop_null())
        else:
            found = _table_ids(table, schema, column, name, values)
        return {key: _lists(per_row, found)}
    if is_list(values.type):
        bag_lengths, bag = list_parts(values)
        if bag.null_count:
            raise DataError(f"column '{column}': {bag.null_count} null ids inside lists; take them out")
    else:  # a scalar is a list of one, null the empty list
        bag_lengths, bag = np.asarray(pc.is_valid(values)).astype(np.int64), values.drop_null()
    kept = np.minimum(bag_lengths, feature.max_length) if feature.max_length else bag_lengths
    found = _table_ids(table, schema, column, name, bag)[value_positions(starts_of(bag_lengths), kept)]
    if feature.level == "request":
        return {key: _lists(kept, found)}
    sums = np.concatenate([[0], np.cumsum(kept)])
    ends = np.cumsum(impressions)
    return {
        key: _lists(sums[ends] - sums[ends - impressions], found),
        f"lengths:{feature.name}": _lists(per_row, kept),
    }


def _sequence(table: pa.Table, schema: Schema, feature: Feature) -> dict[str, pa.Array]:
    """A sequence's id lists, dense values and times, cut to the last ``max_length`` events."""
    lengths, _ = list_parts(as_array(table.column(feature.sequence[0].column)))
    kept = np.minimum(lengths, feature.max_length or 0)
    positions = value_positions(starts_of(lengths) + lengths - kept, kept)
    cut = {}
    for column in feature.source_columns:
        found, values = list_parts(as_array(table.column(column)))
        unequal = found != lengths
        if unequal.any():
            row = int(np.flatnonzero(unequal)[0])
            raise DataError(
                f"column '{column}', request {describe_request(table, schema, row)}: the list has {found[row]} "
                f"values and '{feature.sequence[0].column}' has {lengths[row]}; they must be aligned"
            )
        cut[column] = values.take(pa.array(positions))
    packed = {}
    for item in feature.sequence_ids:
        if cut[item.column].null_count:
            raise DataError(f"column '{item.column}' of sequence '{feature.name}' has null ids; fill them")
        ids = _table_ids(table, schema, item.column, item.table or "", cut[item.column])
        packed[f"ids:{feature.name}.{item.column}"] = _lists(kept, ids)
    dense = [_scaled(np.nan_to_num(_floats(cut[c.column], 0.0)), c.scale) for c in feature.sequence_dense]
    packed[f"dense:{feature.name}"] = _interleaved(kept, dense)
    if feature.time:
        packed[f"time:{feature.name}"] = _lists(kept, epoch_seconds(cut[feature.time], feature.time))
    return packed


def _labels(table: pa.Table, schema: Schema, impressions: Lengths) -> dict[str, pa.Array]:
    labels, weights, oracles = [], [], []
    for label in schema.labels:
        values = _flat(table, label.column)
        known = np.asarray(pc.is_valid(values))
        numbers = _floats(values, 0.0)
        why = "a label is NaN; write null for an unknown label"
        _refuse(table, schema, label.column, np.isnan(numbers), lambda _, why=why: why)  # type: ignore[misc]
        labels.append(numbers.astype(np.float32))
        weights.append(known.astype(np.float32))
        oracle = _floats(_flat(table, label.oracle), np.nan) if label.oracle else np.full(len(numbers), np.nan)
        oracles.append(oracle.astype(np.float32))
    parts = {"labels": labels, "weights": weights, "oracle": oracles}
    return {name: _interleaved(impressions, columns) for name, columns in parts.items()}
