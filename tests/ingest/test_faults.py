"""What fails for now is tried again and then an error; only what proves a file bad is passed over."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from roo_ray.config import Holdout
from roo_ray.errors import DataError, StorageError
from roo_ray.ingest import clustered, faults, read
from roo_ray.ingest.clustered import index_impressions
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Window
from roo_ray.ingest.read import BadShard
from roo_ray.ingest.units import units_of
from tests.ingest import shard_maker
from tests.ingest.test_clustered import SCHEMA as LOG_SCHEMA
from tests.ingest.test_clustered import impressions, write
from tests.ingest.test_pack import COUNTS, SCHEMA, pack_settings, window_of

Made = tuple[PackSettings, Window, Path]


def shards(folder: Path) -> Made:
    """Request shards, to be skipped where bad; all in a window; the first of their two files."""
    manifest = shard_maker.write_data_set(folder, shard_maker.random_rows(COUNTS[:40], 5), SCHEMA)
    settings = replace(pack_settings(folder), on_bad_shard="skip")
    return settings, window_of(manifest), folder / manifest.files[0].path


def log(folder: Path) -> Made:
    """The same of an impression table."""
    write(folder / "log/a.parquet", impressions([3] * 20))
    write(folder / "log/b.parquet", impressions([3] * 20, first=20))
    units = units_of(index_impressions(str(folder / "index"), [str(folder / "log")], LOG_SCHEMA).files)
    holdout = Holdout(by="request", fraction=1e-12)
    settings = PackSettings(str(folder / "index"), LOG_SCHEMA, holdout, "train", 20, on_bad_shard="skip")
    return settings, Window(0, 0, 0, tuple(map(units.ref, range(len(units)))), None), folder / "log/a.parquet"


@pytest.fixture(params=[shards, log])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    result: Made = request.param(tmp_path)
    return result


def skipped(made: Made) -> int:
    table = pack_window(made[0], made[1])
    return int(sum(table.column("skipped_requests").to_pylist()))


@pytest.fixture
def no_files() -> Any:
    """Calls to take and give back the right to open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(some: bool) -> None:
        # what is open stays open
        resource.setrlimit(resource.RLIMIT_NOFILE, before if some else (3, before[1]))

    yield allow
    allow(True)


