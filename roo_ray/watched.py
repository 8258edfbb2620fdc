"""Whether a Parquet file that could not be read is damaged, or its storage fails.

pyarrow raises OSError for both: with an ``errno`` for what a file system says, without one for what its decoders find
and for what the clients of object stores meet. So a reading that failed is repeated over a file that remembers whether
its storage has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from roo_ray.errors import DataError, RooError, StorageError
from roo_ray.redact import redact_text

T = TypeVar("T")

DENIED = ("ACCESS_DENIED", "PERMISSION_DENIED")  # of S3 and of Google Cloud Storage, which give no errno


class WatchedFile:
    """A file that keeps the error with which its storage has failed, in ``failure``. One of ``size`` bytes that gives
    fewer has failed; without ``size`` it is what it gives."""

    def __init__(self, file: pa.NativeFile, size: int | None) -> None:
        self._file, self._size = file, size
        self.failure: Exception | None = None

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def read(self, count: int = -1) -> bytes:
        begin = self._file.tell()
        try:
            read = bytes(self._file.read(None if count < 0 else count))
            whole = None if self._size is None else self._size - begin if count < 0 else min(count, self._size - begin)
            if whole is not None and len(read) < whole:
                raise OSError(f"only {len(read)} of {whole} bytes from {begin} on were delivered")
        except Exception as error:
            self.failure = error
            raise
        return read


def storage_fault(name: str, error: Exception) -> RooError:
    """The error for a file or folder whose storage fails: DataError where it is not there or may not be read, else
    StorageError."""
    reason = one_line(error)
    if isinstance(error, FileNotFoundError):
        return DataError(f"file not found: {name}")
    if isinstance(error, PermissionError) or any(word in reason for word in DENIED):
        return DataError(
            f"{name} may not be read ({reason}); give the job's user, on every node, or its credentials for the store "
            "the right to read it"
        )
    return StorageError(
        f"{name} could not be read ({reason}). That says nothing about the file: look at its storage, the network and "
        "the limits of both, and run again"
    )


def parquet_fault(
    error: Exception,
    filesystem: pafs.FileSystem,
    path: str,
    name: str,
    advice: str,
    *,
    says: str = "is not a complete Parquet file",
    again: Callable[[pq.ParquetFile], object] = lambda file: None,
) -> RooError:
    """The error for a Parquet file of which a reading ended with ``error``, OSError or of Arrow: as ``storage_fault``
    says, or, where all bytes are delivered and cannot be decoded, DataError with the ``advice``. ``name``: as it is
    shown; ``again``: the reading, over the opened file. Raises MemoryError as it is."""
    if isinstance(error, MemoryError):  # pyarrow's is one of its own as well
        raise error
    failure: Exception | None = error
    if not isinstance(error, OSError) or error.errno is None:
        failure = _failure_in(filesystem, path, again, error)
    return (
        DataError(f"{name} {says} ({one_line(error)}); {advice}") if failure is None else storage_fault(name, failure)
    )


def read_parquet(
    filesystem: pafs.FileSystem, path: str, read: Callable[[pq.ParquetFile], T], name: str, advice: str
) -> T:
    """What ``read`` gives of a Parquet file. Raises as ``parquet_fault`` says."""
    try:
        with pq.ParquetFile(filesystem.open_input_file(path)) as file:
            return read(file)
    except (pa.ArrowException, OSError) as error:
        raise parquet_fault(error, filesystem, path, name, advice, again=read) from None


def _failure_in(
    filesystem: pafs.FileSystem, path: str, again: Callable[[pq.ParquetFile], object], error: Exception
) -> Exception | None:
    """How storage has failed, which it did as well where the reading succeeds now; None where it has not."""
    try:
        file = filesystem.open_input_file(path)
        size = None if isinstance(filesystem, pafs.LocalFileSystem) else file.size()
    except OSError as failure:
        return failure
    watched = WatchedFile(file, size)
    try:
        with pq.ParquetFile(pa.PythonFile(watched, mode="r")) as parquet:
            again(parquet)
    except (pa.ArrowException, OSError):
        return watched.failure
    return error


def one_line(error: Any) -> str:
    """The beginning of an error's message, without credentials."""
    return redact_text(" ".join(str(error).split())[:200])
