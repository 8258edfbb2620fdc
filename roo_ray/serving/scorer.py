"""Scores requests with an exported model: one process, unsharded tables, no Ray, no process group.

An exported model is a folder: ``weights.pt`` (tensors alone, read by torch's restricted loader), ``model.json`` (the
model's config and tasks), ``schema.yaml`` and ``inputs.arrow`` (the Arrow types of the columns it reads).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from roo_ray.config import Holdout, Model
from roo_ray.errors import DataError
from roo_ray.ingest.lists import split_lists
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Window
from roo_ray.ingest.read import NUM_IMPRESSIONS
from roo_ray.ingest.rows import ReadRequests
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.ingest.units import UnitRef
from roo_ray.models.objective import logits_of, retrieval_towers
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import Feature, Schema, parse_schema

WEIGHTS, MODEL, SCHEMA, INPUTS = "weights.pt", "model.json", "schema.yaml", "inputs.arrow"
BATCH_IMPRESSIONS = 8192
EXACT = 2.0**53  # from here on a double no longer holds every integer
Scores = npt.NDArray[np.float32]


def input_columns(schema: Schema) -> list[str]:
    """The columns that a request must bring: features, and its time where a sequence's ages are counted from it."""
    names = [column for feature in schema.features for column in feature.source_columns]
    timed = any(feature.time for feature in schema.sequences)
    return list(dict.fromkeys([*names, *([schema.keys.time] if timed else [])]))


def unread_columns(schema: Schema, settings: Model) -> set[str]:
    """The input columns that change no score: that of a position, which is fixed in serving, where no other feature
    reads it and candidates can be counted by another."""
    name = settings.position_feature
    read = [column for feature in schema.features for column in feature.source_columns]
    others = {c for f in schema.features if f.level == "impression" for c in f.source_columns} - {name}
    return {name} if name is not None and read.count(name) == 1 and others else set()


def optional_columns(schema: Schema, settings: Model) -> set[str]:
    """The input columns that a request may leave out: those in which the schema has a meaning for null (a fill, an
    empty bag, no history), and ``unread_columns``. A column is none of them where another feature that reads it needs
    a value."""

    def takes_null(feature: Feature) -> bool:
        filled = feature.fill is not None or feature.fill_id is not None
        return filled or feature.kind == "sequence" or feature.pooling != "none"

    needed = {c for feature in schema.features if not takes_null(feature) for c in feature.source_columns}
    every = {c for feature in schema.features for c in feature.source_columns}
    return (every - needed) | unread_columns(schema, settings)


def columns_with_null_elements(schema: Schema, settings: Model) -> set[str]:
    """Those of them that are lists in which single elements may be null: candidates' values, values of events."""
    of_candidates = {c for f in schema.features if f.level == "impression" for c in f.source_columns}
    of_events = {event.column for feature in schema.sequences for event in feature.sequence_dense}
    return optional_columns(schema, settings) & (of_candidates | of_events)


@dataclass(frozen=True)
class ScoredRequests:
    """``num_impressions`` (R,) int64, and ``logits`` (N, K) float32 of the impressions in the order given."""

    num_impressions: npt.NDArray[np.int64]
    logits: Scores


