"""Packed Arrow batches to tensors: views on Arrow's buffers, no copy, no Python work per row."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from roo_ray.ingest.batch import Jagged, RequestBatch, impression_id_keys, request_id_keys
from roo_ray.lists import as_array
from roo_ray.schema import Schema


def _view(array: pa.Array) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Arrow's buffers are read-only, and batches are never written to
        return torch.from_numpy(np.asarray(array))


def _values(table: pa.Table, column: str) -> Tensor:
    """(T,) the values of a column, lists one after the other."""
    array = as_array(table.column(column))
    return _view(array.flatten() if pa.types.is_list(array.type) else array)


def _jagged(table: pa.Table, column: str) -> Jagged:
    offsets = np.asarray(as_array(table.column(column)).offsets).astype(np.int64)
    return Jagged(_values(table, column), torch.from_numpy(np.diff(offsets)))


def to_batch(table: pa.Table, schema: Schema) -> RequestBatch:
    """A packed batch (see ``pack``) as tensors on the CPU."""
    tasks = len(schema.labels)
    requests = table.num_rows
    per_impression = _values(table, "impression_index")
    impressions = per_impression.numel()
    single = {f.name for f in schema.select("impression", "ids") if f.pooling == "none"}
    ones = torch.ones(impressions, dtype=torch.int64)
    request_ids = {key: _jagged(table, f"ids:{key}") for key, _ in request_id_keys(schema)}
    sequence_dense = {}
    for feature in schema.sequences:
        events = request_ids[f"{feature.name}.{feature.sequence_ids[0].column}"].values.numel()
        flat = _values(table, f"dense:{feature.name}")
        sequence_dense[feature.name] = flat.view(events, len(feature.sequence_dense))
    return RequestBatch(
        num_impressions=_values(table, "num_impressions"),
        request_key=_values(table, "request_key"),
        impression_index=per_impression,
        user_key=_values(table, "user_key"),
        request_time=_values(table, "request_time"),
        request_dense=_values(table, "request_dense").view(requests, schema.dense_width("request")),
        impression_dense=_values(table, "impression_dense").view(impressions, schema.dense_width("impression")),
        request_ids=request_ids,
        sequence_dense=sequence_dense,
        sequence_time={f.name: _values(table, f"time:{f.name}") for f in schema.sequences if f.time},
        impression_ids={
            key: Jagged(_values(table, f"ids:{key}"), ones if key in single else _values(table, f"lengths:{key}"))
            for key, _ in impression_id_keys(schema)
        },
        labels=_values(table, "labels").view(impressions, tasks),
        weights=_values(table, "weights").view(impressions, tasks),
        oracle=_values(table, "oracle").view(impressions, tasks),
    )
