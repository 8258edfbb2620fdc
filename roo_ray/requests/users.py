"""Users that a person names: a list of ids, a text file with one per line, or a Parquet file, in the data's type."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from roo_ray.errors import DataError
from roo_ray.requests.manifest import Manifest
from roo_ray.sources.base import AGAIN, open_parquet, plain_type
from roo_ray.sources.columns import as_array
from roo_ray.storage import open_filesystem, without_secrets
from roo_ray.watched import read_parquet, storage_fault

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

    Raises DataError naming the first id that is no ``kind``, where none is named, and where a file is damaged or may
    not be read; StorageError where its storage fails.
    """
    if os.path.isfile(given) or "/" in given or given.endswith((".txt", ".csv", ".parquet")):
        values = _of_file(given, column)
    else:
        values = pa.array([item.strip() for item in given.split(",") if item.strip()], pa.string())
    users = pc.unique(_as_type(values, kind, given)).drop_null()
    if not len(users):
        raise DataError(f"{given!r} names no user")
    return users.take(pc.sort_indices(users))


def _of_file(given: str, column: str) -> pa.Array:
    filesystem, path = open_filesystem(given)
    name = without_secrets(given)
    try:
        with filesystem.open_input_file(path) as file:
            begin = file.read(len(PARQUET_MAGIC))
            text = begin + (b"" if begin == PARQUET_MAGIC else file.read())
    except FileNotFoundError:
        raise DataError(f"file of users not found: {name}") from None
    except OSError as error:
        if os.path.isdir(given):
            raise DataError(f"file of users not found: {name} is a folder") from None
        raise storage_fault(name, error) from None
    if begin != PARQUET_MAGIC:
        try:
            lines = text.decode().splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is neither a Parquet file nor a text file in UTF-8 ({error})") from None
        return pa.array([line.strip() for line in lines if line.strip()], pa.string())

    def users(parquet: pq.ParquetFile) -> pa.Array:
        if column not in parquet.schema_arrow.names:
            raise DataError(f"{name}: no column '{column}' (the user column of the data set)")
        return as_array(parquet.read(columns=[column]).column(column))

    values = read_parquet(filesystem, path, users, name, AGAIN)
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
