"""A step on several ranks: what one rank alone knows, all act on; a batch that is not finite updates nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from roo_ray.errors import TrainingDiverged
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.ingest.stream import NO_COUNTS, Step
from roo_ray.training.agreement import Flags
from roo_ray.training.clock import TrainingClock
from roo_ray.training.steps import Trainer, name_requests
from roo_ray.training.timing import PARTS, StepTimes
from tests.models.batches import schema
from tests.training.ranks import full_weights, lane_batches, run_ranks, sharded_model

CPU = torch.device("cpu")


def _steps(rank: int, world: int, count: int, bad: int | None) -> Iterator[Step]:
    """The rank's steps; at step ``bad`` a request of rank 1 has a feature that is not finite."""
    for step in range(count):
        mine = lane_batches(step)[rank::world]
        batch = RequestBatch.concat(mine)
        if step == bad and rank == 1:
            dense = batch.request_dense.clone()
            dense[0, 0] = float("nan")
            batch = replace(batch, request_dense=dense)
        yield Step(batch, len(mine), len(batch.num_impressions), batch.total_impressions, 0.0, NO_COUNTS | {"cost": 1})
    while True:
        yield Step(dummy_batch(schema()), 0, 0, 0, 0.0, NO_COUNTS)


def _train(rank: int, world: int, bad: int | None, skips: bool, counts: tuple[int, ...]) -> dict[str, Any]:
    model = sharded_model()
    task_weights = torch.tensor([label.weight for label in schema().labels])
    says = [Flags(checkpoint=rank == 0 and step == 2, evicted=rank == 1 and step == 3) for step in range(9)]
    trainer = Trainer(
        model=model,
        schema=schema(),
        seed=0,
        task_weights=task_weights,
        rank=rank,
        world=world,
        exploded=False,
        skips=skips,
        says=lambda taken: says[taken],
        clock=TrainingClock(None),
        names=lambda step: ["id=7"],
    )
    taken, before, kept, times = [], {}, {}, StepTimes(CPU)
    try:
        for number, one in enumerate(trainer.steps(_steps(rank, world, counts[rank], bad), CPU, times)):
            taken.append((one.skipped, one.agreement.ranks["checkpoint"], one.agreement.any("evicted")))
            if number == (bad or 0) - 1:
                before = full_weights(model)
            if number == bad:
                kept = full_weights(model)
    except TrainingDiverged as error:
        return {"error": str(error), "taken": taken}
    return {"taken": taken, "before": before, "kept": kept, "times": times.over_ranks(CPU), "all": full_weights(model)}


def test_the_ranks_end_together_and_share_their_flags() -> None:
    """Rank 1 has three steps and rank 0 five: both take five; no flag of one rank is missed by the other."""
    results = run_ranks(2, _train, None, False, (5, 3))
    taken = [result["taken"] for result in results]
    assert taken[0] == taken[1]
    assert taken[0] == [
        (False, 0, False),
        (False, 1, False),
        (False, 0, True),
        (False, 0, False),
        (False, 0, False),
    ]
    times = results[0]["times"]
    assert times == results[1]["times"]
    alone = ("forward", "backward", "optimizer", "communication", "data_wait")
    assert all(times[f"step/{part}_ms"] > 0 for part in alone)
    assert times["step/total_ms"] == pytest.approx(
        sum(times[f"step/{part}_ms"] for part in PARTS if part != "host_to_device")
    )
    assert times["step/backward_ms_slowest_rank"] >= times["step/backward_ms"] > 0
    assert 0 < times["step/balance_time_share"] <= 1


def test_a_batch_that_is_not_finite_is_skipped_on_all_ranks_and_changes_nothing() -> None:
    results = run_ranks(2, _train, 2, True, (5, 5))
    for result in results:
        assert [skipped for skipped, _, _ in result["taken"]] == [False, False, True, False, False]
    first = results[0]
    assert all(torch.equal(first["before"][name], first["kept"][name]) for name in first["before"])
    assert all(torch.isfinite(value).all() for value in first["all"].values())
    assert any(not torch.equal(first["all"][name], first["kept"][name]) for name in first["all"])


def test_a_batch_that_is_not_finite_stops_all_ranks_with_the_ids_of_the_rank_that_has_it() -> None:
    results = run_ranks(2, _train, 2, False, (5, 5))
    assert [len(result["taken"]) for result in results] == [2, 2]
    assert results[0]["error"] == results[1]["error"]
    assert "rank 1: id=7." in results[0]["error"]
    assert "rank 0" not in results[0]["error"]


def test_many_request_ids_are_cut_and_counted() -> None:
    message = name_requests([[], [f"r{i}" for i in range(25)]])
    assert "rank 1: r0, r1" in message
    assert "r19 and 5 more" in message
    with pytest.raises(TrainingDiverged):
        raise TrainingDiverged(message)
