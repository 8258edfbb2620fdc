"""Pooled tables over ranks: however they are placed, a run is the run of one rank that pools after the lookup, in both
forms of the batch, with unequal batches and ranks without data; a checkpoint fits both ways of pooling."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from roo_ray.config import Embeddings
from roo_ray.ingest.batch import RequestBatch
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.losses import ranking_loss
from roo_ray.models.pooled import unpooled_name
from roo_ray.models.ranking import RankingModel
from roo_ray.training import checkpoint, sharding
from roo_ray.training.checkpoint import RunState
from roo_ray.training.hosts import Place
from roo_ray.training.sharding import ShardedModel, describe_plan, table_constraints
from tests.models.bags import POOLED, bags_schema
from tests.models.batches import random_batch
from tests.training.ranks import MODEL, TRAINING, full_weights, run_ranks, sharded_model, train_steps

SCHEMA = bags_schema()
STEPS = 3


def everywhere(kind: str, **options: Any) -> Embeddings:
    """All pooled tables placed in one way."""
    return Embeddings(pooled=POOLED, sharding=dict.fromkeys(POOLED, kind), **options)  # type: ignore[arg-type]


MIXED = {"hobby": "row_wise", "brand": "column_wise", "genre": "data_parallel", "tag": "table_wise"}
RUNS = {
    "tables, sgd": everywhere("table_wise", optimizer="sgd"),
    "rows, sgd": everywhere("row_wise", optimizer="sgd"),
    "columns, sgd": everywhere("column_wise", optimizer="sgd"),
    "grid, sgd": everywhere("grid", optimizer="sgd"),
    "tables, rowwise_adagrad": everywhere("table_wise"),
    "rows, rowwise_adagrad": everywhere("row_wise"),
    "default, rowwise_adagrad": Embeddings(pooled=POOLED),
    "tables, adagrad": everywhere("table_wise", optimizer="adagrad"),
    "columns, adagrad": everywhere("column_wise", optimizer="adagrad"),
    "rows, fp16": everywhere("row_wise", optimizer="sgd", weights="fp16"),
    "copies": everywhere("data_parallel", optimizer="sgd"),
    "mixed": Embeddings(pooled=POOLED, optimizer="sgd", sharding=MIXED),  # type: ignore[arg-type]
}
AFTER = {  # pooled after the lookup
    "sgd": Embeddings(optimizer="sgd"),
    "rowwise_adagrad": Embeddings(),
    "adagrad": Embeddings(optimizer="adagrad"),
    "fp16": Embeddings(optimizer="sgd", weights="fp16"),
}


def lanes_of(step: int) -> list[RequestBatch]:
    """Batches of unequal sizes; at step 1 there is but one: other ranks have no data. At step 2 all bags are empty."""
    sizes = [[[3, 1, 4], [1], [2, 2, 9]], [[5, 1, 1, 1]], [[2], [3, 3]]][step % 3]
    empty = 1.0 if step % 3 == 2 else 0.2
    return [random_batch(SCHEMA, of, seed=10 * step + lane, empty_history=empty) for lane, of in enumerate(sizes)]


def steps(model: ShardedModel, rank: int, world: int, which: range, explode: bool = False) -> list[float]:
    return train_steps(model, rank, world, which, explode=explode, of=SCHEMA, lanes_of=lanes_of)


def whole(model: ShardedModel) -> dict[str, torch.Tensor]:
    """All weights by the names that they have without pooling; of halves as float32."""
    return {unpooled_name(name): value.float() for name, value in full_weights(model).items()}


def _train(rank: int, world: int, names: Iterable[str], explode: bool = False) -> dict[str, dict[str, Any]]:
    runs = {}
    for name in names:
        model = sharded_model((RUNS | AFTER)[name], SCHEMA)
        start = whole(model)
        losses = steps(model, rank, world, range(STEPS), explode)
        runs[name] = {"plan": describe_plan(model.plan), "start": start, "losses": losses, "end": whole(model)}
    return runs


@pytest.fixture(scope="module")
def after() -> dict[str, Any]:
    return run_ranks(1, _train, list(AFTER))[0]


def plain_run(copied: Iterable[str]) -> dict[str, Any]:
    """The same steps of an unsharded model that pools after the lookup, in the impression-level form, with torch's own
    optimizers: Adam for what is dense and for ``copied`` tables, else SGD."""
    torch.manual_seed(0)
    model = RankingModel(SCHEMA, MODEL)
    initialise_tables(model, TRAINING.seed)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    by_adam = {n: p for n, p in model.named_parameters() if not n.startswith("sparse.") or n.split(".")[-2] in copied}
    by_sgd = [p for n, p in model.named_parameters() if n not in by_adam]
    adam = torch.optim.Adam(by_adam.values(), lr=TRAINING.dense_lr)
    sgd = torch.optim.SGD(by_sgd, lr=TRAINING.embedding_lr)
    weights, losses = torch.tensor([label.weight for label in SCHEMA.labels]), []
    for step in range(STEPS):
        batch = RequestBatch.concat(lanes_of(step)).explode()
        loss = ranking_loss(model(batch), batch.labels, batch.weights, weights, batch.weights.sum(0), 1)
        model.zero_grad()
        loss.backward()
        adam.step()
        sgd.step()
        losses.append(float(loss.detach()))
    return {"start": start, "losses": losses, "end": model.state_dict()}


def assert_same(run: dict[str, Any], reference: dict[str, Any], slack: float = 1.0) -> None:
    """``slack``: times float32's tolerance."""
    assert run["start"].keys() == reference["start"].keys()
    for name, value in reference["start"].items():
        assert torch.equal(run["start"][name], value), f"initial {name}"
    losses = torch.tensor(run["losses"]), torch.tensor(reference["losses"])
    torch.testing.assert_close(*losses, rtol=2e-5 * slack, atol=1e-6 * slack)
    for name, value in reference["end"].items():
        # Adam divides by the root of tiny second moments: rounding is magnified up to the learning rate
        torch.testing.assert_close(run["end"][name], value, rtol=1e-3, atol=2e-4 * slack, msg=f"trained {name}")


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_placing_does_not_change_the_run(world: int, after: dict[str, Any]) -> None:
    names = list(RUNS)
    if world == 1:
        names = ["tables, sgd", "default, rowwise_adagrad", "copies", "rows, fp16"]
    runs = run_ranks(world, _train, names)[0]
    for name, run in runs.items():
        if name == "copies":
            reference = plain_run(POOLED)
        elif name == "mixed":
            reference = plain_run(["genre"])
        else:
            reference = after[name.rpartition(" ")[2]]
        # halves are updated in halves: both ways round, one row at a time
        assert_same(run, reference, slack=50.0 if "fp16" in name else 1.0)
    for table in POOLED:
        weight = next(name for name in runs[names[0]]["end"] if name.endswith(f".{table}.weight"))
        for run in runs.values():
            assert not torch.equal(run["end"][weight], run["start"][weight]), f"{table} was not trained"


