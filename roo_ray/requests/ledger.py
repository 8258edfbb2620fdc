"""The dedup ledger: elements and bytes of each column at impression level against request level.

Elements are single values (ids, numbers, words, history events); memory is their plain Arrow size (values, and
4 bytes an offset for each list or string); disk bytes are compressed column bytes from Parquet footers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from roo_ray.requests.grouping import NUM_IMPRESSIONS, explode_in_slices
from roo_ray.requests.lengths import KEPT, count_kept
from roo_ray.requests.manifest import ShardFile
from roo_ray.requests.shards import WriteOptions, column_bytes
from roo_ray.schema import Schema
from roo_ray.sources.columns import as_array, is_list, list_parts, take_table
from roo_ray.terminal import human_bytes

KINDS = ("elements", "memory_bytes", "disk_bytes")
OFFSET_BYTES = 4
EXPLODED_IMPRESSIONS = 100_000
EXPLODED_VALUES = 8_000_000
SAMPLED_BUCKETS = 4
SAMPLED_IMPRESSIONS = 20_000
SAMPLED_VALUES = 4_000_000

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
    """Column -> elements and memory bytes at both levels, of request rows; of columns that features read as lists of
    ids, also what is ``kept`` of them (``lengths.count_kept``)."""
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
    for name, kept in count_kept(requests, schema).items():
        sizes[name][KEPT] = dict(kept)
    return sizes


def sorted_disk_bytes(
    requests: pa.Table, schema: Schema, options: WriteOptions, impressions: int | None = None
) -> tuple[dict[str, int], pa.Table]:
    """(compressed bytes per column of the rows as an impression table sorted by request, the request rows that
    were measured): written with the same codec to memory, in slices of bounded memory, in the order of the
    rows. With ``impressions`` only so many of the first ones are, and no request of more than that."""
    if impressions is not None:
        requests = _first_impressions(requests, schema, impressions)
    totals = dict.fromkeys(schema.columns, 0)
    for table in explode_in_slices(requests, schema, EXPLODED_IMPRESSIONS, EXPLODED_VALUES):
        for name, size in parquet_bytes(table, options.compression_level).items():
            totals[name] += size
    return totals, requests


def parquet_bytes(table: pa.Table, level: int = 3) -> dict[str, int]:
    """Compressed bytes per column of a table written as Parquet (zstd, pyarrow's other defaults) to memory."""
    stream = pa.BufferOutputStream()
    with pq.ParquetWriter(stream, table.schema, compression="zstd", compression_level=level) as writer:
        writer.write_table(table)
    return column_bytes(pq.read_metadata(pa.BufferReader(stream.getvalue())))


def _first_impressions(requests: pa.Table, schema: Schema, impressions: int) -> pa.Table:
    """The first request rows with about so many impressions and, exploded, ``SAMPLED_VALUES`` list values."""
    lengths = np.asarray(requests.column(NUM_IMPRESSIONS)).astype(np.int64)
    values = sum(
        (list_parts(as_array(requests.column(name)))[0] * lengths for name in schema.request_columns
         if is_list(requests.schema.field(name).type)),
        np.zeros(len(lengths), np.int64),
    )  # fmt: skip
    cost = np.maximum(lengths / impressions, values / SAMPLED_VALUES)
    small = np.flatnonzero(cost <= 1)
    return take_table(requests, small[np.cumsum(cost[small]) <= 1])


def measure_bucket(
    requests: pa.Table, schema: Schema, options: WriteOptions, mode: str, bucket: int, buckets: int
) -> Sizes:
    """``measure_requests``, with the disk bytes of the impression-level form sorted by request as ``sorted``, and
    how many elements of each column they are of as ``measured``.

    ``mode`` ``full``: of all rows; ``sample``: of the first ``SAMPLED_IMPRESSIONS`` of about ``SAMPLED_BUCKETS``
    of all ``buckets``; ``off``: of none.
    """
    sizes = measure_requests(requests, schema)
    measured: Sizes = {}
    stored: dict[str, int] = {}
    if mode == "full":
        stored, _ = sorted_disk_bytes(requests, schema, options)
        measured = sizes
    elif mode == "sample" and bucket % max(1, buckets // SAMPLED_BUCKETS) == 0:
        stored, part = sorted_disk_bytes(requests, schema, options, SAMPLED_IMPRESSIONS)
        measured = sizes if part.num_rows == requests.num_rows else measure_requests(part, schema)
    for name, kinds in sizes.items():
        elements = measured[name]["elements"]["impression"] if measured else 0
        kinds["disk_bytes"] = {"impression": 0, "sorted": stored.get(name, 0), "request": 0}
        kinds["measured"] = {"sorted": elements}
    return sizes


def add_sizes(parts: Iterable[Mapping[str, Mapping[str, Mapping[str, int]]]]) -> Sizes:
    """The sum of several measurements."""
    total: Sizes = {}
    for part in parts:
        for column, kinds in part.items():
            for kind, levels in kinds.items():
                into = total.setdefault(column, {}).setdefault(kind, {})
                for level, value in levels.items():
                    into[level] = into.get(level, 0) + value
    return total


def build_ledger(
    schema: Schema,
    parts: Iterable[Sizes],
    files: Sequence[ShardFile],
    logged: Mapping[str, int] | None,
    codec: str,
    level: int,
) -> dict[str, Any]:
    """The ledger of a build from its buckets' ``measure_bucket``, with the request-level disk bytes in them.

    ``logged``: compressed bytes per column of the source's files (of ``codec``), None where they are no
    impression log: the sorted form stands in for it then. What was measured on a sample is scaled by elements.
    What is ``kept`` of a column is left out where a part did not count it: an earlier version's days.
    """
    parts = list(parts)
    sizes = add_sizes(parts)
    for name, kinds in sizes.items():
        if any(KEPT not in part.get(name, {}) for part in parts):
            kinds.pop(KEPT, None)
    written = f"zstd level {level}"
    elements = sum(kinds["elements"]["impression"] for kinds in sizes.values())
    measured = sum(kinds["measured"]["sorted"] for kinds in sizes.values())
    for name, kinds in sizes.items():
        disk, sampled = kinds["disk_bytes"], kinds.pop("measured")["sorted"]
        if sampled:
            disk["sorted"] = round(disk["sorted"] * kinds["elements"]["impression"] / sampled)
        disk["impression"] = logged.get(name, 0) if logged is not None else disk["sorted"]
    share = measured / elements if elements else 1.0
    if not measured:
        how = "the impression-level form sorted by request was not measured (build.ledger: off)"
    elif measured == elements:
        how = (
            f"the impression-level form sorted by request was exploded and written whole to count its bytes ({written})"
        )
    else:
        how = (
            f"the impression-level form sorted by request was exploded and written for {share:.2%} of all elements "
            f"({written}) and scaled by elements (build.ledger: full measures all)"
        )
    if logged is None:
        how += "; the source is no impression table, so that form stands in for impression-level as logged"
    else:
        how += f"; impression-level disk bytes as logged are those of the source's Parquet files ({codec})"
    how += (
        f"; request-level ones of the written shards ({written}). Compressed column bytes from the footers. "
        "Elements are single values; memory is their plain Arrow size with 4-byte offsets"
    )
    return make_ledger(sizes, schema, how) | {"files": _files(files)}


def _files(files: Sequence[ShardFile]) -> dict[str, Any]:
    """Files, and requests, impressions and bytes per file: least, mean, most."""

    def spread(values: list[int]) -> dict[str, float]:
        return {"least": min(values), "mean": sum(values) / len(values), "most": max(values)}

    if not files:
        return {"files": 0}
    return {
        "files": len(files),
        "row_groups": sum(len(file.units) for file in files),
        "requests": spread([file.requests for file in files]),
        "impressions": spread([file.impressions for file in files]),
        "bytes": spread([file.bytes for file in files]),
    }


def make_ledger(sizes: Sizes, schema: Schema, how: str) -> dict[str, Any]:
    """The ledger as plain JSON: ``columns`` (level, elements, memory_bytes, disk_bytes, each at impression and
    request level, disk bytes also of the impression level ``sorted`` by request; of lists of ids, those ``kept`` by
    ``max_length``), ``totals`` and ``how`` it was measured."""
    columns = {}
    totals = {kind: dict.fromkeys(("impression", "request"), 0) for kind in KINDS}
    totals["disk_bytes"]["sorted"] = 0
    for name in [*schema.columns, NUM_IMPRESSIONS]:
        level = "impression" if name in schema.impression_columns else "request"
        columns[name] = {"level": level} | {kind: sizes[name][kind] for kind in (*KINDS, KEPT) if kind in sizes[name]}
        for kind in KINDS:
            for side in totals[kind]:
                totals[kind][side] += sizes[name][kind].get(side, 0)
    return {"columns": columns, "totals": totals, "how": how}


def _ratio(sides: Mapping[str, int], of: str = "impression") -> float:
    return sides.get(of, 0) / sides["request"] if sides["request"] else 1.0


def ledger_table(ledger: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of text: per column, and last in all, elements (values) as logged (impression level) and
    grouped (request level), disk bytes as logged, sorted by request and grouped, and the ratios of each to
    grouped."""
    header = ["column", "level", "values, logged", "grouped", "ratio"]
    header += ["disk, logged", "sorted", "grouped", "logged / grouped", "sorted / grouped"]

    def row(name: str, level: str, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        def ratio(kind: str, of: str = "impression") -> str:
            return f"{_ratio(sizes[kind], of):.2f}x" if sizes[kind].get(of) else "-"

        elements, disk = sizes["elements"], sizes["disk_bytes"]
        return [
            name,
            {"request": "RO", "impression": "NRO"}.get(level, level),
            f"{elements['impression']:,}",
            f"{elements['request']:,}",
            ratio("elements"),
            human_bytes(disk["impression"]),
            human_bytes(disk["sorted"]) if disk.get("sorted") else "-",
            human_bytes(disk["request"]),
            ratio("disk_bytes"),
            ratio("disk_bytes", "sorted"),
        ]

    rows = [row(name, entry["level"], entry) for name, entry in ledger["columns"].items()]
    return header, [*rows, row("total", "", ledger["totals"])]


def files_table(ledger: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of text: requests, impressions and bytes per file."""
    files = ledger.get("files", {})
    header = [f"{files.get('files', 0):,} files, {files.get('row_groups', 0):,} row groups", "least", "mean", "most"]
    rows = []
    for name in ("requests", "impressions", "bytes"):
        if name in files:
            show = human_bytes if name == "bytes" else "{:,.0f}".format
            rows.append([f"{name} per file", *(show(files[name][of]) for of in ("least", "mean", "most"))])
    return header, rows


def ledger_metrics(ledger: Mapping[str, Any]) -> dict[str, float]:
    """Dedup ratios (elements, memory and disk bytes; also of the request-level columns alone), disk bytes at both
    levels and of the impression level sorted by request, and requests per file, as metrics. Empty for an empty
    ledger."""
    if not ledger:
        return {}
    totals = ledger["totals"]
    metrics = {f"dedup_ratio_{kind}": _ratio(totals[kind]) for kind in KINDS}
    user_side = [e for e in ledger["columns"].values() if e["level"] == "request"]
    for kind in KINDS:
        sides = {side: sum(entry[kind][side] for entry in user_side) for side in ("impression", "request")}
        metrics[f"dedup_ratio_{kind}_request_columns"] = _ratio(sides)
    for side in ("impression", "request"):
        metrics[f"disk_bytes_{side}_level"] = float(totals["disk_bytes"][side])
    if totals["disk_bytes"].get("sorted"):
        metrics["disk_bytes_impression_level_sorted"] = float(totals["disk_bytes"]["sorted"])
        metrics["dedup_ratio_disk_bytes_sorted"] = _ratio(totals["disk_bytes"], "sorted")
    if ledger.get("files", {}).get("files"):
        metrics["requests_per_file"] = float(ledger["files"]["requests"]["mean"])
        metrics["impressions_per_file"] = float(ledger["files"]["impressions"]["mean"])
    return metrics
