"""Users that a person names: a list of ids, a text file with one per line, or a Parquet file, in the data's type."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.requests.manifest import Manifest
from roo_ray.sources.base import open_parquet, plain_type
from roo_ray.sources.columns import as_array
from roo_ray.storage import open_filesystem

PARQUET_MAGIC = b"PAR1"


def user_type(data_set: str, manifest: Manifest) -> pa.DataType:
    """The type of the user column of a data set. Raises DataError for a data set without files."""
    if not manifest.files:
        raise DataError(f"version {manifest.version} of {data_set} has no requests")
    _, base = open_filesystem(data_set)
    with open_parquet(data_set, f"{base}/{manifest.files[0].path}") as file:
        return plain_type(file.schema_arrow.field(manifest.request_schema().keys.user).type)


def read_users(given: str, column: str, kind: pa.DataType) -> pa.Array:
    """The users that ``given`` names, sorted, each once, as values of type ``kind``: the path of a file, else ids
    with commas between them. ``column``: the user column of a Parquet file.

    Raises DataError naming the first id that is no ``kind``, and where none is named.
    """
    if os.path.isfile(given) or "://" in given:
        filesystem, path = open_filesystem(given)
        with filesystem.open_input_file(path) as stream:
            parquet = stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
        if parquet:
            values = _of_parquet(filesystem.open_input_file(path), given, column)
        else:
            with filesystem.open_input_stream(path) as stream:
                lines = stream.read().decode().splitlines()
            values = pa.array([line.strip() for line in lines if line.strip()], pa.string())
    elif "/" in given or given.endswith((".txt", ".csv", ".parquet")):
        raise DataError(f"file of users not found: {given}")
    else:
        values = pa.array([item.strip() for item in given.split(",") if item.strip()], pa.string())
    users = pc.unique(_as_type(values, kind, given)).drop_null()
    if not len(users):
        raise DataError(f"{given!r} names no user")
    return users.take(pc.sort_indices(users))


def _of_parquet(file: pa.NativeFile, given: str, column: str) -> pa.Array:
    try:
        with pq.ParquetFile(file) as parquet:
            if column not in parquet.schema_arrow.names:
                raise DataError(f"{given}: no column '{column}' (the user column of the data set)")
            values = as_array(parquet.read(columns=[column]).column(column))
    except pa.ArrowException as error:
        raise DataError(f"{given} is not a complete Parquet file ({error})") from None
    return values.cast(plain_type(values.type))


def _as_type(values: pa.Array, kind: pa.DataType, given: str) -> pa.Array:
    try:
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        for value in values.drop_null():
            try:
                value.cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise DataError(
                    f"{given}: '{value.as_py()}' is no user id of this data set, whose user column has type {kind}"
                ) from None
        raise