def _train_on_two_hosts(rank: int, world: int, name: str) -> dict[str, Any]:
    sharding.places = lambda device: [Place(f"host {r // 2}", 2**34, 0) for r in range(world)]
    return _train(rank, world, [name])[name]


@pytest.mark.slow
def test_a_grid_over_two_hosts_is_the_same_run(after: dict[str, Any]) -> None:
    run = run_ranks(4, _train_on_two_hosts, "grid, sgd")[0]
    shards = {str(row["table"]): row["shards"] for row in run["plan"]}
    assert [(part["rows"], part["dim"]) for part in shards["hobby"]] == [(15, 4)] * 4
    assert_same(run, after["sgd"])


def test_the_reference_itself(after: dict[str, Any]) -> None:
    assert_same(after["sgd"], plain_run([]))


def test_impression_form_over_ranks_is_the_same_run(after: dict[str, Any]) -> None:
    runs = run_ranks(2, _train, ["rows, sgd", "tables, rowwise_adagrad"], True)[0]
    assert_same(runs["rows, sgd"], after["sgd"])
    assert_same(runs["tables, rowwise_adagrad"], after["rowwise_adagrad"])


def test_tables_are_placed_as_asked() -> None:
    runs = run_ranks(2, _train, ["mixed", "default, rowwise_adagrad"])[0]
    kinds = {str(row["table"]): row["sharding"] for row in runs["mixed"]["plan"]}
    assert {table: kinds[table] for table in POOLED} == MIXED
    assert {str(row["table"]) for row in runs["mixed"]["plan"] if row["pooled"]} == set(POOLED)
    kinds = {str(row["table"]): row["sharding"] for row in runs["default, rowwise_adagrad"]["plan"]}
    assert {table: kinds[table] for table in POOLED} == {
        "hobby": "row_wise", "brand": "row_wise", "genre": "table_wise", "tag": "row_wise"
    }  # fmt: skip


