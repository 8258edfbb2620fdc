"""The ledger: what each column costs impression-level and request-level, in elements and bytes.

A plain dict that goes into the manifest: ``columns[name]`` and ``totals``, each with ``elements``,
``memory_bytes`` (Arrow) and ``disk_bytes`` (compressed Parquet), each with ``impression`` and ``request``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.lists import as_array, is_list, list_parts
from roo_ray.requests.grouping import NUM_IMPRESSIONS
from roo_ray.schema import Schema
from roo_ray.sources.base import leaf_columns

MEASURES = ("elements", "memory_bytes", "disk_bytes")
Costs = dict[str, dict[str, dict[str, float]]]


def leaf_values(array: pa.Array) -> tuple[Any, int]:
    """((N,) values per row, bytes of one value) with lists counted by their values."""
    if is_list(array.type):
        lengths, values = list_parts(array)
        inner, width = leaf_values(values)
        sums = np.concatenate([[0], np.cumsum(inner)])
        ends = np.cumsum(lengths)
        return sums[ends] - sums[ends - lengths], width
    if pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        return np.ones(len(array), np.int64), max(1, array.nbytes // max(len(array), 1))
    return np.ones(len(array), np.int64), max(1, array.type.bit_width // 8 if not pa.types.is_null(array.type) else 1)


def table_costs(table: pa.Table, schema: Schema) -> Costs:
    """Elements and bytes in memory of request rows, request-level and as if exploded, per column."""
    impressions = np.asarray(as_array(table.column(NUM_IMPRESSIONS))).astype(np.int64)
    costs: Costs = {}
    for name in schema.columns:
        per_row, width = leaf_values(as_array(table.column(name)))
        once = int(per_row.sum())
        exploded = int((per_row * impressions).sum()) if name in schema.request_columns else once
        costs[name] = {
            "elements": {"impression": exploded, "request": once},
            "memory_bytes": {"impression": exploded * width, "request": once * width},
            "disk_bytes": {"impression": 0, "request": 0},
        }
    return costs


def footer_bytes(footer: Any, columns: Iterable[str]) -> dict[str, int]:
    """Compressed bytes per column of a Parquet file."""
    totals = dict.fromkeys(columns, 0)
    leaves = leaf_columns(footer)
    for group in range(footer.num_row_groups):
        for i, name in enumerate(leaves):
            if name in totals:
                totals[name] += footer.row_group(group).column(i).total_compressed_size
    return totals


def exploded_bytes(exploded: pa.Table, compression_level: int) -> dict[str, int]:
    """Compressed bytes per column that impression rows take in Parquet (zstd), written to memory and dropped."""
    sink = pa.BufferOutputStream()
    pq.write_table(exploded, sink, compression="zstd", compression_level=compression_level)
    return footer_bytes(pq.read_metadata(pa.BufferReader(sink.getvalue())), exploded.column_names)


def add_costs(total: Costs, more: Costs) -> None:
    """Adds ``more`` to ``total`` in place."""
    for name, measures in more.items():
        if name not in total:
            total[name] = {m: dict(v) for m, v in measures.items()}
            continue
        for measure, sides in measures.items():
            for side, value in sides.items():
                total[name][measure][side] += value


def make_ledger(columns: Costs, schema: Schema, how: str) -> dict[str, Any]:
    """The ledger of summed column costs; ``how`` says where the impression-level bytes come from."""
    totals = {
        measure: {side: sum(c[measure][side] for c in columns.values()) for side in ("impression", "request")}
        for measure in MEASURES
    }
    request_level = set(schema.request_columns)
    return {
        "columns": {
            name: {"level": "request" if name in request_level else "impression", **columns[name]}
            for name in schema.columns
            if name in columns
        },
        "totals": totals,
        "how": how,
    }


def _ratio(sides: Mapping[str, float]) -> float:
    return sides["impression"] / sides["request"] if sides["request"] else float("nan")


def ledger_metrics(ledger: Mapping[str, Any]) -> dict[str, float]:
    """Totals and dedup ratios under flat names."""
    if not ledger:
        return {}
    metrics = {}
    for measure in MEASURES:
        sides = ledger["totals"][measure]
        metrics[f"dedup_ratio_{measure}"] = _ratio(sides)
        metrics[f"{measure}_impression_level"] = float(sides["impression"])
        metrics[f"{measure}_request_level"] = float(sides["request"])
    return metrics


def _size(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:,.0f}{unit}" if not unit else f"{count:,.1f}{unit}"
        count /= 1000
    return f"{count:,.1f}T"


def ledger_table(ledger: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows of text): per column and in all, elements and bytes on disk, impression- and request-level."""
    header = ["column", "level", "elements", "request-level", "ratio", "disk bytes", "request-level", "ratio"]
    rows = []
    entries = [*ledger["columns"].items(), ("all", {"level": "", **ledger["totals"]})]
    for name, entry in entries:
        row = [name, entry["level"]]
        for measure in ("elements", "disk_bytes"):
            sides = entry[measure]
            row += [_size(sides["impression"]), _size(sides["request"]), f"{_ratio(sides):.1f}x"]
        rows.append(row)
    return header, rows
