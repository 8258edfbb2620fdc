"""Checkpoints: exact, independent of the world size, complete or refused, and never a way to run code."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from roo_ray.errors import DataError
from roo_ray.training import checkpoint
from roo_ray.training.checkpoint import RunState, SafeReader
from tests.models.batches import schema
from tests.training.ranks import MODEL, full_weights, run_ranks, sharded_model, train_steps

STATE = RunState(
    epoch=1,
    step=3,
    schema_yaml=schema().to_yaml(),
    model=MODEL,
    data_version=2,
    data_digest="d",
    plan={"seed": 0},
    metrics={"eval/click/ne": 0.9},
)


def _train_and_save(rank: int, world: int, folder: str) -> dict[str, Any]:
    model = sharded_model()
    train_steps(model, rank, world, range(3))
    checkpoint.save(folder, model, STATE, rank)
    saved = full_weights(model)
    return {"saved": saved, "losses": train_steps(model, rank, world, range(3, 6))}


def _load_and_train(rank: int, world: int, folder: str, again: str) -> dict[str, Any]:
    model = sharded_model()
    state = checkpoint.load(folder, model)
    checkpoint.save(again, model, state, rank)
    loaded = full_weights(model)
    return {
        "loaded": loaded,
        "state": state.model_dump(),
        "losses": train_steps(model, rank, world, range(3, 6)),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoint") / "c"
    return folder, run_ranks(2, _train_and_save, str(folder))[0]


def test_loads_exactly_on_any_world_size_and_continues_the_curve(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """From 2 ranks to 2, and from 2 to 1 to 3."""
    folder, reference = saved
    loads_and_continues(2, folder, tmp_path / "two", reference)
    loads_and_continues(1, folder, tmp_path / "one", reference)
    loads_and_continues(3, tmp_path / "one", tmp_path / "three", reference)


def loads_and_continues(world: int, folder: Path, again: Path, reference: dict[str, Any]) -> None:
    result = run_ranks(world, _load_and_train, str(folder), str(again))[0]
    for name, value in reference["saved"].items():
        torch.testing.assert_close(result["loaded"][name], value, rtol=0, atol=0, msg=name)
    tolerance = {"rtol": 0.0, "atol": 0.0} if world == 2 else {"rtol": 2e-5, "atol": 1e-6}
    # equal only if both optimizers' states came back too
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(reference["losses"]), **tolerance)
    state = RunState.model_validate(result["state"])
    assert state.model_copy(update={"files": {}, "packed": {}}) == STATE
    assert state.packed
    assert ".metadata" in state.files
    assert checkpoint.read_state(folder).request_schema() == schema()


def test_state_and_size_of_a_remote_checkpoint_are_read_without_its_tensors(
    saved: tuple[Path, dict[str, Any]], bucket: Callable[[str], str]
) -> None:
    """The tensors' files are there, of the size that is listed, and hold nothing."""
    folder, reference = saved
    remote, base = pafs.FileSystem.from_uri(bucket("runs/one/c"))
    state = checkpoint.read_state(folder)
    for name in (*state.files, checkpoint.STATE_FILE):
        content = bytes(state.files[name]) if name.endswith(".distcp") else (folder / name).read_bytes()
        with remote.open_output_stream(f"{base}/{name}") as stream:
            stream.write(content)
    assert checkpoint.read_state(bucket("runs/one/c")) == state
    weights = sum(value.nbytes for name, value in reference["saved"].items())
    assert checkpoint.model_bytes(bucket("runs/one/c")) == checkpoint.model_bytes(str(folder)) == weights
    with remote.open_output_stream(f"{base}/__1_0.distcp") as stream:
        stream.write(b"cut short")
    with pytest.raises(DataError, match=r"^s3://\*\*\*@bucket/runs/one/c\S* is not .*: __1_0.distcp has 9"):
        checkpoint.read_state(bucket("runs/one/c"))
    with pytest.raises(DataError, match=r"it has no \.metadata"):
        checkpoint.model_bytes(bucket("runs/another"))


@pytest.mark.parametrize("lost", ["__1_0.distcp", ".metadata", "state.json"])
def test_incomplete_checkpoint_is_refused(lost: str, saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved[0], copy)
    (copy / lost).unlink()
    read = checkpoint.read_state if lost == "state.json" else lambda folder: SafeReader(folder).read_metadata()
    with pytest.raises(DataError, match="not a complete checkpoint"):
        read(copy)


class _Attack:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("attacked"),))


def test_metadata_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Attack()))
    with pytest.raises(DataError, match=r"which no checkpoint of roo_ray holds"):
        SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "attacked").exists()


def test_damaged_metadata_and_state_are_named(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved[0], copy)
    whole = (copy / ".metadata").read_bytes()
    (copy / ".metadata").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        SafeReader(copy).read_metadata()
    refused, draw = set[str](), random.Random(0)
    for _ in range(600):  # of the size that state.json names
        damaged = bytearray(whole)
        for at in draw.sample(range(len(whole)), draw.choice((1, 3, 40))):
            damaged[at] = draw.randrange(256)
        (copy / ".metadata").write_bytes(damaged)
        try:
            SafeReader(copy).read_metadata()
        except DataError as error:
            refused.add(str(error).partition("damaged: ")[2].partition(":")[0])
    assert len(refused) > 4  # whatever the unpickler makes of it
    (copy / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json is not valid"):
        checkpoint.read_state(copy)
