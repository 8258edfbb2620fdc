"""Managed tables in training: any number of ranks and either form are the same run, and so is one that goes on from a
checkpoint in the middle of an interval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from roo_ray.config import Embeddings, ManagedRows
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.ingest.stream import NO_COUNTS, Step
from roo_ray.models.managed import managed_ids
from roo_ray.training import checkpoint
from roo_ray.training.agreement import Flags
from roo_ray.training.checkpoint import RunState
from roo_ray.training.clock import TrainingClock
from roo_ray.training.ids import id_metrics, meet_ids
from roo_ray.training.sharding import ShardedModel
from roo_ray.training.steps import Trainer
from roo_ray.training.timing import StepTimes
from tests.models.batches import random_batch
from tests.models.test_managed import managed_schema
from tests.training.ranks import MODEL, full_weights, one_rank, run_ranks, sharded_model, train_steps

EMBEDDINGS = Embeddings(managed=ManagedRows(every=2, buffer=64))
STATE = RunState(
    epoch=0,
    step=3,
    schema_yaml=managed_schema().to_yaml(),
    model=MODEL.model_copy(update={"embeddings": EMBEDDINGS}),
    data_version=1,
    data_digest="d",
    plan={},
)


def _lanes(step: int) -> list[RequestBatch]:
    """Of four lanes, of which the third has data in the first step alone."""
    sizes = [[3, 1, 4], [2, 2], [5, 1], [2]]
    lanes = [random_batch(managed_schema(), size, seed=10 * step + lane) for lane, size in enumerate(sizes)]
    return lanes if step == 0 else [*lanes[:2], lanes[3]]


def _model() -> ShardedModel:
    return sharded_model(EMBEDDINGS, managed_schema())


def _train(rank: int, world: int, steps: range, exploded: bool, load: str | None, save: str | None) -> dict[str, Any]:
    of, losses = managed_schema(), []
    model = _model()
    if load is not None:
        checkpoint.load(load, model)
    for step in steps:
        mine = _lanes(step)[rank::world]
        batch = RequestBatch.concat(mine) if mine else dummy_batch(of)
        meet_ids(model, of, batch.explode() if exploded else batch, seed=0)
        losses += train_steps(model, rank, world, range(step, step + 1), explode=exploded, of=of, lanes_of=_lanes)
        if step == 2 and save is not None:
            checkpoint.save(save, model, STATE, rank)
    return {"losses": losses, "weights": full_weights(model), "ids": id_metrics(model.module)}


def _assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=1e-5, atol=1e-6)
    assert one["ids"] == other["ids"]
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, other["weights"][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
        else:
            assert torch.equal(value, other["weights"][name]), name


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(1, _train, range(6), False, None, None)[0]


@pytest.mark.parametrize(("world", "exploded"), [(2, False), (3, False), (5, False), (1, True), (2, True)])
def test_any_number_of_ranks_and_either_form_are_the_same_run(one: dict[str, Any], world: int, exploded: bool) -> None:
    """With 5 ranks one has no data at all, and one has none after the first step."""
    assert one["ids"]["ids/item/evicted"] > 0
    _assert_same_run(one, run_ranks(world, _train, range(6), exploded, None, None)[0])


def test_a_run_goes_on_from_a_checkpoint_on_another_number_of_ranks(one: dict[str, Any], tmp_path: Any) -> None:
    """Step 2 is in the middle of an interval of two steps: what was met in it is in the checkpoint."""
    folder = str(tmp_path / "c")
    run_ranks(2, _train, range(3), False, None, folder)
    gone_on = run_ranks(3, _train, range(3, 6), False, folder, None)[0]
    _assert_same_run(one | {"losses": one["losses"][3:]}, gone_on)


def _state_of_new_rows(rank: int, world: int, kind: str) -> list[int]:
    """Per change: how much of the optimizer's state of rows that went to another id is not 0, on this rank."""
    of, left = managed_schema(), []
    managed = ManagedRows(policy="lru", every=1)
    model = sharded_model(
        Embeddings.model_validate({"managed": managed, "sharding": {"item": kind}, "pooled": ["tag"]}), of
    )
    table = managed_ids(model.module).table("item")
    ids = torch.arange(1, 200)
    for step in range(5):
        before = table.rows(ids)
        meet_ids(model, of, RequestBatch.concat(_lanes(step)[rank::world]), seed=0)
        now = table.rows(ids)
        changed = torch.cat([before, now])[(before != now).repeat(2)].unique()
        changed = changed[changed < 49]
        assert len(changed)
        (state,) = [v for name, v in model.optimizer.state_dict()["state"].items() if name.endswith("item.weight")]
        ((shard,),) = [value.local_shards() for value in state.values()]
        first = 0 if kind == "column_wise" else shard.metadata.shard_offsets[0]
        here = changed[(changed >= first) & (changed < first + shard.tensor.shape[0])] - first
        assert len(here)
        left.append(int(shard.tensor[here].count_nonzero()))
        train_steps(model, rank, world, range(step, step + 1), of=of, lanes_of=_lanes)
        assert int(shard.tensor.count_nonzero())
    return left


