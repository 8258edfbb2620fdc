"""Unbounded ids in a table of too few rows: managed (ZCH) against hashed, on one rank and one thread.

    python benchmarks/managed.py [--quick] [--check] [--json FILE] [--merge FILES]

Ids are drawn from ten times as many as there are rows, by Zipf's law with exponent 1.05, and a thousandth of them is
replaced by new ones every step, as a catalogue changes. Per step: meeting its ids (changes of rows included, a change
every 100 steps) and turning them into rows, against hashing them into rows. And over the second half of the steps: of
the lookups of an id's row, how many are other ids', the mean over all lookups. 0 % is a table with a row for every id;
managed, ids without a row share the last one. There is no aim to miss.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from model_cases import arguments, finish, merged, table

from roo_ray.config import ManagedRows
from roo_ray.models.initialise import mix64
from roo_ray.models.managed import TableMap

PER_ROW, EXPONENT, RENEWED = 10, 1.05, 1000
CPU = torch.device("cpu")


class Catalogue:
    """Ids in order of how often they are looked up, some of which are replaced every step."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.ids = np.arange(rows * PER_ROW)
        weights = np.arange(1, len(self.ids) + 1, dtype=np.float64) ** -EXPONENT
        self.shares = np.cumsum(weights) / weights.sum()
        self.next = len(self.ids)

    def draw(self, count: int) -> torch.Tensor:
        """The ids of a step's lookups, hashed to 61 bits, (count,) int64."""
        gone = self.random.integers(0, len(self.ids), len(self.ids) // RENEWED)
        self.ids[gone] = np.arange(self.next, self.next + len(gone))
        self.next += len(gone)
        places = np.searchsorted(self.shares, self.random.random(count))
        return (mix64(torch.from_numpy(self.ids[places])) & ((1 << 61) - 1)) | (1 << 61)


def measure(rows: int, lookups: int, steps: int) -> dict[str, Any]:
    """One row of the table."""
    catalogue, managed = Catalogue(rows), TableMap(rows, ManagedRows(), CPU)
    batches = [catalogue.draw(lookups) for _ in range(steps)]
    seconds: dict[str, list[float]] = {"meet": [], "rows": [], "hash": []}
    half, found_rows = steps // 2, []
    for number, ids in enumerate(batches):
        times = [time.perf_counter()]
        managed.meet(ids.unique())
        times.append(time.perf_counter())
        found = managed.rows(ids)
        times.append(time.perf_counter())
        hashed = ids.remainder(rows)
        times.append(time.perf_counter())
        for name, begin, end in zip(seconds, times[:-1], times[1:], strict=True):
            seconds[name].append(end - begin)
        if number >= half:
            found_rows.append(torch.stack([ids, found, hashed]))
    ids, *ways = torch.cat(found_rows, dim=1)
    return {
        "rows": rows,
        "lookups": lookups,
        "meet_ms": 1e3 * statistics.mean(seconds["meet"]),
        "rows_ms": 1e3 * statistics.median(seconds["rows"]),
        "hash_ms": 1e3 * statistics.median(seconds["hash"]),
        "change_ms": 1e3 * max(seconds["meet"]),
        **{name: of_others(ids, way, rows) for name, way in zip(("managed", "hashed"), ways, strict=True)},
    }


def of_others(ids: torch.Tensor, found: torch.Tensor, rows: int) -> float:
    """ids (N,), their rows (N,): the share of a row's lookups that are other ids', the mean over all lookups."""
    _, place, counts = ids.unique(return_inverse=True, return_counts=True)
    of_row = torch.bincount(found, minlength=rows)[found]
    return float((1 - counts[place] / of_row).mean())


def main() -> None:
    """See the module's docstring."""
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    cases = [(10_000, 5_000, 300)] if options.quick else [(10_000, 5_000, 1000), (100_000, 20_000, 1000)]
    cases += [] if options.quick else [(1_000_000, 20_000, 1000)]
    rows = merged(options.merge) if options.merge else []
    if not rows:
        for case in cases:
            rows.append(measure(*case))
            print(f"{case[0]:,} rows: done", file=sys.stderr, flush=True)
    header = ["rows", "lookups a step", "meet, ms", "of which at a change", "rows, ms", "hash, ms"]
    header += ["of a row's lookups, other ids': managed", "hashed"]
    lines = []
    for r in rows:
        milliseconds = [f"{r[name]:.2f}" for name in ("rows_ms", "hash_ms")]
        sizes = [f"{r['rows']:,}", f"{r['lookups']:,}", f"{r['meet_ms']:.2f}", f"{r['change_ms']:.0f}"]
        lines.append([*sizes, *milliseconds, f"{r['managed']:.1%}", f"{r['hashed']:.1%}"])
    print(table(header, lines))
    finish(rows, [], options)


if __name__ == "__main__":
    main()
