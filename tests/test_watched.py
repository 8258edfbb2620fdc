"""A file that is damaged, one that may not be read and one whose storage fails are three errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from roo_ray.errors import BadInput, DataError, StorageError
from roo_ray.requests import scan, shards, users
from roo_ray.requests.shards import read_row_group
from roo_ray.requests.stages import readable_failure
from roo_ray.requests.users import read_users
from roo_ray.sources import base
from roo_ray.sources.base import list_parquet, make_units, read_footers, stream_unit
from roo_ray.watched import parquet_fault, storage_fault
from tests.ingest.test_faults import Remote

NOBODY = 65534
ROWS = 20_000
READERS: dict[str, Callable[[str], object]] = {
    "footer": lambda path: read_footers([path]),
    "rows": lambda path: [
        list(stream_unit(unit, ["user"])) for unit in make_units(read_footers([path]), {"user"}, "impressions")
    ],
    "users": lambda path: read_users(path, "user", pa.int64()),
    "shard": lambda path: read_row_group(os.path.dirname(path), os.path.basename(path), 0),
    "scan": lambda path: scan.find_users(os.path.dirname(path), os.path.basename(path), "user", pa.array([1, 2])),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Callable[[str], object]:
    return READERS[request.param]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": [i * i % 5003 for i in range(ROWS)]}), path, compression="snappy")
    return path


@pytest.fixture
def unprivileged(path: Path) -> Iterator[None]:
    """The file may not be read, by root neither, which gives its rights up for a while."""
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield
    if root:
        os.seteuid(0)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], int]], None]:
    """Puts a store in place of the local files."""

    def install(fault: Callable[[int], int]) -> None:
        store = pafs.PyFileSystem(Remote(fault))
        for module in (base, users, shards, scan):
            monkeypatch.setattr(module, "open_filesystem", lambda path: (store, path))

    return install


def spoil(path: Path, begin: int, end: int) -> None:
    content = bytearray(path.read_bytes())
    content[begin:end] = b"\xff" * len(content[begin:end])
    path.write_bytes(content)


def test_a_file_that_may_not_be_read_is_bad_input_that_says_so(
    reader: Callable[[str], object], path: Path, unprivileged: None
) -> None:
    with pytest.raises(DataError, match=r"a\.parquet may not be read \(.*Permission denied.*the right to read it") as e:
        reader(str(path))
    assert "Parquet" not in str(e.value)


def test_a_folder_that_may_not_be_listed(tmp_path: Path, path: Path, unprivileged: None) -> None:
    with pytest.raises(DataError, match=r"may not be read \(.*Permission denied"):
        list_parquet(str(tmp_path))


def test_a_file_that_is_gone(reader: Callable[[str], object], path: Path) -> None:
    path.unlink()
    with pytest.raises(DataError, match=r"not found: .*a\.parquet|a\.parquet is missing"):
        reader(str(path))


@pytest.mark.parametrize("fault", [errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, None])
def test_storage_that_fails_is_no_word_about_the_file(
    reader: Callable[[str], object], path: Path, remote: Callable[[Callable[[int], int]], None], fault: int | None
) -> None:
    """With an errno, as of a file system, and without, as of an object store's client."""

    def fails(count: int) -> int:
        raise OSError(fault, os.strerror(fault)) if fault else OSError("AWS Error NETWORK_CONNECTION: curlCode: 28")

    remote(fails)
    with pytest.raises(StorageError, match=r"a\.parquet could not be read \(.*nothing about the file.* run again") as e:
        reader(str(path))
    assert not isinstance(e.value, BadInput)


def test_storage_that_failed_once_has_failed(
    reader: Callable[[str], object], path: Path, remote: Callable[[Callable[[int], int]], None]
) -> None:
    """The second reading gets everything: the file is whole."""
    calls: list[int] = []
    at = 1 if reader is READERS["footer"] else 2  # the first reading takes the whole footer

    def fails_once(count: int) -> int:
        calls.append(count)
        if len(calls) == at:
            raise OSError("AWS Error SLOW_DOWN")
        return count

    remote(fails_once)
    with pytest.raises(StorageError, match="SLOW_DOWN"):
        reader(str(path))
    assert len(calls) > at


@pytest.mark.parametrize("where", ["footer", "magic", "page"])
@pytest.mark.parametrize("store", [False, True])
def test_a_damaged_file_stays_a_damaged_file(
    reader: Callable[[str], object],
    path: Path,
    remote: Callable[[Callable[[int], int]], None],
    where: str,
    store: bool,
) -> None:
    """Arrow reports thrift and snappy as OSError, too."""
    size = path.stat().st_size
    spoil(path, *{"footer": (size - 300, size - 20), "magic": (size - 4, size), "page": (4, size // 2)}[where])
    if where == "page" and reader is READERS["footer"]:
        reader(str(path))  # it is not looked at
        return
    if store:
        remote(lambda count: count)
    with pytest.raises(
        DataError, match=r"a\.parquet (is not a complete Parquet file|cannot be read|is truncated|has a)"
    ):
        reader(str(path))


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "brotli", "lz4", "none"])
@pytest.mark.parametrize("seed", range(8))
def test_no_damage_counts_as_storage_that_fails(tmp_path: Path, codec: str, seed: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": [f"u{i * seed % 101}" for i in range(ROWS)]}), path, compression=codec)
    begin = 4 + seed * path.stat().st_size // 10
    spoil(path, begin, begin + 200)
    said = None
    try:
        READERS["rows"](str(path))
    except DataError as error:
        said = str(error)
    assert said is None or "write or copy it again" in said  # other values can be decoded


def test_what_stores_say_of_permission() -> None:
    for words in ("AWS Error ACCESS_DENIED during HeadObject operation", "google::cloud::Status(PERMISSION_DENIED: x)"):
        assert isinstance(storage_fault("s3://b/k", OSError(words)), DataError)


def test_a_store_that_does_not_answer() -> None:
    store = pafs.S3FileSystem(
        access_key="a", secret_key="b", endpoint_override="127.0.0.1:9", scheme="http", connect_timeout=1,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )  # fmt: skip
    with pytest.raises(OSError, match="AWS Error") as error:
        store.open_input_file("bucket/a.parquet")
    found = parquet_fault(error.value, store, "bucket/a.parquet", "s3://bucket/a.parquet", "copy it again")
    assert isinstance(found, StorageError)
    assert "NETWORK_CONNECTION" in str(found)


def test_too_little_memory_is_said_as_it_is(path: Path) -> None:
    with pytest.raises(pa.ArrowMemoryError):
        parquet_fault(pa.ArrowMemoryError("malloc of size 1"), pafs.LocalFileSystem(), str(path), "a", "copy it again")


def test_what_a_task_meets() -> None:
    """A full disk is no bad input; what is not permitted is."""
    assert isinstance(readable_failure(OSError(errno.ENOSPC, "No space left"), "writing"), StorageError)
    for kind in (errno.EACCES, errno.ENOENT):
        assert isinstance(readable_failure(OSError(kind, "x"), "writing"), DataError)
    assert isinstance(readable_failure(pa.ArrowInvalid("x"), "writing"), DataError)