@pytest.mark.parametrize("kind", ["column_wise", "row_wise"])
def test_the_optimizer_state_of_every_shard_begins_anew(kind: str) -> None:
    """A column-wise table has an accumulator per row and shard, one after the other in a long vector."""
    assert run_ranks(2, _state_of_new_rows, kind) == [[0] * 5] * 2


def test_a_row_that_gets_another_id_begins_anew_with_its_optimizer_state() -> None:
    of, retrained = managed_schema(), 0
    with one_rank():
        model = sharded_model(Embeddings(managed=ManagedRows(policy="lru", every=1)), of)
        name = "sparse.collections.dim_8.embeddings.item.weight"

        def local(state: dict[str, Any]) -> torch.Tensor:
            (value,) = state[name].values() if isinstance(state[name], dict) else (state[name],)
            return value.local_shards()[0].tensor.clone()

        initial = local(model.module.state_dict())
        for step in range(4):
            batch = RequestBatch.concat(_lanes(step))
            before = model.module.state_dict(), model.optimizer.state_dict()["state"]
            weights, sums = local(before[0]), local(before[1])
            holders = managed_ids(model.module).table("item").rows(torch.arange(200))
            meet_ids(model, of, batch, seed=0)
            now = managed_ids(model.module).table("item").rows(torch.arange(200))
            changed = torch.zeros(50, dtype=torch.bool)
            changed[torch.cat([holders, now])[(holders != now).repeat(2)]] = True
            changed[49] = False  # that of all others
            after = local(model.module.state_dict()), local(model.optimizer.state_dict()["state"])
            assert torch.equal(after[0][changed], initial[changed])
            assert int(after[1][changed].count_nonzero()) == 0
            assert torch.equal(after[0][~changed], weights[~changed])
            assert torch.equal(after[1][~changed], sums[~changed])
            retrained += int((sums[changed] > 0).sum())
            train_steps(model, 0, 1, range(step, step + 1), of=of, lanes_of=_lanes)
        assert retrained > 0


def test_events_at_or_after_the_request_are_not_met() -> None:
    of = managed_schema()
    with one_rank():
        model = _model()
        batch = random_batch(of, [2, 1], seed=1, empty_history=0.0)
        times = {"history": torch.full_like(batch.sequence_time["history"], 2e9)}
        meet_ids(model, of, RequestBatch(**{**vars(batch), "sequence_time": times}), seed=0)
        met = managed_ids(model.module).table("item").rows(torch.arange(200)) < 49
        assert set(met.nonzero().flatten().tolist()) == set(batch.impression_ids["item"].values.tolist())


def _steps(rank: int, world: int, count: int, bad: int) -> Iterator[Step]:
    """The rank's steps; at step ``bad`` a request of the last rank has a feature that is not finite."""
    for step in range(count):
        mine = _lanes(step)[rank::world]
        batch = RequestBatch.concat(mine)
        if step == bad and rank == world - 1:
            dense = batch.request_dense.clone()
            dense[0, 0] = float("nan")
            batch = replace(batch, request_dense=dense)
        yield Step(batch, len(mine), len(batch.num_impressions), batch.total_impressions, 0.0, NO_COUNTS | {"cost": 1})
    while True:
        yield Step(dummy_batch(managed_schema()), 0, 0, 0, 0.0, NO_COUNTS)


def _retrieval_run(rank: int, world: int, bad: int) -> dict[str, Any]:
    """What the trainer does with a managed table of items, of which every loss is taken."""
    model = sharded_model(EMBEDDINGS, managed_schema(), kind="retrieval")
    trainer = Trainer(
        model=model,
        schema=managed_schema(),
        seed=0,
        task_weights=torch.ones(2),
        rank=rank,
        world=world,
        exploded=False,
        skips=True,
        says=lambda taken: Flags(),
        clock=TrainingClock(None),
        names=lambda step: [],
    )
    losses, used = [], []
    for taken in trainer.steps(_steps(rank, world, 5, bad), torch.device("cpu"), StepTimes(torch.device("cpu"))):
        loss = torch.zeros(()) if taken.loss is None else taken.loss
        dist.all_reduce(loss)
        losses.append(float(loss))
        used.append(id_metrics(model.module)["ids/item/rows_used"])
    seen = next(int(value) for name, value in model.module.state_dict().items() if name.endswith("items_seen"))
    return {"losses": losses, "used": used, "seen": seen, "weights": full_weights(model)}


def test_the_trainer_feeds_the_maps_and_trains_retrieval_from_the_first_step_on() -> None:
    """On 1 rank and on 2. A batch that is left out was met, and not counted for logQ."""
    alone, (first, second) = run_ranks(1, _retrieval_run, 2)[0], run_ranks(2, _retrieval_run, 2)
    assert first["used"] == second["used"] == alone["used"]
    assert 0 < alone["used"][0] == alone["used"][1] < alone["used"][2]  # the third is left out
    assert [loss > 0 for loss in alone["losses"]] == [True, True, False, True, True]
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(alone["losses"]), rtol=1e-4, atol=1e-5)
    impressions = [sum(lane.weights.any(dim=1).sum() for lane in _lanes(step)) for step in (0, 1, 3, 4)]
    assert first["seen"] == alone["seen"] == int(sum(impressions))
    for name, value in alone["weights"].items():
        if "managed" in name:
            assert torch.equal(value, first["weights"][name]), name
