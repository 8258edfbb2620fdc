"""What a reading that failed means: the file is bad, or its storage fails for now.

Only what proves a file bad may be passed over (``on_bad_shard: skip``): it is not there, or its bytes were read and
cannot be decoded. Everything else (no permission, too many open files, a store that asks to slow down) says nothing
about the file: it is tried again, and then an error. pyarrow reports both as OSError, with words of many libraries; so
a reading that failed is repeated over a file that remembers whether its storage has failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from roo_ray.errors import DataError, StorageError
from roo_ray.watched import WatchedFile, one_line

T = TypeVar("T")

WAITS = (0.0, 0.5, 2.0, 4.0)  # seconds before each further try


class BadShard(DataError):
    """A file that is missing, damaged, or not what the manifest says."""


class Watch:
    """How files are opened for one try. ``watching``: whether they remember how their storage fails."""

    def __init__(self, watching: bool) -> None:
        self.watching = watching
        self.opened: WatchedFile | None = None

    def over(self, file: pa.NativeFile, size: int | None, local: bool) -> pa.NativeFile:
        """The opened file of ``size`` bytes, to read from."""
        if not self.watching:
            return file
        self.opened = WatchedFile(file, None if local else size)  # a local file is what it gives
        return pa.PythonFile(self.opened, mode="r")

    def failure(self, error: Exception) -> Exception | None:
        """How storage has failed in the try that ended with ``error``; None where it has delivered all that it was
        asked for."""
        return self.opened.failure if self.opened is not None else error


def read_or_tell(read: Callable[[Watch], T], name: str, missing: str, damaged: str) -> T:
    """What ``read`` gives, which opens what it reads by the ``Watch``, anew where that is ``watching``.

    Raises BadShard where the file (``name``) is not there or cannot be decoded, with what to do in each case;
    StorageError where it could not be read however often it was tried; MemoryError at once.
    """
    failure: Exception | None = None
    for number, wait in enumerate((None, *WAITS)):
        watch = Watch(watching=number > 0)
        if wait:
            time.sleep(wait)
        try:
            return read(watch)
        except (MemoryError, DataError):
            raise
        except FileNotFoundError:
            raise BadShard(f"{name} is missing; {missing}") from None
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            failure = error
            if watch.watching:
                failure = watch.failure(error)
                if isinstance(failure, MemoryError):
                    raise failure from None
                if failure is None:
                    raise BadShard(
                        f"{name} cannot be read, it is truncated or damaged ({one_line(error)}); {damaged}"
                    ) from None
    assert failure is not None
    raise StorageError(
        f"{name} cannot be read, {1 + len(WAITS)} times over {sum(WAITS):g} s ({one_line(failure)}). That says nothing "
        "about the file, so it is not skipped; look at the storage, its permissions and limits, and run again with "
        "the same run_name"
    ) from None
