"""What grouping an impression table by request would give: read from a sample, before anything is adopted.

The sample is of whole requests: those with the smallest hashes of the request key, found in one pass over the key
columns alone; a second pass reads all columns and keeps their rows. Memory is that of the sample and of a few
batches, whatever the table's size. No schema is needed; see ``profile_schema`` for the one that is suggested.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError
from roo_ray.requests.grouping import describe_key, short
from roo_ray.sources.base import (
    ParquetInput,
    ReadUnit,
    codecs,
    common_schema,
    compressed_bytes,
    make_units,
    read_footers,
    stream_unit,
    to_plain,
)
from roo_ray.sources.columns import as_array
from roo_ray.sources.compare import Ints, differing_rows, same_as_previous, sort_codes
from roo_ray.sources.hashing import Hashes, hash_rows

SAMPLE_BYTES = 400_000_000
THREADS = max(2, min(8, os.cpu_count() or 2))
ALL_HASHES = 2.0**64


@dataclass(frozen=True)
class ImpressionTable:
    """A Parquet table whose footers were read and agree. ``key``: the columns of the request key."""

    inputs: list[ParquetInput]
    types: pa.Schema
    key: list[str]

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(item.metadata.num_rows for item in self.inputs)

    @property
    def codec(self) -> str:
        """The compression of the files."""
        return codecs(self.inputs)

    def disk_bytes(self) -> dict[str, int]:
        """Compressed bytes of each column in all files."""
        return compressed_bytes(self.inputs, self.types.names)

    def units(self, columns: Sequence[str]) -> list[ReadUnit]:
        """Pieces of the files that are read at once, for some columns."""
        return make_units(self.inputs, set(columns), "impressions")


@dataclass(frozen=True)
class Sample:
    """``rows``: all impressions of the sampled requests, in the table's order; ``requests``: how many those are.
    ``all_requests``: of the whole table, ``exact`` or estimated. ``null_keys``: rows left out for their null key."""

    rows: pa.Table
    requests: int
    all_requests: int
    exact: bool
    null_keys: int


@dataclass(frozen=True)
class ColumnUse:
    """How a column behaves within requests: ``varying`` of ``several`` requests with more than one impression
    have different values; ``example``: the first of them. ``distinct``: different values in the sample (of the
    elements, for lists; -1 for types that have none)."""

    name: str
    kind: str
    varying: int
    several: int
    nulls: int
    distinct: int
    once: int = 0
    twice: int = 0
    example: str = ""

    @property
    def share(self) -> float:
        """Share of the requests with several impressions in which it varies."""
        return self.varying / self.several if self.several else 0.0


@dataclass(frozen=True)
class Use:
    """The columns' behaviour and the sample's rows by request: ``order`` (rows,), ``starts`` (requests,)."""

    columns: dict[str, ColumnUse]
    order: Ints
    starts: Ints
    lengths: Ints = field(repr=False)


def open_table(paths: Sequence[str], key: Sequence[str], named: Sequence[str] = ()) -> ImpressionTable:
    """Reads the footers of the Parquet files at ``paths`` (local or URIs). Raises DataError where there is none,
    files disagree, a column of the ``key`` or another one that the user ``named`` is not there, or a key column
    cannot name a request."""
    inputs = read_footers(paths)
    names = inputs[0].schema.names
    for column in [*key, *named]:
        if column not in names:
            close = difflib.get_close_matches(column, names, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(sorted(names))}"
            raise DataError(f"{inputs[0].path}: there is no column '{column}'; {hint}")
    types = common_schema(inputs, names)
    for column in key:
        kind = types.field(column).type
        if pa.types.is_nested(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
            raise DataError(f"column '{column}' has type {kind}; a request key needs integers, strings or timestamps")
    table = ImpressionTable(inputs, types, list(dict.fromkeys(key)))
    if table.rows == 0:
        raise DataError(f"{', '.join(paths)}: {len(inputs)} Parquet files without a single row")
    return table


# ---- the sample ----------------------------------------------------------------------------------


def _batches(table: ImpressionTable, unit: ReadUnit, columns: Sequence[str]) -> Iterator[tuple[pa.Table, Hashes, int]]:
    """(rows with a whole key, their hashes, rows without one)."""
    types = pa.schema([table.types.field(name) for name in columns])
    for batch in stream_unit(unit, columns):
        rows = to_plain(pa.Table.from_batches([batch]), types)
        known = np.ones(rows.num_rows, np.bool_)
        for name in table.key:
            if rows.column(name).null_count:
                known &= np.asarray(pc.is_valid(rows.column(name)))
        nulls = int((~known).sum())
        if nulls:
            rows = rows.filter(pa.array(known))
        yield rows, hash_rows(rows, table.key), nulls


def _smallest_hashes(table: ImpressionTable, requests: int) -> tuple[Hashes, int, bool, int]:
    """(the ``requests`` smallest hashes of request keys, requests of the table, whether exact, null keys)."""

    def smallest(unit: ReadUnit) -> tuple[Hashes, bool, int]:
        found, more, nulls = np.zeros(0, np.uint64), False, 0
        for _, hashes, without in _batches(table, unit, table.key):
            found = np.union1d(found, hashes)
            more |= len(found) > requests
            found, nulls = found[:requests], nulls + without
        return found, more, nulls

    found, more, nulls = np.zeros(0, np.uint64), False, 0
    with ThreadPoolExecutor(THREADS) as pool:
        for part, cut, without in pool.map(smallest, table.units(table.key)):
            found = np.union1d(found, part)
            more |= cut or len(found) > requests
            found, nulls = found[:requests], nulls + without
    if not len(found):
        raise DataError(f"the request key ({', '.join(table.key)}) is null in all {nulls} rows; use another key")
    # the k-th smallest of n uniform numbers is near k / n
    total = round((len(found) - 1) * ALL_HASHES / float(found[-1])) if more else len(found)
    return found, max(total, len(found)), not more, nulls


def take_sample(table: ImpressionTable, requests: int, most_bytes: int = SAMPLE_BYTES) -> Sample:
    """All rows of about so many requests, fewer where they would need more than ``most_bytes`` of memory."""
    wanted, total, exact, nulls = _smallest_hashes(table, requests)
    limit = wanted[-1]  # falls where the sample gets too large

    def sampled(unit: ReadUnit) -> list[tuple[pa.Table, Hashes]]:
        found = []
        for rows, hashes, _ in _batches(table, unit, table.types.names):
            keep = hashes <= limit
            if keep.any():
                found.append((rows.filter(pa.array(keep)), hashes[keep]))
        return found

    kept: list[tuple[pa.Table, Hashes]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(sampled, table.units(table.types.names)):
            kept += [(rows.filter(pa.array(hashes <= limit)), hashes[hashes <= limit]) for rows, hashes in part]
            while sum(rows.nbytes for rows, _ in kept) > most_bytes and wanted[0] < limit:
                limit = wanted[max(0, int(np.searchsorted(wanted, limit)) // 2)]
                kept = [(rows.filter(pa.array(hashes <= limit)), hashes[hashes <= limit]) for rows, hashes in kept]
    rows = pa.concat_tables([table.types.empty_table(), *(rows for rows, _ in kept)]).combine_chunks()
    return Sample(rows, int(np.searchsorted(wanted, limit)) + 1, total, exact, nulls)


# ---- what varies ---------------------------------------------------------------------------------


def analyse(sample: Sample, key: Sequence[str]) -> Use:
    """How each column behaves within the sample's requests. Raises DataError where no request has two
    impressions: nothing can be told then."""
    rows = sample.rows
    codes = [sort_codes(rows.column(name)) for name in key]
    order = np.lexsort(codes[::-1])
    starts = np.flatnonzero(~same_as_previous(codes, order))
    lengths = np.diff(np.append(starts, rows.num_rows))
    several = int((lengths > 1).sum())
    if not several:
        raise DataError(
            f"every one of the {len(starts)} requests in the sample has one impression: the request key "
            f"({', '.join(key)}) names impressions, or the table is not an impression log; use another key"
        )
    first = np.repeat(order[starts], lengths)
    uses = {}
    for name in rows.column_names:
        column = rows.column(name)
        differs = np.flatnonzero(differing_rows(column, order, first)) if name not in key else np.zeros(0, np.int64)
        varying = len(np.unique(np.searchsorted(starts, differs, side="right")))
        example = ""
        if varying:
            at = [int(first[differs[0]]), int(order[differs[0]])]
            values = " and ".join(short(column[row].as_py()) for row in at)
            example = f"{describe_key(rows, at[0], key)}: {values}"
        distinct = _distinct(column, order[starts], not varying)
        uses[name] = ColumnUse(name, str(column.type), varying, several, column.null_count, *distinct, example)
    return Use(uses, order, starts, lengths)


def _distinct(column: pa.ChunkedArray, firsts: npt.NDArray[np.int64], constant: bool) -> tuple[int, int, int]:
    """(distinct values, values seen once, values seen twice), of one row a request where it is ``constant``; of
    the elements of lists."""
    values = as_array(column.take(pa.array(firsts)) if constant else column)
    if pa.types.is_list(values.type):
        values = values.flatten()
    if pa.types.is_nested(values.type) or pa.types.is_null(values.type):
        return -1, 0, 0
    counts = np.asarray(pc.value_counts(values.drop_null()).field("counts"))
    return len(counts), int((counts == 1).sum()), int((counts == 2).sum())