class Scorer:
    """A model ready to score. ``tasks``: the names of its K outputs. ``inputs``: the Arrow types of its columns.
    ``unread``, ``optional``: those that change no score, that may be missing. ``probabilities``: outputs are logits of
    probabilities (a ranking model), not similarities (retrieval)."""

    def __init__(self, schema: Schema, settings: Model, inputs: pa.Schema, weights: Mapping[str, torch.Tensor]) -> None:
        self.schema, self.inputs = schema, inputs
        self.tasks = [label.name for label in schema.labels]
        self.unread, self.optional = unread_columns(schema, settings), optional_columns(schema, settings)
        self.model = RankingModel(schema, settings)
        self.model.load_state_dict(dict(weights))
        self.model.eval()
        self.probabilities = retrieval_towers(self.model) is None

    @staticmethod
    def load(folder: str | Path) -> Scorer:
        """Reads an exported model. Raises DataError where it is not whole."""
        folder = Path(folder)
        missing = [name for name in (WEIGHTS, MODEL, SCHEMA, INPUTS) if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} is no exported model: {missing[0]} is missing")
        settings = Model.model_validate(json.loads((folder / MODEL).read_text())["model"])
        schema = parse_schema((folder / SCHEMA).read_text(), str(folder / SCHEMA))
        inputs = pa.ipc.read_schema(pa.BufferReader((folder / INPUTS).read_bytes()))
        weights = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        return Scorer(schema, settings, inputs, weights)

    def score(self, requests: pa.Table, where: str = "the input") -> ScoredRequests:
        """Logits of a table with a row per request: the user side runs once per request.

        Keys and labels may be missing; a request without candidates has no logits. Raises DataError, naming column and
        request, where a value does not fit.
        """
        table = self._complete(requests, where)
        if table.num_rows:
            every = np.asarray(_array(table, NUM_IMPRESSIONS)).astype(np.int64)
            if not every.all():
                self._check_empty(table, every == 0, where)
                rest = self.score(requests.filter(pa.array(every > 0)), where)
                return ScoredRequests(every, rest.logits)
        everything = Holdout(by="all")
        settings = PackSettings(where, self.schema, everything, "evaluation", BATCH_IMPRESSIONS)
        unit = UnitRef("(given requests)", 0, table.num_rows)
        window = Window(0, 0, 0, (unit,), None)
        if not table.num_rows:
            return ScoredRequests(np.zeros(0, np.int64), np.zeros((0, len(self.tasks)), np.float32))
        packed = PackedBatches(pack_window(settings, window, ReadRequests(table, (unit,), 0)), self.schema)
        parts, counts = [], []
        with torch.no_grad():
            for row in range(packed.rows):
                batch = packed.batch(row)
                parts.append(logits_of(self.model, self.model(batch), len(self.tasks)).numpy())
                counts.append(batch.num_impressions.numpy())
        return ScoredRequests(np.concatenate(counts), np.concatenate(parts))

    def _complete(self, requests: pa.Table, where: str) -> pa.Table:
        """With stand-ins for labels and unread columns, and for keys where they are not given."""
        schema = self.schema
        needed = [name for name in input_columns(schema) if name not in self.unread]
        missing = [name for name in needed if name not in requests.column_names]
        if missing:
            raise DataError(f"{where} has no column {', '.join(missing)}, which the model reads")
        table, rows = requests.combine_chunks(), requests.num_rows
        items = next(name for name in needed if name in schema.impression_columns)
        if NUM_IMPRESSIONS not in table.column_names and rows:
            try:
                counts = split_lists(_array(table, items)).lengths
            except TypeError:
                raise DataError(
                    f"{where}: column '{items}' must hold a list per request, a value per candidate"
                ) from None
            table = table.append_column(NUM_IMPRESSIONS, pa.array(counts))
        numbers = pa.array(np.arange(rows))
        for name in (*schema.keys.request, schema.keys.user):
            if name not in table.column_names:
                table = table.append_column(name, numbers)
        if schema.keys.time not in table.column_names:
            table = table.append_column(schema.keys.time, numbers.cast(pa.timestamp("us")))
        names = [label.column for label in schema.labels] + [x.oracle for x in schema.labels if x.oracle]
        for name in (*names, *self.unread):
            table = table.drop_columns([name]) if name in table.column_names else table
        if rows:
            counts = np.asarray(_array(table, NUM_IMPRESSIONS)).astype(np.int64)
            offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]))
            unknown = pa.LargeListArray.from_arrays(offsets, pa.nulls(int(counts.sum()), pa.float32()))
            for name in names:
                table = table.append_column(name, unknown)
            for name in self.unread:
                any_value = pa.array(np.zeros(int(counts.sum()), np.float32))
                table = table.append_column(name, pa.LargeListArray.from_arrays(offsets, any_value))
        return table

    def _check_empty(self, table: pa.Table, empty: npt.NDArray[np.bool_], where: str) -> None:
        """Raises DataError where a request without candidates has values for some."""
        for name in dict.fromkeys(c for f in self.schema.features if f.level == "impression" for c in f.source_columns):
            odd = np.flatnonzero(empty & (split_lists(_array(table, name)).lengths > 0))
            if len(odd):
                raise DataError(
                    f"{where}: column '{name}' has values for candidates in row {odd[0]}, where other columns have none"
                )

    def as_outputs(self, logits: Scores) -> Scores:
        """Logits as a person wants them: probabilities of a ranking model, similarities of retrieval."""
        if not self.probabilities:
            return logits
        return np.asarray(torch.sigmoid(torch.from_numpy(logits).double()).numpy(), np.float32)

    def _nulls(self, field: pa.Field, given: pa.Table, rows: int) -> pa.Array:
        """A column of nulls: per request, or per candidate of the requests that are given."""
        candidates = [c for f in self.schema.features if f.level == "impression" for c in f.source_columns]
        if field.name not in candidates:
            return pa.nulls(rows, field.type)
        readable = sorted(candidates, key=lambda name: name in self.unread)  # what is not read may be of any length
        lists = next((name for name in readable if name in given.column_names), None)
        if lists is None:
            raise DataError(f"the input has none of the candidates' columns {', '.join(candidates)}")
        counts = split_lists(_array(given, lists)).lengths
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]))
        nulls = pa.nulls(int(counts.sum()), field.type.value_type)
        return pa.LargeListArray.from_arrays(offsets, nulls).cast(field.type)

    def predict(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[list[float]]]:
        """Columns of plain values, a value (or list) per request, times in seconds since the epoch (UTC) -> per task
        a list per request of the scores of its candidates, in order; empty where it has none. An ``optional`` column
        may be missing: it is null in all requests. Raises DataError, naming the column, where one is missing, of
        another type, or shorter than the others."""
        given = [field for field in self.inputs if field.name in columns]
        missing = [field for field in self.inputs if field.name not in columns]
        for field in missing:
            if field.name not in self.optional:
                raise DataError(f"the input has no column '{field.name}', which the model reads")
        arrays = {field.name: _to_arrow(list(columns[field.name]), field) for field in given}
        lengths = {name: len(array) for name, array in arrays.items()}
        rows = max(lengths.values(), default=0)
        short = next((name for name, length in lengths.items() if length != rows), None)
        if short is not None:
            longest = next(name for name, length in lengths.items() if length == rows)
            raise DataError(
                f"columns of the input are of unequal length: '{short}' has {lengths[short]:,} values and '{longest}' "
                f"{rows:,}; give one for each request"
            )
        table = pa.table(arrays)
        for field in missing:
            table = table.append_column(field, self._nulls(field, table, rows))
        scored = self.score(table)
        ends = np.cumsum(scored.num_impressions)[:-1]
        outputs = self.as_outputs(scored.logits)
        return {
            task: [part.tolist() for part in np.split(outputs[:, k], ends)] if len(scored.num_impressions) else []
            for k, task in enumerate(self.tasks)
        }


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type in which a column's values are given: times are seconds, lists are lists of such."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_timestamp(kind):
        return pa.float64()
    return kind


