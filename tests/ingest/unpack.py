"""A batch taken apart into plain Python, a dict per request, as ``shard_maker.reference`` reads a row."""

from __future__ import annotations

import math
from typing import Any

from roo_ray.ingest.batch import Jagged, RequestBatch


def _split(values: list[Any], lengths: list[int]) -> list[list[Any]]:
    assert sum(lengths) == len(values)
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


def _lists(jagged: Jagged) -> list[list[Any]]:
    return _split(jagged.values.tolist(), jagged.lengths.tolist())


def observed(batch: RequestBatch) -> list[dict[str, Any]]:
    """Everything that the batch holds, request by request."""
    counts = batch.num_impressions.tolist()
    columns: dict[str, list[Any]] = {}
    for name in ("impression_index", "impression_dense", "labels", "weights", "oracle"):
        columns[name] = _split(getattr(batch, name).tolist(), counts)
    for name in ("request_key", "request_time", "user_key", "num_impressions", "request_dense"):
        columns[name] = getattr(batch, name).tolist()
    for name, ids in batch.request_ids.items():
        columns[name] = _lists(ids)
    for name, ids in batch.impression_ids.items():
        columns[name] = _split(_lists(ids), counts)
    for name, values in batch.sequence_dense.items():
        events = next(ids.lengths for key, ids in batch.request_ids.items() if key.startswith(f"{name}."))
        columns[f"{name}:dense"] = _split(values.tolist(), events.tolist())
        if name in batch.sequence_time:
            columns[f"{name}:time"] = _split(batch.sequence_time[name].tolist(), events.tolist())
    assert {len(column) for column in columns.values()} == {len(counts)}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(counts))]


def same(got: Any, expected: Any) -> bool:
    """Equality of nested lists and dicts; floats to float32 precision, and NaN equals NaN."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, float):
        return (math.isnan(got) and math.isnan(expected)) or math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-7)
    return bool(got == expected)
