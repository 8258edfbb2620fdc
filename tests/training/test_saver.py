"""Checkpoints in the background: complete or absent, whatever the disk and the processes do."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs as pafs
import pytest
import torch
from moto.server import ThreadedMotoServer

from roo_ray.errors import DataError
from roo_ray.storage import join_path, open_filesystem
from roo_ray.training import checkpoint
from roo_ray.training.saver import UNSCORED, Saver, keep_score, name_of, remove_leftovers
from tests.training.ranks import full_weights, run_ranks, sharded_model, train_steps
from tests.training.test_checkpoint import STATE


def _state(step: int) -> checkpoint.RunState:
    return STATE.model_copy(update={"step": step})


@pytest.fixture
def bucket() -> Iterator[str]:
    """A URI of a bucket on an S3 server on loopback."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
        aws_access_key_id="key", aws_secret_access_key="secret",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    yield f"s3://key:secret@bucket/run?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


def _save_while_training(rank: int, world: int, folder: str, store: str) -> dict[str, Any]:
    """Step 2 is saved; training goes on while it is written. Then the disk is full, for step 4, which then goes to
    an object store, over what a killed run has left there."""
    model = sharded_model()
    train_steps(model, rank, world, range(2))
    saved = full_weights(model)
    saver = Saver(pafs.LocalFileSystem(), folder, rank, world)
    run = {"lifetime": torch.arange(5.0), f"rng_{rank}": torch.get_rng_state()}
    saver.begin(name_of(0, 2), model, _state(2), {"a": 1.0}, run)
    train_steps(model, rank, world, range(2, 4))
    first = saver.collect()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # one rank's disk takes no more than a kilobyte
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    saver.begin(name_of(0, 4), model, _state(4), {})
    second = saver.collect()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    filesystem, base = open_filesystem(store)
    if rank == 0:
        with filesystem.open_output_stream(f"{base}/{name_of(0, 4)}/__9_0.distcp") as stream:
            stream.write(b"left")
    remote = Saver(filesystem, base, rank, world)
    remote.begin(name_of(0, 4), model, _state(4), {})
    third = remote.collect()
    return {"saved": saved, "first": vars(first), "second": vars(second), "third": third.problem}


def _load(rank: int, world: int, folder: str) -> dict[str, Any]:
    model = sharded_model()
    run = {"lifetime": torch.zeros(5), "unknown": torch.zeros(2), f"rng_{rank}": torch.zeros(1)}
    state = checkpoint.load(folder, model, run)
    return {"weights": full_weights(model), "step": state.step, "run": run}


def test_written_while_training_goes_on_and_a_full_disk_takes_no_checkpoint_away(tmp_path: Path, bucket: str) -> None:
    results = run_ranks(2, _save_while_training, str(tmp_path), bucket)
    first, second = tmp_path / name_of(0, 2), tmp_path / name_of(0, 4)
    assert results[0]["first"]["problem"] is None
    for result in results:  # the same words on all ranks
        assert "rank 1" in result["second"]["problem"] or "File too large" in result["second"]["problem"]
    assert results[0]["second"]["problem"] == results[1]["second"]["problem"]
    assert not second.exists()
    loaded = run_ranks(3, _load, str(first))  # on another number of ranks
    assert loaded[0]["step"] == 2
    assert set(loaded[0]["run"]) == {"lifetime"}
    assert torch.equal(loaded[0]["run"]["lifetime"], torch.arange(5.0))
    assert all(torch.equal(loaded[0]["weights"][name], value) for name, value in results[0]["saved"].items())

    assert [result["third"] for result in results] == [None, None]
    filesystem, base = open_filesystem(bucket)
    stored = filesystem.get_file_info(pafs.FileSelector(f"{base}/{name_of(0, 4)}"))
    assert "__9_0.distcp" not in {item.base_name for item in stored}
    with checkpoint.open_checkpoint(join_path(bucket, name_of(0, 4))).as_directory() as copy:
        assert checkpoint.read_state(copy).step == 4
        assert len(checkpoint.read_state(copy).files) == len(stored) - 1 >= 3

    # a file cut short by a power failure is noticed, and so is a crash before the last file
    torn = tmp_path / "torn"
    shutil.copytree(first, torn)
    victim = next(torn.glob("__1_*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{victim.name} has .* bytes"):
        checkpoint.read_state(torn)


def _die_while_writing(rank: int, world: int, folder: str) -> None:
    model = sharded_model()
    saver = Saver(pafs.LocalFileSystem(), folder, rank, world)
    saver.begin(name_of(0, 1), model, _state(1), {})
    saver.collect()

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    saver._complete = die  # type: ignore[method-assign]  # all shards are written, the last file is not
    saver.begin(name_of(0, 2), model, _state(2), {})
    saver.collect()


def test_a_crash_before_the_last_file_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever torch makes of a killed process)
        run_ranks(2, _die_while_writing, str(tmp_path))
    half, whole = tmp_path / name_of(0, 2), tmp_path / name_of(0, 1)
    assert (half / ".metadata").is_file()
    with pytest.raises(DataError, match="not a complete checkpoint"):
        checkpoint.read_state(half)
    (tmp_path / "other").mkdir()
    assert remove_leftovers(pafs.LocalFileSystem(), str(tmp_path), last_step=1) == [half.name]
    assert checkpoint.read_state(whole).step == 1
    assert (tmp_path / "other").is_dir()
    assert remove_leftovers(pafs.LocalFileSystem(), str(tmp_path), last_step=0) == [whole.name]


def test_a_checkpoint_without_a_figure_is_the_first_to_go() -> None:
    scores = [keep_score(metrics, "click") for metrics in ({}, {"eval/click/ne": math.nan}, {"eval/click/ne": 0.9})]
    assert scores == [UNSCORED, UNSCORED, -0.9]
    assert keep_score({"eval/click/ne": 0.8}, "click") > scores[2] > UNSCORED
