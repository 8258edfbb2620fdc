"""A sharded request-only run is the same run on any number of ranks, and equals impression-level training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roo_ray.config import Embeddings
from roo_ray.training.sharding import describe_plan
from tests.models.batches import schema
from tests.training.ranks import TRAINING, full_weights, run_ranks, sharded_model, train_steps


def _train(rank: int, world: int, explode: bool) -> dict[str, Any]:
    model = sharded_model()
    start = full_weights(model)
    losses = train_steps(model, rank, world, range(4), explode=explode)
    return {"plan": describe_plan(model.plan), "start": start, "losses": losses, "end": full_weights(model)}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(1, _train, False)[0]


def assert_same_run(run: dict[str, Any], reference: dict[str, Any]) -> None:
    for name, value in reference["start"].items():
        torch.testing.assert_close(run["start"][name], value, rtol=0, atol=0, msg=f"initial {name}")
    torch.testing.assert_close(torch.tensor(run["losses"]), torch.tensor(reference["losses"]), rtol=2e-5, atol=1e-6)
    for name, value in reference["end"].items():
        # Adam divides by the root of tiny second moments: rounding is magnified up to the learning rate
        torch.testing.assert_close(run["end"][name], value, rtol=1e-3, atol=2e-4, msg=f"trained {name}")


@pytest.mark.parametrize("world", [2, 3])
def test_world_size_does_not_change_the_run(world: int, one_rank: dict[str, Any]) -> None:
    ranks = run_ranks(world, _train, False)
    assert_same_run(ranks[0], one_rank)
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)


def test_sharded_request_form_equals_impression_form(one_rank: dict[str, Any]) -> None:
    assert_same_run(run_ranks(2, _train, True)[0], one_rank)


def test_training_changes_weights_and_plan_mixes_kinds(one_rank: dict[str, Any]) -> None:
    kinds = {row["table"]: row["sharding"] for row in one_rank["plan"]}
    assert kinds == {"item": "row_wise", "topic": "table_wise", "word": "row_wise", "tag": "row_wise"}
    for name, value in one_rank["start"].items():
        assert not torch.equal(one_rank["end"][name], value), f"{name} was not trained"


def _first_step(rank: int, world: int) -> float:
    model = sharded_model()
    dense = [p for n, p in model.module.named_parameters() if "sparse" not in n]
    before = [p.detach().clone() for p in dense]
    train_steps(model, rank, world, range(1))
    return max(float((p.detach() - b).abs().max()) for p, b in zip(dense, before, strict=True))


def test_the_first_step_of_adam_is_its_first() -> None:
    """Which moves a weight by the learning rate, whatever its gradient; the making of its state is no step."""
    assert run_ranks(1, _first_step)[0] == pytest.approx(TRAINING.dense_lr, rel=1e-3)


def _own_tables(rank: int, world: int) -> dict[str, float]:
    model = sharded_model(towers="tests.models.own_towers:WithTables")
    before = full_weights(model)
    train_steps(model, rank, world, range(2))
    return {name: float((value - before[name]).abs().max()) for name, value in full_weights(model).items()}


def test_tables_of_a_teams_own_are_trained() -> None:
    """By the dense optimizer, even under a name that a sharded table has."""
    moved = run_ranks(1, _own_tables)[0]
    assert {f"dense.embeddings.{table}.weight" for table in schema().tables} <= moved.keys()
    assert all(by > 0 for by in moved.values()), moved


OPTIONS = {
    "sgd": Embeddings(optimizer="sgd"),
    "sgd_columns": Embeddings(optimizer="sgd", sharding={"item": "column_wise", "word": "table_wise"}),
    "adagrad": Embeddings(optimizer="adagrad"),
    "adagrad_columns_fp16": Embeddings(optimizer="adagrad", weights="fp16", sharding={"item": "column_wise"}),
}


def _train_options(rank: int, world: int) -> dict[str, dict[str, Any]]:
    runs = {}
    for name, embeddings in OPTIONS.items():
        model = sharded_model(embeddings)
        start = full_weights(model)
        losses = train_steps(model, rank, world, range(3))
        runs[name] = {
            "plan": describe_plan(model.plan),
            "start": start,
            "losses": losses,
            "end": full_weights(model),
        }
    return runs


def test_columns_optimizers_and_half_precision() -> None:
    """Rules without a state per row are the same run column-wise, and fp16 tables within their precision."""
    runs = run_ranks(2, _train_options)[0]
    assert_same_run(runs["sgd_columns"], runs["sgd"])
    kinds = {row["table"]: row["sharding"] for row in runs["sgd_columns"]["plan"]}
    assert kinds["item"] == "column_wise"
    assert kinds["word"] == "table_wise"
    assert runs["sgd"]["losses"] != runs["adagrad"]["losses"]
    half, full = runs["adagrad_columns_fp16"], runs["adagrad"]
    torch.testing.assert_close(torch.tensor(half["losses"]), torch.tensor(full["losses"]), rtol=1e-3, atol=1e-3)
    for name, table in half["end"].items():
        if name.startswith("sparse."):
            assert table.dtype == torch.float16
            torch.testing.assert_close(table.float(), full["end"][name], rtol=0, atol=0.02)
