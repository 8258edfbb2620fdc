"""Keys of several columns over several tables: rows that belong together get one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from roo_ray.sources.columns import as_array, take_table
from roo_ray.sources.compare import Ints, Mask, differing_rows, same_as_previous, sort_codes

Column: TypeAlias = Any  # pa.Array or pa.ChunkedArray


def shared_ids(keys: Sequence[Sequence[Column | Ints]]) -> list[Ints]:
    """For each of several tables, given by its key columns (equal in number and type): (rows,) int64 numbers of
    its keys. Equal keys of any of the tables have one number; numbers sort as the keys do, from 0 without gaps."""
    codes = []
    for column in zip(*keys, strict=True):
        if isinstance(column[0], np.ndarray):
            codes.append(np.concatenate(column))
        else:
            codes.append(sort_codes(pa.concat_arrays([as_array(part) for part in column])))
    order = np.lexsort(codes[::-1])
    ids = np.empty(len(order), np.int64)
    ids[order] = np.cumsum(~same_as_previous(codes, order)) - 1
    ends = np.cumsum([len(table[0]) for table in keys])
    return [ids[end - len(table[0]) : end] for end, table in zip(ends, keys, strict=True)]


def first_of_each(ids: Ints, order: Ints) -> tuple[Ints, Ints]:
    """(first, repeats): of rows with equal ``ids``, the first in ``order`` (which sorts by ``ids``), and (rows,) for
    every row in ``order`` the first one of its id."""
    begins = ~same_as_previous([ids], order)
    starts = np.flatnonzero(begins)
    return order[starts], order[starts][np.cumsum(begins) - 1]


def name_of_difference(table: pa.Table, left: Ints, right: Ints) -> tuple[str, int] | None:
    """The first column, and place in ``left``, where rows ``left`` and ``right`` of a table differ; None where they
    are equal in all columns."""
    for name in table.column_names:
        differs = differing_rows(table.column(name), left, right)
        if differs.any():
            return name, int(np.argmax(differs))
    return None


def rows_by_id(ids: Ints, count: int) -> Ints:
    """(count,) int64: the row with each number, -1 where there is none. ``ids`` are unique."""
    rows = np.full(count, -1, np.int64)
    rows[ids] = np.arange(len(ids))
    return rows


def describe_row(table: pa.Table, row: int, columns: Sequence[str]) -> str:
    """``user_id=7, item_id=9``: the values of some columns of a row, for messages."""
    return ", ".join(f"{name}={table.column(name)[row].as_py()}" for name in columns)


def take_rows(table: pa.Table, rows: Ints | Mask) -> pa.Table:
    """Some rows of a table, by number or by mask."""
    index: Ints = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows.astype(np.int64, copy=False)
    return take_table(table, index)
