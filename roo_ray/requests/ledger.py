"""The dedup ledger: elements and bytes of each column at impression level against request level.

Elements are single values (ids, numbers, words, history events); memory is their plain Arrow size (values, and
4 bytes an offset for each list or string); disk bytes are compressed column bytes from Parquet footers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from roo_ray.requests.grouping import NUM_IMPRESSIONS, explode_in_slices
from roo_ray.requests.shards import WriteOptions, column_bytes
from roo_ray.schema import Schema
from roo_ray.sources.columns import as_array, is_list, list_parts

KINDS = ("elements", "memory_bytes", "disk_bytes")
OFFSET_BYTES = 4
EXPLODED_IMPRESSIONS = 100_000
EXPLODED_VALUES = 8_000_000

Weights = npt.NDArray[np.int64]
Sizes = dict[str, dict[str, dict[str, int]]]


def measure(array: pa.Array, copies: Weights) -> tuple[int, int]:
    """(elements, memory bytes) of an array whose row i is stored ``copies[i]`` times."""
    kind = array.type
    if is_list(kind):
        lengths, values = list_parts(array)
        elements, size = measure(values, np.repeat(copies, lengths))
        return elements, size + OFFSET_BYTES * int(copies.sum())
    if pa.types.is_struct(kind):
        parts = [measure(field, copies) for field in array.flatten()]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
    elements = int(copies.sum())
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        lengths = np.asarray(pc.fill_null(pc.binary_length(array), 0)).astype(np.int64)
        return elements, int((lengths * copies).sum()) + OFFSET_BYTES * elements
    if pa.types.is_null(kind):
        return elements, 0
    return elements, (elements * kind.bit_width + 7) // 8


def measure_requests(requests: pa.Table, schema: Schema) -> Sizes:
    """Column -> elements and memory bytes at both levels, of request rows."""
    ones = np.ones(requests.num_rows, np.int64)
    copies = np.asarray(requests.column(NUM_IMPRESSIONS)).astype(np.int64)
    sizes: Sizes = {}
    for name in [*schema.columns, NUM_IMPRESSIONS]:
        array = as_array(requests.column(name))
        stored = measure(array, ones)
        if name == NUM_IMPRESSIONS:
            logged = (0, 0)
        elif name in schema.request_columns:
            logged = measure(array, copies)
        else:
            values = list_parts(array)[1]
            logged = measure(values, np.ones(len(values), np.int64))
        sizes[name] = {
            kind: {"impression": logged[i], "request": stored[i]} for i, kind in enumerate(("elements", "memory_bytes"))
        }
    return sizes


def exploded_disk_bytes(requests: pa.Table, schema: Schema, options: WriteOptions) -> dict[str, int]:
    """Compressed bytes per column of the rows as an impression table: written with the same codec into
    memory, in slices of bounded memory, in the order of the rows (requests together: the smallest it gets)."""
    totals = dict.fromkeys(schema.columns, 0)
    for table in explode_in_slices(requests, schema, EXPLODED_IMPRESSIONS, EXPLODED_VALUES):
        stream = pa.BufferOutputStream()
        with pq.ParquetWriter(
            stream, table.schema, compression="zstd", compression_level=options.compression_level
        ) as writer:
            writer.write_table(table)
        for name, size in column_bytes(pq.read_metadata(pa.BufferReader(stream.getvalue()))).items():
            totals[name] += size
    return totals


def add_sizes(parts: Iterable[Mapping[str, Mapping[str, Mapping[str, int]]]]) -> Sizes:
    """The sum of several measurements."""
    total: Sizes = {}
    for part in parts:
        for column, kinds in part.items():
            for kind, levels in kinds.items():
                into = total.setdefault(column, {}).setdefault(kind, {"impression": 0, "request": 0})
                for level, value in levels.items():
                    into[level] += value
    return total


def make_ledger(sizes: Sizes, schema: Schema, how: str) -> dict[str, Any]:
    """The ledger as plain JSON: ``columns`` (level, elements, memory_bytes, disk_bytes, each at impression and
    request level), ``totals`` and ``how`` it was measured."""
    columns = {}
    totals = {kind: {"impression": 0, "request": 0} for kind in KINDS}
    for name in [*schema.columns, NUM_IMPRESSIONS]:
        level = "impression" if name in schema.impression_columns else "request"
        columns[name] = {"level": level} | {kind: sizes[name][kind] for kind in KINDS}
        for kind in KINDS:
            for side in ("impression", "request"):
                totals[kind][side] += sizes[name][kind][side]
    return {"columns": columns, "totals": totals, "how": how}


def _ratio(sides: Mapping[str, int]) -> float:
    return sides["impression"] / sides["request"] if sides["request"] else 1.0


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def ledger_table(ledger: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of text: per column, and last in all, elements (values) and disk bytes as logged
    (impression level) and grouped (request level) with their ratios, and the ratio in memory."""
    header = ["column", "level", "values, logged", "grouped", "ratio"]
    header += ["disk, logged", "grouped", "ratio", "memory ratio"]

    def row(name: str, level: str, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        def ratio(kind: str) -> str:
            return f"{_ratio(sizes[kind]):.2f}x" if sizes[kind]["impression"] else "-"

        elements, disk = sizes["elements"], sizes["disk_bytes"]
        return [
            name,
            {"request": "RO", "impression": "NRO"}.get(level, level),
            f"{elements['impression']:,}",
            f"{elements['request']:,}",
            ratio("elements"),
            _bytes(disk["impression"]),
            _bytes(disk["request"]),
            ratio("disk_bytes"),
            ratio("memory_bytes"),
        ]

    rows = [row(name, entry["level"], entry) for name, entry in ledger["columns"].items()]
    return header, [*rows, row("total", "", ledger["totals"])]


def ledger_metrics(ledger: Mapping[str, Any]) -> dict[str, float]:
    """Dedup ratios (elements, memory and disk bytes; also of the request-level columns alone) and disk bytes at
    both levels, as metrics. Empty for an empty ledger."""
    if not ledger:
        return {}
    metrics = {f"dedup_ratio_{kind}": _ratio(ledger["totals"][kind]) for kind in KINDS}
    user_side = [e for e in ledger["columns"].values() if e["level"] == "request"]
    for kind in KINDS:
        sides = {side: sum(entry[kind][side] for entry in user_side) for side in ("impression", "request")}
        metrics[f"dedup_ratio_{kind}_request_columns"] = _ratio(sides)
    for side in ("impression", "request"):
        metrics[f"disk_bytes_{side}_level"] = float(ledger["totals"]["disk_bytes"][side])
    return metrics
