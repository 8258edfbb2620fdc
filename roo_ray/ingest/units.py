"""The reading units of a data set: the row groups of its files, or runs of rows of an impression table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roo_ray.requests.manifest import ShardFile

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UnitRef:
    """A row group to read: ``path`` relative to the data set, ``requests`` in it as the manifest counts, and its
    ``impressions`` and history events (``tokens``). ``rows``: of a unit of an impression table, the first row in the
    file and how many. By the rest another file is told from the one that the manifest is of: ``file_bytes``, its size
    (``ShardFile.bytes``; 0 where not known), and the time range that all its requests are in, seconds since the
    epoch."""

    path: str
    row_group: int
    requests: int
    rows: tuple[int, int] | None = None
    impressions: int = 0
    tokens: int = 0
    file_bytes: int = 0
    time_min: float = -math.inf
    time_max: float = math.inf


@dataclass(frozen=True)
class Units:
    """The row groups of some shard files, in stored order, as columns: all arrays are (U,) int64, but the times
    of the first and last request, (U,) float64 seconds: the unit's where the manifest knows them, else the
    file's. ``first_row``: of a unit of an impression table, its first row in the file; -1 in request shards.
    ``shared``: the row group that several units of an impression table share; -1 where it is no such unit.
    ``file_bytes`` (files,): of ``paths``."""

    paths: tuple[str, ...]
    file_bytes: tuple[int, ...]
    file: Integers
    row_group: Integers
    requests: Integers
    impressions: Integers
    tokens: Integers
    first_row: Integers
    shared: Integers
    time_min: npt.NDArray[np.float64]
    time_max: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.file)

    def ref(self, unit: int) -> UnitRef:
        """The unit's name, as the reader takes it."""
        first = int(self.first_row[unit])
        rows = (first, int(self.impressions[unit])) if first >= 0 else None
        return UnitRef(
            self.paths[self.file[unit]],
            int(self.row_group[unit]),
            int(self.requests[unit]),
            rows,
            int(self.impressions[unit]),
            int(self.tokens[unit]),
            self.file_bytes[self.file[unit]],
            float(self.time_min[unit]),
            float(self.time_max[unit]),
        )


def units_of(files: Sequence[ShardFile]) -> Units:
    """The units of shard files, in the files' order. Units without requests are left out: nothing to read."""
    rows = [
        (
            f,
            g,
            unit.requests,
            unit.impressions,
            unit.tokens,
            -1 if unit.first_row is None else unit.first_row,
            -1 if unit.row_group is None else unit.row_group,
        )
        for f, file in enumerate(files)
        for g, unit in enumerate(file.units)
        if unit.requests
    ]
    times = [
        (
            file.time_min if unit.time_min is None else unit.time_min,
            file.time_max if unit.time_max is None else unit.time_max,
        )
        for file in files
        for unit in file.units
        if unit.requests
    ]
    of_file, group, requests, impressions, tokens, first_row, shared = np.array(rows, np.int64).reshape(-1, 7).T
    first, last = np.array(times, np.float64).reshape(-1, 2).T
    paths = tuple(file.path for file in files)
    sizes = tuple(file.bytes for file in files)
    return Units(paths, sizes, of_file, group, requests, impressions, tokens, first_row, shared, first, last)
