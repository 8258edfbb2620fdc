"""Checkpoints in the background: complete or absent, whatever the disk and the processes do."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.remote_device import _remote_device

from roo_ray.errors import ConfigError, DataError
from roo_ray.storage import join_path, open_filesystem
from roo_ray.training import checkpoint, saver
from roo_ray.training.packing import leaves
from roo_ray.training.saver import UNSCORED, Saver, copy_of, keep_score, name_of, remove_leftovers
from tests.training.ranks import full_weights, run_ranks, sharded_model, train_steps
from tests.training.test_checkpoint import STATE


def _state(step: int) -> checkpoint.RunState:
    return STATE.model_copy(update={"step": step})


def _save_while_training(rank: int, world: int, folder: str, store: str) -> dict[str, Any]:
    """Step 2 is saved; training goes on while it is written. Then the disk is full, for step 4, which then goes to
    an object store, over what a killed run has left there."""
    model = sharded_model()
    train_steps(model, rank, world, range(2))
    saved = full_weights(model)
    writer = Saver(pafs.LocalFileSystem(), folder, rank, world)
    run = {"lifetime": torch.arange(5.0), f"rng_{rank}": torch.get_rng_state()}
    writer.begin(name_of(0, 2), model, _state(2), {"a": 1.0}, run)
    train_steps(model, rank, world, range(2, 4))
    first = writer.collect()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # one rank's disk takes no more than a kilobyte
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    writer.begin(name_of(0, 4), model, _state(4), {})
    second = writer.collect()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    filesystem, base = open_filesystem(store)
    if rank == 0:
        with filesystem.open_output_stream(f"{base}/{name_of(0, 4)}/__9_0.distcp") as stream:
            stream.write(b"left")
    remote = Saver(filesystem, base, rank, world)
    remote.begin(name_of(0, 4), model, _state(4), {})
    third = remote.collect()
    if rank == 1:  # and one rank's scratch disk takes no folder
        tempfile.tempdir = f"{folder}/nowhere"
    remote.begin(name_of(0, 5), model, _state(5), {})
    fourth = remote.collect()
    tempfile.tempdir = None

    def fail() -> None:
        if rank == 1:
            raise ValueError("not of the disk")

    remote.first = fail
    remote.begin(name_of(0, 6), model, _state(6), {})
    others = {"third": third.problem, "fourth": fourth.problem, "fifth": remote.collect().problem}
    return {"saved": saved, "first": vars(first), "second": vars(second)} | others


def _load(rank: int, world: int, folder: str) -> dict[str, Any]:
    model = sharded_model()
    run = {"lifetime": torch.zeros(5), "unknown": torch.zeros(2), f"rng_{rank}": torch.zeros(1)}
    state = checkpoint.load(folder, model, run)
    return {"weights": full_weights(model), "step": state.step, "run": run}


def test_written_while_training_goes_on_and_a_full_disk_takes_no_checkpoint_away(
    tmp_path: Path, bucket: Callable[[str], str]
) -> None:
    store = bucket("run")
    results = run_ranks(2, _save_while_training, str(tmp_path), store)
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
    assert results[0]["fourth"] == results[1]["fourth"]
    assert results[0]["fourth"].startswith("rank 1: ")
    assert "nowhere" in results[0]["fourth"]
    assert [result["fifth"] for result in results] == ["rank 1: ValueError: not of the disk"] * 2
    filesystem, base = open_filesystem(store)
    for step in (5, 6):
        assert filesystem.get_file_info(f"{base}/{name_of(0, step)}/state.json").type == pafs.FileType.NotFound
    stored = filesystem.get_file_info(pafs.FileSelector(f"{base}/{name_of(0, 4)}"))
    assert "__9_0.distcp" not in {item.base_name for item in stored}
    with checkpoint.open_checkpoint(join_path(store, name_of(0, 4))).as_directory() as copy:
        assert checkpoint.read_state(copy).step == 4
        assert len(checkpoint.read_state(copy).files) == len(stored) - 1 >= 3

    # a file cut short by a power failure is noticed, and so is a crash before the last file
    torn = tmp_path / "torn"
    shutil.copytree(first, torn)
    victim = next(torn.glob("__1_*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{victim.name} has .* bytes"):
        checkpoint.read_state(torn)


def _as_on_gpus(tensors: dict[str, Any]) -> list[ShardedTensor]:
    """Says of these tensors, in place, what TorchRec says of a GPU run's: the sharded ones, which lie in host memory,
    are on GPUs by their metadata."""
    sharded = [value for _, value in leaves(tensors) if isinstance(value, ShardedTensor)]
    for value in sharded:
        shards = [shard.metadata for shard in value.local_shards()] + value.metadata().shards_metadata
        for metadata in shards:
            assert metadata.placement is not None
            rank = metadata.placement.rank()
            metadata.placement = _remote_device(f"rank:{rank}/cuda:{rank}")
    return sharded


def _devices(value: ShardedTensor) -> set[str]:
    shards = [shard.metadata for shard in value.local_shards()] + value.metadata().shards_metadata
    return {str(metadata.placement.device().type) for metadata in shards if metadata.placement is not None}


def _save_from_gpus(rank: int, world: int, folder: str) -> dict[str, Any]:
    model = sharded_model()
    train_steps(model, rank, world, range(2))
    saved = full_weights(model)
    own = checkpoint.tensors_of(model)
    on_gpus = _as_on_gpus(own)
    saver.tensors_of = lambda _: own
    copies = [copy_of(value, None) for value in on_gpus]
    writer = Saver(pafs.LocalFileSystem(), folder, rank, world)
    writer.begin(name_of(0, 2), model, _state(2), {})
    written = writer.collect()
    return {
        "saved": saved,
        "problem": written.problem,
        "before": set().union(*map(_devices, on_gpus)),
        "copied": set().union(*map(_devices, copies)),
        "sizes": [copy.size() == value.size() for copy, value in zip(copies, on_gpus, strict=True)],
    }


def test_a_gpu_runs_tables_are_copied_to_host_memory_and_load_anywhere(tmp_path: Path) -> None:
    """The metadata are those of a GPU run; the tensors lie in host memory, as their copies would."""
    results = run_ranks(2, _save_from_gpus, str(tmp_path))
    for result in results:
        assert (result["before"], result["copied"]) == ({"cuda"}, {"cpu"})  # and the model's own stay
        assert result["sizes"]
        assert all(result["sizes"])
        assert result["problem"] is None
    loaded = run_ranks(3, _load, str(tmp_path / name_of(0, 2)))
    assert all(torch.equal(loaded[0]["weights"][name], value) for name, value in results[0]["saved"].items())


def _on_disks_of_their_own(rank: int, world: int, folder: str) -> dict[str, Any]:
    """As on two nodes with a local ``storage``: what has one path is two folders."""
    own = f"{folder}/{rank}"
    Path(own).mkdir()
    sign = Path(own) / "sign"
    if rank == 0:
        sign.write_text("")
    model = sharded_model()
    writer = Saver(pafs.LocalFileSystem(), own, rank, world)
    with pytest.raises(ConfigError) as refused:
        writer.require_shared(str(sign))
    writer.require_shared(__file__)  # which all see
    writer.begin(name_of(0, 1), model, _state(1), {})
    return {"refused": str(refused.value), "problem": writer.collect().problem}


def test_ranks_with_disks_of_their_own_are_refused_and_make_no_checkpoint(tmp_path: Path) -> None:
    results = run_ranks(2, _on_disks_of_their_own, str(tmp_path))
    assert results[0] == results[1]  # on all ranks
    assert results[0]["refused"].startswith("rank 1: ")
    assert "does not see what the driver has written" in results[0]["refused"]
    assert "`storage` must be one that all nodes see" in results[0]["refused"]
    assert results[0]["problem"] is not None
    assert "of rank 1 among them; `storage` must be one that all nodes see" in results[0]["problem"]
    assert list(tmp_path.rglob("*.distcp"))  # of rank 1, which wrote them to its own disk
    assert not list(tmp_path.rglob("state.json"))


def _fail_to_look(rank: int, world: int, folder: str) -> str | None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("cannot look")

    if rank == 1:
        saver.unsound = fail
    writer = Saver(pafs.LocalFileSystem(), folder, rank, world)
    writer.begin(name_of(0, 1), sharded_model(), _state(1), {})
    written = writer.collect()
    assert not written.diverged
    return written.problem


def test_a_rank_that_fails_to_look_at_its_state_leaves_none_waiting(tmp_path: Path) -> None:
    assert run_ranks(2, _fail_to_look, str(tmp_path)) == ["rank 1: RuntimeError: cannot look"] * 2
    assert not list(tmp_path.iterdir())


def _die_while_writing(rank: int, world: int, folder: str) -> None:
    model = sharded_model()
    writer = Saver(pafs.LocalFileSystem(), folder, rank, world)
    writer.begin(name_of(0, 1), model, _state(1), {})
    writer.collect()

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    writer._complete = die  # type: ignore[method-assign]  # all shards are written, the last file is not
    writer.begin(name_of(0, 2), model, _state(2), {})
    writer.collect()


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