def _to_arrow(values: list[Any], field: pa.Field) -> pa.Array:
    """Plain values as the column's type; seconds become timestamps. Raises DataError where they are of another."""
    kind = plain_type(field.type)
    inexact = [v for v in values if isinstance(v, float) and abs(v) >= EXACT] if pa.types.is_integer(kind) else []
    if inexact:  # pandas makes floats of a column of integers with nulls in it
        raise DataError(
            f"column '{field.name}' of the input has {inexact[0]:.0f} as a float, which no longer tells it from its "
            "neighbours; give such integers as dtype Int64 or object, or one request at a time"
        )
    try:
        # lists of values may come as NumPy arrays
        array = pa.array([v.tolist() if isinstance(v, np.ndarray) else v for v in values], kind)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"column '{field.name}' of the input is no {kind}: {error}") from None
    innermost = field.type.value_type if hasattr(field.type, "value_type") else field.type
    if not pa.types.is_timestamp(innermost):
        return array
    if array.type == pa.float64():
        return _seconds(array)
    return pa.LargeListArray.from_arrays(array.offsets, _seconds(array.values))


def _seconds(values: pa.Array) -> pa.Array:
    micros = np.round(values.to_numpy(zero_copy_only=False) * 1e6)
    absent = np.isnan(micros)
    return pa.array(np.where(absent, 0, micros).astype(np.int64), mask=absent).cast(pa.timestamp("us"))


def plain_columns(table: pa.Table, schema: Schema) -> dict[str, list[Any]]:
    """Stored requests as ``Scorer.predict`` takes them: the model's input columns, times in seconds."""
    columns = {}
    for name in input_columns(schema):
        array = _array(table, name)
        kind = array.type
        if hasattr(kind, "value_type") and pa.types.is_timestamp(kind.value_type):
            lists = split_lists(array)
            seconds = pa.array(_as_seconds(lists.values))
            bounds = zip(lists.starts.tolist(), lists.lengths.tolist(), strict=True)
            columns[name] = [seconds[start : start + length].to_pylist() for start, length in bounds]
        elif pa.types.is_timestamp(kind):
            columns[name] = _as_seconds(array).tolist()
        else:
            columns[name] = array.to_pylist()
    return columns


def _as_seconds(array: pa.Array) -> npt.NDArray[np.float64]:
    return np.asarray(array.cast(pa.timestamp("us")).cast(pa.int64())) / 1e6
