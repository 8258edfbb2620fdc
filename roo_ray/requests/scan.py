"""Which files of a data set hold given users: found by row-group statistics, then by the user column alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from roo_ray.requests.shards import RESTORE
from roo_ray.sources.base import leaf_columns, open_parquet
from roo_ray.sources.columns import as_array
from roo_ray.storage import join_path, open_filesystem, without_secrets
from roo_ray.watched import parquet_fault

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Held:
    """``rows`` of a file that belong to the users; ``users``: positions of those found in the list of users;
    ``checked``: False where the file has no user column."""

    path: str
    rows: int
    users: npt.NDArray[np.int64]
    checked: bool = True


def user_positions(column: pa.Array | pa.ChunkedArray, users: pa.Array) -> pa.Array:
    """(rows,) int32: the position of each row's user in ``users``; null where it is none of them."""
    array = as_array(column)
    if array.type != users.type:
        try:
            array = array.cast(users.type)
        except pa.ArrowException:  # another log's ids, in a wider type
            array, users = array.cast(pa.string()), users.cast(pa.string())
    return pc.index_in(array, value_set=users)


def rows_of_users(column: pa.Array | pa.ChunkedArray, users: pa.Array) -> Mask:
    """(rows,) bool: whether each row's user is one of ``users``; a null is no user."""
    mask: Mask = np.asarray(user_positions(column, users).is_valid())
    return mask


def find_users(data_set: str, path: str, column: str, users: pa.Array) -> Held:
    """The rows of users in a file of the data set. ``users``: sorted, without null. Reads the user column of row
    groups whose statistics do not rule all users out. Raises DataError where the file is missing, damaged or may not be
    read, or its user column is of another type; StorageError where storage fails."""
    filesystem, base = open_filesystem(data_set)
    found: list[npt.NDArray[np.int64]] = []
    rows = 0
    with open_parquet(data_set, f"{base}/{path}") as file:
        if column not in file.schema_arrow.names:
            return Held(path, 0, np.zeros(0, np.int64), checked=False)
        groups = [g for g in range(file.num_row_groups) if _may_hold(file.metadata, g, column, users)]
        for group in groups:

            def read(opened: pq.ParquetFile, group: int = group) -> pa.Array:
                return user_positions(opened.read_row_group(group, columns=[column]).column(column), users).drop_null()

            try:
                positions = read(file)
            except (pa.ArrowException, OSError) as error:
                says = f"has a column '{column}' that cannot be read"
                name = without_secrets(join_path(data_set, path))
                place = f"{base}/{path}"
                raise parquet_fault(error, filesystem, place, name, RESTORE, says=says, again=read) from None
            rows += len(positions)
            found.append(np.unique(np.asarray(positions)).astype(np.int64))
    return Held(path, rows, np.unique(np.concatenate([np.zeros(0, np.int64), *found])))


def _may_hold(metadata: pq.FileMetaData, group: int, column: str, users: pa.Array) -> bool:
    chunk = metadata.row_group(group).column(leaf_columns(metadata).index(column))
    statistics = chunk.statistics if chunk.is_stats_set else None
    if statistics is None or not statistics.has_min_max:
        return True
    try:
        bounds = pa.array([statistics.min, statistics.max], users.type)
    except (pa.ArrowException, TypeError, ValueError):
        return True
    inside = pc.and_(pc.greater_equal(users, bounds[0]), pc.less_equal(users, bounds[1]))
    return bool(pc.any(inside).as_py())
