"""Runs the build's side of a joined source in one process: deal rows to buckets by the logs' keys, assemble each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from roo_ray.sources.base import Assembled, JoinedSource
from roo_ray.sources.hashing import hash_rows


def read_logs(source: JoinedSource) -> dict[str, pa.Table]:
    """All rows of each log."""
    assert isinstance(source, JoinedSource)
    units = source.units()
    assert [unit.index for unit in units] == list(range(len(units)))
    parts = {name: [log.schema.empty_table()] for name, log in source.logs.items()}
    for unit in units:
        tables = list(source.batches(unit))
        assert sum(table.num_rows for table in tables) == unit.rows
        assert all(table.schema.equals(source.logs[unit.log].schema) for table in tables)
        parts[unit.log] += tables
    return {name: pa.concat_tables(tables) for name, tables in parts.items()}


def assemble(
    source: JoinedSource, buckets: int = 1, seed: int | None = None, parts: dict[str, pa.Table] | None = None
) -> Assembled:
    """The whole source by way of ``buckets``, the rows of each log shuffled by ``seed``."""
    rows: list[pa.Table] = []
    counts: Counter[str] = Counter()
    aside: dict[str, list[pa.Table]] = {}
    logs = parts or read_logs(source)
    for bucket in range(buckets):
        dealt = {}
        for name, table in logs.items():
            number = hash_rows(table, source.logs[name].keys) % np.uint64(buckets)
            index = np.flatnonzero(number == bucket)
            if seed is not None:
                index = np.random.default_rng(seed).permutation(index)
            dealt[name] = table.take(pa.array(index))
        result = source.assemble(dealt)
        assert result.rows.schema.equals(source.row_schema)
        rows.append(result.rows)
        counts.update(result.counts)
        for reason, table in result.aside.items():
            aside.setdefault(reason, []).append(table)
    return Assembled(pa.concat_tables(rows), dict(counts), {name: pa.concat_tables(t) for name, t in aside.items()})
