"""Weights that an update has spoilt never take a good checkpoint's place, whatever the losses say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from roo_ray.config import load_config
from roo_ray.errors import TrainingDiverged
from roo_ray.ingest.plan import plan_inputs
from roo_ray.requests.manifest import load_manifest
from roo_ray.training import checkpoint, worker
from roo_ray.training.packing import pack
from roo_ray.training.saver import Saver, name_of
from roo_ray.training.soundness import infinite_by_nature, unsound
from roo_ray.training.tracking import RunHandle
from tests.training.ranks import run_ranks, sharded_model
from tests.training.test_going_on import a_worker, write_small_run
from tests.training.test_saver import _state

SPOILT_AT = 3


def test_what_is_unsound() -> None:
    """A NaN anywhere; an infinity but in a buffer and in a moment."""

    def found(**changes: float) -> str:
        values = {"weight": 1.0, "buffer": 1.0, "table": 1.0} | changes
        model = {name: torch.tensor([0.5, value]) for name, value in values.items() if name != "moment"}
        model |= {"empty": torch.zeros(0), "count": torch.ones(1, dtype=torch.int64)}
        tensors = {"model": model, "optimizer": {"weight": {"moment": torch.tensor([values.get("moment", 1.0)])}}}
        excused = infinite_by_nature(tensors, iter([model["buffer"]]))
        _, large, index = pack(tensors)
        [names] = {tuple(unsound({}, large, index, excused)), tuple(unsound(tensors, {}, {}, excused))}
        return ", ".join(names)

    nan, infinite = float("nan"), float("inf")
    assert found() == ""
    assert found(weight=infinite) == found(weight=nan) == "model.weight"
    assert found(buffer=-infinite) == found(moment=infinite) == ""
    assert found(buffer=nan) == "model.buffer"
    assert found(moment=nan) == "optimizer.weight.moment"


def _save_with_a_spoilt_shard(rank: int, world: int, folder: str) -> dict[str, Any]:
    """A table's row is NaN on rank 1 alone."""
    model = sharded_model()
    shards = [shard for value in model.module.state_dict().values() for shard in getattr(value, "local_shards", list)()]
    if rank == 1:
        shards[0].tensor.view(-1)[-1] = float("nan")
    saver = Saver(pafs.LocalFileSystem(), folder, rank, world)
    saver.begin(name_of(0, 1), model, _state(1), {})
    found = vars(saver.collect())
    found["overlooked"] = saver.overlook(model)  # a run that has begun with it
    saver.begin(name_of(0, 2), model, _state(2), {})
    return found | {"second": saver.collect().problem}


def _worker(rank: int, path: str, folder: str) -> worker.Worker:
    config = load_config(path)
    schema, ingest, holdout = config.request_schema, config.ingest, config.holdout
    plan = plan_inputs(load_manifest(config.requests), schema, ingest, holdout, "train", 0, "shuffled", (1.0,) * 5)
    return a_worker(rank, config, RunHandle(None), folder, plan)


def _dense_weight(one: worker.Worker) -> torch.Tensor:
    return next(p for name, p in one.model.module.named_parameters() if p.ndim == 2 and "dense" in name)


def _evaluate_with_spoilt_weights(rank: int, path: str, folder: str) -> str:
    """Rank 1 alone has NaN in its copy of a weight."""
    one = _worker(rank, path, folder)
    if rank == 1:
        with torch.no_grad():
            _dense_weight(one).fill_(float("nan"))
    with pytest.raises(TrainingDiverged) as error:
        one.evaluate()
    return str(error.value)


def _train_with_spoilt_weights(rank: int, world: int, path: str, folder: str, value: float) -> dict[str, Any]:
    """A checkpoint every step; after step 3's update a weight of rank 0's copy has this value, as by an overflow."""
    reported: list[str] = []
    worker.ray.train.report = lambda metrics, checkpoint, **how: reported.append(checkpoint.path)  # type: ignore[assignment]
    one = _worker(rank, path, folder)
    begun: list[str] = []
    begin, flags, step = one.saver.begin, one.flags, one.model.optimizer.step

    def watched(name: str, *args: Any) -> None:
        begun.append(name)
        begin(name, *args)

    def written_by_now(taken: int) -> Any:
        while one.saver.busy and not one.saver.written:
            time.sleep(0.01)
        return flags(taken)

    def spoil() -> None:
        step()
        if one.steps_done + 1 == SPOILT_AT:
            with torch.no_grad():
                _dense_weight(one).fill_(value)

    one.saver.begin, one.flags, one.model.optimizer.step = watched, written_by_now, spoil  # type: ignore[method-assign]
    stream = one.stream("train")
    with pytest.raises(TrainingDiverged) as error:
        one.train_epoch(stream, 0)
    stream.close()
    states = [checkpoint.read_state(path).step for path in reported]
    return {"error": str(error.value), "begun": begun, "reported": states, "skipped": one.skipped}


def _spoil(rank: int, world: int, folder: str) -> list[Any]:
    config = f"{folder}/config.yaml"
    runs = [
        _train_with_spoilt_weights(rank, world, config, f"{folder}/{value}", value) for value in (float("nan"), 1e38)
    ]
    evaluated = _evaluate_with_spoilt_weights(rank, config, f"{folder}/evaluated")
    return [*runs, _save_with_a_spoilt_shard(rank, world, f"{folder}/table"), evaluated]


def test_spoilt_weights_end_the_run_and_leave_the_good_checkpoints(tmp_path: Path) -> None:
    """NaN is seen in the state; a weight that is only much too large, by the batches after it: the checkpoint that has
    it is not reported, and none is begun while batches are left out."""
    write_small_run(tmp_path, on_nan="skip", max_nan_batches=2, checkpoint_every_steps=1, epochs=3)
    results = run_ranks(2, _spoil, str(tmp_path))
    nan, large, table, evaluated = results[0]
    assert results[1][3] == evaluated  # both leave, at the same step
    assert "scores that are NaN, by rank: rank 1: request_id=" in evaluated
    for run, words in ((nan, "is not finite"), (large, "max_nan_batches=2")):
        assert words in run["error"]
        assert run["reported"]
        assert max(run["begun"]) <= name_of(0, SPOILT_AT)
        assert run["skipped"] <= 3
    assert [result[:2] for result in results] == [[nan, large]] * 2
    assert [result[2]["problem"] for result in results] == [table["problem"]] * 2
    assert table["diverged"]
    assert table["problem"].startswith("rank 1: model.")
    assert not (tmp_path / "table" / name_of(0, 1)).exists()
    assert [result[2]["overlooked"] for result in results] == [table["problem"]] * 2
    assert [result[2]["second"] for result in results] == [None, None]
