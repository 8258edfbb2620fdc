"""What the fullest worker of a run holds, and how much of it may lie in host memory instead of on its GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

CACHED = 0.2  # of a table in host memory, what TorchRec caches of it on the GPU (its planner's UVM_CACHING_RATIO)
USABLE = 0.85  # of a GPU's memory, what TorchRec's planner gives to tables and batches


@dataclass(frozen=True)
class Table:
    """``size``: bytes of weights and optimizer state, as a checkpoint has them once. ``kind``: ``split`` over all
    workers by rows or columns, ``whole`` on one, or ``copied`` to each (data_parallel, trained as the dense part is:
    weights and Adam's two moments, and in memory the gradient). ``hosted``: in host memory by the config."""

    size: float
    kind: Literal["split", "whole", "copied"] = "whole"
    hosted: bool = False


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of the fullest worker. ``tables``: its parts of tables that may lie on its device or, on a GPU, in host
    memory; ``hosted``: its parts of those that do by the config; ``rest``: what is on its device in any case."""

    tables: tuple[float, ...]
    hosted: float
    rest: float

    @property
    def device(self) -> float:
        """On its device, where all that fits there lies there."""
        return self.rest + sum(self.tables) + CACHED * self.hosted

    def in_host(self, room: float) -> float | None:
        """Bytes of tables in host memory where its GPU has ``room``: the largest go there, one after the other, until
        the rest fits; None where it does not even then."""
        on_device, in_host = self.device, self.hosted
        for size in sorted(self.tables, reverse=True):
            if on_device <= room:
                break
            on_device -= (1 - CACHED) * size
            in_host += size
        return in_host if on_device <= room else None


def worker_memory(tables: Iterable[Table], workers: int, rest: float) -> WorkerMemory:
    """Split tables are dealt out evenly, whole ones largest first, each to the worker that has least; copied ones are
    on every worker. ``rest``: bytes of the dense part and of a batch."""
    tables = list(tables)
    loads: list[list[Table]] = [[] for _ in range(workers)]
    for table in sorted((table for table in tables if table.kind == "whole"), key=lambda table: -table.size):
        min(loads, key=_held).append(table)
    fullest = max(loads, key=_held)
    fullest += [Table(table.size / workers, "split", table.hosted) for table in tables if table.kind == "split"]
    copied = sum(4 / 3 * table.size for table in tables if table.kind == "copied")
    return WorkerMemory(
        tables=tuple(table.size for table in fullest if not table.hosted),
        hosted=sum(table.size for table in fullest if table.hosted),
        rest=rest + copied,
    )


def _held(tables: Iterable[Table]) -> float:
    return sum(table.size for table in tables)
