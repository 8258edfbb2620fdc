"""What an impression table would save as request shards, predicted per column from a sample of whole requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.config import Model
from roo_ray.requests.grouping import NUM_IMPRESSIONS, group_with_findings
from roo_ray.requests.ledger import measure_requests, sorted_disk_bytes
from roo_ray.requests.profile import ImpressionTable, Sample, Use
from roo_ray.requests.profile_cost import StepCost, predict
from roo_ray.requests.profile_schema import level_of
from roo_ray.requests.shards import SAMPLE_ROWS, WriteOptions, choose_encodings, column_bytes, order_for_shards
from roo_ray.schema import Schema
from roo_ray.sources.columns import as_array, list_parts, take_table
from roo_ray.sources.times import epoch_seconds
from roo_ray.terminal import human_bytes

OPTIONS = WriteOptions(row_group_requests=1024, compression_level=3)


@dataclass(frozen=True)
class ColumnSaving:
    """Predicted for the whole table. Elements at both levels; bytes on disk: ``logged`` as the footers of the
    table say, ``sorted`` by request and ``grouped`` into request rows (both zstd level 3), scaled from the
    sample."""

    level: str
    elements_logged: int
    elements_grouped: int
    logged: int
    sorted: int
    grouped: int


@dataclass(frozen=True)
class Savings:
    """``columns`` in the schema's order, ``cost``: predicted step cost of a model."""

    columns: dict[str, ColumnSaving]
    requests: int
    impressions: int
    mean_impressions: float
    mean_history: dict[str, float]
    cost: StepCost

    def total(self) -> ColumnSaving:
        """The sum over all columns."""
        fields = [asdict(column) for column in self.columns.values()]
        sums = {name: sum(entry[name] for entry in fields) for name in fields[0] if name != "level"}
        return ColumnSaving(level="", **sums)


def predict_savings(table: ImpressionTable, sample: Sample, schema: Schema, model: Model) -> Savings:
    """Groups the sample by the schema, writes both forms to memory, and scales to the table. Columns that vary
    within some requests count with the value of the first impression, as with build.on_request_conflict: first."""
    rows = sample.rows.select(schema.columns)
    requests, _ = group_with_findings(rows, schema, "first")
    times = epoch_seconds(requests.column(schema.keys.time), schema.keys.time)
    by_user = take_table(requests, order_for_shards(requests, schema, times))
    grouped = _shard_bytes(by_user)
    in_order, _ = sorted_disk_bytes(requests, schema, OPTIONS)
    sizes = measure_requests(requests, schema)
    logged = table.disk_bytes()
    scale = (table.rows - sample.null_keys) / max(rows.num_rows, 1)
    columns = {
        name: ColumnSaving(
            level="impression" if name in schema.impression_columns else "request",
            elements_logged=round(sizes[name]["elements"]["impression"] * scale),
            elements_grouped=round(sizes[name]["elements"]["request"] * scale),
            logged=logged.get(name, 0),
            sorted=round(in_order.get(name, 0) * scale),
            grouped=round(grouped[name] * scale),
        )
        for name in [*schema.columns, NUM_IMPRESSIONS]
    }
    shown = np.asarray(requests.column(NUM_IMPRESSIONS)).astype(np.int64)
    histories = {f.name: list_parts(as_array(requests.column(f.source_columns[0])))[0] for f in schema.sequences}
    return Savings(
        columns=columns,
        requests=sample.all_requests,
        impressions=table.rows,
        mean_impressions=float(shown.mean()),
        mean_history={name: float(lengths.mean()) for name, lengths in histories.items()},
        cost=predict(schema, model, shown, histories),
    )


def _shard_bytes(requests: pa.Table) -> dict[str, int]:
    """Compressed bytes per column of request rows, written as shards are."""
    stream = pa.BufferOutputStream()
    sample = requests.slice(0, SAMPLE_ROWS).combine_chunks()
    with OPTIONS.writer(stream, requests.schema, choose_encodings(sample, OPTIONS)[0]) as writer:
        writer.write_table(requests, row_group_size=OPTIONS.row_group_requests)
    return column_bytes(pq.read_metadata(pa.BufferReader(stream.getvalue())))


# ---- text and JSON -------------------------------------------------------------------------------


def use_table(use: Use, key: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of text: which columns are constant within requests, and how often they are not."""
    header = ["column", "type", "level", "varies in", "of requests with several", "nulls", "distinct", "example"]
    rows = []
    for column in use.columns.values():
        level = "key" if column.name in key else {"request": "RO", "impression": "NRO"}[level_of(column)]
        varies = "never" if not column.varying else f"{column.share:.2%}"
        distinct = f"{column.distinct:,}" if column.distinct >= 0 else "-"
        rarely = level == "RO" and column.varying
        rows.append(
            [
                column.name,
                column.kind,
                f"{level} (!)" if rarely else level,
                varies,
                f"{column.varying:,} / {column.several:,}",
                f"{column.nulls:,}",
                distinct,
                column.example if rarely else "",
            ]
        )
    return header, rows


def savings_table(savings: Savings) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of text: predicted elements and bytes per column, and last in all."""
    header = ["column", "level", "values, logged", "grouped", "ratio", "disk, logged", "sorted", "grouped"]
    header += ["logged / grouped", "sorted / grouped"]

    def ratio(a: int, b: int) -> str:
        return f"{a / b:.2f}x" if a and b else "-"

    rows = [
        [
            name,
            {"request": "RO", "impression": "NRO"}.get(column.level, ""),
            f"{column.elements_logged:,}",
            f"{column.elements_grouped:,}",
            ratio(column.elements_logged, column.elements_grouped),
            human_bytes(column.logged),
            human_bytes(column.sorted),
            human_bytes(column.grouped),
            ratio(column.logged, column.grouped),
            ratio(column.sorted, column.grouped),
        ]
        for name, column in [*savings.columns.items(), ("total", savings.total())]
    ]
    return header, rows


def profile_json(sample: Sample, use: Use, schema: Schema, savings: Savings) -> dict[str, Any]:
    """The whole profile as plain JSON."""
    columns: Mapping[str, Any] = {
        name: asdict(column) | {"share": column.share, "level": level_of(column)}
        for name, column in use.columns.items()
    }
    return {
        "sample": {
            "requests": sample.requests,
            "impressions": sample.rows.num_rows,
            "requests_of_table": sample.all_requests,
            "requests_of_table_exact": sample.exact,
            "rows_with_null_key": sample.null_keys,
        },
        "columns": columns,
        "schema_yaml": schema.to_yaml(),
        "savings": {name: asdict(column) for name, column in savings.columns.items()},
        "totals": asdict(savings.total()),
        "step": asdict(savings.cost)
        | {"speed_up": savings.cost.speed_up, "lookup_ratio": savings.cost.lookup_ratio, "is": "a prediction"},
    }