def test_a_process_out_of_file_handles_waits_for_them(
    made: Made, no_files: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        no_files(len(waits) > 1)

    monkeypatch.setattr(faults.time, "sleep", wait)
    no_files(False)
    assert skipped(made) == 0
    assert waits == [0.5, 2.0]


def test_what_fails_for_long_is_an_error_that_names_the_file_and_is_not_skipped(
    made: Made, no_files: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    no_files(False)
    try:
        with pytest.raises(StorageError, match=rf"{made[2].name} cannot be read, 5 times.*Too many open files"):
            skipped(made)
    finally:
        no_files(True)
    assert not issubclass(StorageError, BadShard)
    assert skipped(made) == 0


class Remote(pafs.FileSystemHandler):  # type: ignore[misc]
    """Local files as a store in the network gives them: ``fault`` is asked before each reading, and may raise or
    say how many bytes arrive."""

    def __init__(self, fault: Callable[[int], int]) -> None:
        self.fault, self.local = fault, pafs.LocalFileSystem()

    def get_type_name(self) -> str:
        return "remote"

    def get_file_info(self, paths: list[str]) -> Any:
        return self.local.get_file_info(paths)

    def open_input_file(self, path: str) -> pa.NativeFile:
        handler, file = self, self.local.open_input_file(path)

        class Faulty:
            closed = False

            def close(self) -> None:
                file.close()

            def tell(self) -> int:
                return int(file.tell())

            def seek(self, offset: int, whence: int = 0) -> int:
                return int(file.seek(offset, whence))

            def read(self, count: int = -1) -> bytes:
                return bytes(file.read(handler.fault(count)))

        return pa.PythonFile(Faulty(), mode="r")

    def unused(self, *arguments: Any) -> Any:
        raise NotImplementedError

    __eq__ = object.__eq__  # type: ignore[assignment]
    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = delete_root_dir_contents = unused
    get_file_info_selector = move = normalize_path = open_append_stream = open_input_stream = unused
    open_output_stream = unused


def through(monkeypatch: pytest.MonkeyPatch, fault: Callable[[int], int]) -> None:
    """All reading goes through a remote store."""
    store = pafs.PyFileSystem(Remote(fault))
    for module in (read, clustered):
        monkeypatch.setattr(module, "open_filesystem", lambda path: (store, os.path.abspath(path)))
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)


def test_a_store_that_asks_to_slow_down_is_asked_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors come as OSError without a number, as damage does."""
    draw, fails = random.Random(3), 0

    def fault(count: int) -> int:
        nonlocal fails
        if draw.random() < 0.05:
            fails += 1
            raise OSError("When reading information for key 'a': AWS Error SLOW_DOWN during GetObject operation")
        return count

    through(monkeypatch, fault)
    assert skipped(made) == 0
    assert fails


@pytest.mark.parametrize("short", [False, True])
def test_a_store_that_fails_for_long_is_no_bad_shard(made: Made, monkeypatch: pytest.MonkeyPatch, short: bool) -> None:
    def fault(count: int) -> int:
        if short:
            return max(count - 1, 0)
        raise OSError("AWS Error ACCESS_DENIED; token=hush")

    through(monkeypatch, fault)
    words = "only [0-9]+ of [0-9]+ bytes" if short else r"ACCESS_DENIED; token=\*\*\*"
    with pytest.raises(StorageError, match=rf"{made[2].name} cannot be read, 5 times over 6.5 s \(.*{words}"):
        skipped(made)


def test_memory_that_is_short_is_said_as_it_is(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(count: int) -> int:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    through(monkeypatch, fault)
    with pytest.raises(MemoryError):
        skipped(made)


@pytest.mark.parametrize("remote", [False, True])
def test_any_damage_is_a_bad_shard_at_once(made: Made, monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    """Bytes overwritten anywhere, or a file of the right size that ends early: what cannot be decoded is skipped,
    without waiting. (What can be decoded all the same, is.)"""
    settings, window, path = made
    window = replace(window, units=tuple(replace(unit, file_bytes=0) for unit in window.units))
    if remote:
        through(monkeypatch, lambda count: count)
    whole, found = path.read_bytes(), 0
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: pytest.fail("waits"))
    for seed in range(30):
        draw, damaged = random.Random(seed), bytearray(whole)
        at = draw.randrange(len(damaged))
        damaged[at : at + 300] = draw.randbytes(len(damaged[at : at + 300]))
        path.write_bytes(damaged[:at] if seed % 4 == 0 else damaged)
        try:
            found += skipped((settings, window, path)) > 0
        except DataError:  # wrong values that can be decoded
            continue
    assert found > 15


def test_an_object_that_is_gone_is_skipped_and_a_store_that_is_gone_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real client of S3."""
    server_module = pytest.importorskip("moto.server", reason="moto's server is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings, window, path = shards(tmp_path)
    try:
        store = pafs.S3FileSystem(
            access_key="test",
            secret_key="test",
            endpoint_override=f"{host}:{port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        )
        store.create_dir("faults")
        pafs.copy_files(str(tmp_path), "faults", destination_filesystem=store)
        monkeypatch.setattr(read, "open_filesystem", lambda path: (store, "faults"))
        monkeypatch.setattr(faults, "WAITS", (0.0,))
        assert skipped((settings, window, path)) == 0
        store.delete_file(f"faults/{path.relative_to(tmp_path)}")
        assert skipped((settings, window, path)) == 20
    finally:
        server.stop()
    with pytest.raises(StorageError, match=rf"{path.name} cannot be read, 2 times"):
        skipped((settings, window, path))
