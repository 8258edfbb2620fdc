"""Sources for tests of the build: a log that kills its worker once, and two logs that are joined."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.sources.base import Assembled, Log, ReadUnit, to_plain
from roo_ray.sources.impressions import ImpressionLog


@dataclass(frozen=True)
class KillsWorker(ImpressionLog):
    """Kills the process that reads its second unit, the first time."""

    marker: Path = Path()

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        if unit.index == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().batches(unit)

    @staticmethod
    def of(log: ImpressionLog, marker: Path) -> KillsWorker:
        return KillsWorker(log.row_schema, log.all_units, log.bytes_per_column, log.codec, marker=marker)


@dataclass(frozen=True)
class TwoLogs:
    """Request rows and impression rows, joined by ``keys``; impressions without a request are kept aside."""

    row_schema: pa.Schema
    parts: dict[str, pa.Table]
    keys: tuple[str, ...]
    rows_per_unit: int = 40
    codec: str = "none"

    @property
    def logs(self) -> dict[str, Log]:
        return {name: Log(table.schema, self.keys) for name, table in self.parts.items()}

    def units(self) -> list[ReadUnit]:
        found: list[ReadUnit] = []
        for name, table in self.parts.items():
            for at in range(0, table.num_rows, self.rows_per_unit):
                rows = min(self.rows_per_unit, table.num_rows - at)
                unit = ReadUnit(0, "", name, (at,), "impressions", rows, rows * 100, log=name)
                found.append(replace(unit, index=len(found)))
        return found

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        yield self.parts[unit.log].slice(unit.row_groups[0], unit.rows)

    def disk_bytes(self) -> dict[str, int] | None:
        return None

    def counts(self) -> dict[str, int]:
        return {"opened": 1}

    def assemble(self, parts: dict[str, pa.Table]) -> Assembled:
        requests, impressions = parts["requests"].combine_chunks(), parts["impressions"].combine_chunks()

        def key(table: pa.Table) -> pa.Array:
            text = [pc.cast(table.column(name), pa.string()).combine_chunks() for name in self.keys]
            return pc.binary_join_element_wise(*text, "/")

        found = pc.index_in(key(impressions), value_set=key(requests))
        joined = impressions.filter(found.is_valid())
        whole = requests.take(found.drop_null())
        columns = {n: whole[n] if n in whole.column_names else joined[n] for n in self.row_schema.names}
        return Assembled(
            to_plain(pa.table(columns), self.row_schema),
            {"impressions_without_request": int(pc.sum(found.is_null()).as_py() or 0)},
            {"impressions_without_request": impressions.filter(found.is_null())},
        )