def _leave_a_batch_out(rank: int, world: int) -> list[list[float]]:
    """Losses with and without a step whose forward is followed by no backward, as where a loss was not finite."""
    found = []
    for skips in (False, True):
        model = sharded_model(RUNS["mixed"], SCHEMA)
        losses = steps(model, rank, world, range(1))
        if skips:
            lanes = lanes_of(5)
            model.module(lanes[rank % len(lanes)])
            with torch.no_grad():
                model.module.eval()(lanes[0])
            model.module.train()
        found.append(losses + steps(model, rank, world, range(1, STEPS)))
    return found


def test_a_batch_may_be_left_out() -> None:
    usual, skipped = run_ranks(2, _leave_a_batch_out)[0]
    assert skipped == pytest.approx(usual, rel=1e-6)


def test_the_planner_knows_bags_per_impression() -> None:
    settings = MODEL.model_copy(update={"embeddings": Embeddings(pooled=POOLED)})
    model = RankingModel(SCHEMA, settings, torch.device("meta"))
    ids = {
        "hobbies": 9.0,
        "dislikes": 3.0,
        "brands": 50.0,
        "genres": 20.0,
        "themes": 0.0,
        "tags": 30.0,
        "interests": 2.0,
    }
    constraints = table_constraints(model, 20, 8, ids, settings.embeddings, 2, "cpu", batch_impressions=80)
    assert (constraints["hobby"].batch_sizes, constraints["hobby"].pooling_factors) == ([8, 8], [9.0, 3.0])
    assert (constraints["brand"].batch_sizes, constraints["brand"].pooling_factors) == ([80], [5.0])
    assert (constraints["genre"].batch_sizes, constraints["genre"].pooling_factors) == ([80, 80], [2.0, 0.01])
    assert (constraints["tag"].batch_sizes, constraints["tag"].pooling_factors) == ([80, 80], [0.2, 3.0])
    assert constraints["item"].batch_sizes == [8, 8]
    assert constraints["item"].pooling_factors == [1.0, 1.0]


# ---- checkpoints -----------------------------------------------------------------------------------

STATE = RunState(epoch=1, step=3, schema_yaml=SCHEMA.to_yaml(), model=MODEL, data_version=2, data_digest="d", plan={})
OTHER_PLAN = {"hobby": "table_wise", "brand": "row_wise", "tag": "table_wise", "genre": "row_wise"}
FORMS = {
    "pooled": Embeddings(pooled=POOLED),
    "pooled, placed in another way": Embeddings(pooled=POOLED, sharding=OTHER_PLAN),  # type: ignore[arg-type]
    "pooled after the lookup": Embeddings(),
}


def _train_and_save(rank: int, world: int, folder: str, form: str) -> dict[str, Any]:
    model = sharded_model(FORMS[form], SCHEMA)
    steps(model, rank, world, range(STEPS))
    checkpoint.save(folder, model, STATE.model_copy(update={"model": _settings(form)}), rank)
    saved = whole(model)
    return {"saved": saved, "losses": steps(model, rank, world, range(STEPS, 2 * STEPS))}


def _settings(form: str) -> Any:
    return MODEL.model_copy(update={"embeddings": FORMS[form]})


def _load_and_train(rank: int, world: int, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for form, embeddings in FORMS.items():
        model = sharded_model(embeddings, SCHEMA)
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.zero_()
        dist.barrier()
        checkpoint.load(folder, model)
        found[form] = {"loaded": whole(model), "losses": steps(model, rank, world, range(STEPS, 2 * STEPS))}
    return found


@pytest.fixture(scope="module", params=["pooled", pytest.param("pooled after the lookup", marks=pytest.mark.slow)])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(checkpoint of a form from 2 ranks, what the run went on with)."""
    folder = tmp_path_factory.mktemp("checkpoints") / "c"
    return folder, run_ranks(2, _train_and_save, str(folder), request.param)[0]


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_checkpoint_fits_both_forms_on_any_number_of_ranks(world: int, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, reference = saved
    for form, result in run_ranks(world, _load_and_train, str(folder))[0].items():
        for name, value in reference["saved"].items():
            assert torch.equal(result["loaded"][name], value), f"{form}: {name}"
        # equal only if both optimizers' states came back too
        assert result["losses"] == pytest.approx(reference["losses"], rel=2e-5, abs=1e-6), form
