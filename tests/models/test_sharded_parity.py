"""Every sharded request-only model equals the unsharded impression-level model: real processes over gloo,
unequal requests, ranks without data, row-wise and table-wise tables with fused row-wise Adagrad."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from roo_ray.ingest.batch import RequestBatch
from roo_ray.models.initialise import initialise_tables, table_scale, table_weights
from tests.models import sharded_ranks
from tests.models.test_parity import assert_gradients_within_bfloat16
from tests.processes import start_ranks


@pytest.fixture(scope="module", params=[2, 3])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """(number of ranks, model -> what its training on so many ranks gave)."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    start_ranks(sharded_ranks.run, (world, str(folder)), world)
    return world, torch.load(folder / "result.pt")


@pytest.mark.parametrize("name", sharded_ranks.MODELS)
def test_sharded_requests_equal_unsharded_impressions(name: str, sharded: tuple[int, dict[str, Any]]) -> None:
    """Each step from the sharded model's weights: Adagrad makes a difference of rounding in a row's first gradient as
    large as the gradient, which is all that a later step would be about."""
    world, results = sharded
    result = results[name]
    slack = 10.0 if name == "batch_statistics" else 1.0  # differences of nearly equal numbers
    model = sharded_ranks.build(sharded_ranks.MODELS[name])
    initialise_tables(model, 0)
    for name, table in result["tables_before"].items():
        assert torch.equal(table, model.state_dict()[name]), f"{name}: initial weights depend on the sharding"
    dense = dict(model.dense.named_parameters(prefix="dense"))
    tables = {name: table for name, table in model.named_parameters() if name in result["tables_before"]}
    assert dense.keys() | tables.keys() == dict(model.named_parameters()).keys()
    optimizers = [
        torch.optim.SGD(dense.values(), lr=sharded_ranks.DENSE_LR),
        RowWiseAdagrad(model.sparse.parameters(), **sharded_ranks.EMBEDDINGS),
    ]
    for step, batches in zip(result["steps"], sharded_ranks.steps(world), strict=True):
        batch = RequestBatch.concat([batch for batch in batches if batch is not None]).explode()
        model.zero_grad()
        loss = sharded_ranks.loss_of(model, batch, batch.weights.sum(0), 1)
        loss.backward()
        torch.testing.assert_close(step["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in dense.items():
            assert parameter.grad is not None
            difference = float((step["gradients"][name] - parameter.grad).abs().max())
            assert difference <= slack * (2e-4 * float(parameter.grad.abs().max()) + 2e-6), f"{name}: {difference}"
        for optimizer in optimizers:
            optimizer.step()
        for name, weight in (dense | tables).items():
            after = step["dense" if name in dense else "tables"][name]
            torch.testing.assert_close(after, weight.detach(), rtol=1e-4, atol=1e-5 * slack, msg=name)
            weight.data.copy_(after)
    for name, before in result["tables_before"].items():
        assert not torch.equal(step["tables"][name], before), f"{name} was not trained"


@pytest.mark.parametrize("name", sharded_ranks.AUTOCAST)
def test_bfloat16_towers_have_sharded_parity(name: str, sharded: tuple[int, dict[str, Any]]) -> None:
    """Of the first step, whose weights are the same: rounding differs with the form of the batch."""
    world, results = sharded
    result, whole = results[f"{name} in bfloat16"], results[name]
    model = sharded_ranks.build(sharded_ranks.MODELS[name], autocast=True)
    initialise_tables(model, 0)
    batch = RequestBatch.concat([b for b in sharded_ranks.steps(world)[0] if b is not None]).explode()
    loss = sharded_ranks.loss_of(model, batch, batch.weights.sum(0), 1)
    loss.backward()
    first = result["steps"][0]
    torch.testing.assert_close(first["loss"], loss.detach(), rtol=0.01, atol=0.0)
    assert not torch.equal(first["loss"], whole["steps"][0]["loss"])  # the towers did run in bfloat16
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    dense = {name: gradient for name, gradient in gradients.items() if name.startswith("dense.")}
    assert_gradients_within_bfloat16(dense, first["gradients"])
    for table, before in result["tables_before"].items():
        gradient = (before - first["tables"][table]) / sharded_ranks.TABLES_LR
        difference = float((gradient - gradients[table]).norm() / gradients[table].norm())
        assert difference < 0.05, f"{table}: {difference}"  # 13 roundings of 2 ** -8; a wrong scale is more


def test_initial_weights_do_not_depend_on_the_sharding(tmp_path: Path) -> None:
    start_ranks(sharded_ranks.look_up_initial_weights, (2, str(tmp_path)), 2)
    found = torch.load(tmp_path / "weights.pt")
    assert set(found) == {"ShardedTensor", "DTensor"}
    for state, tables in found.items():
        for name, weights in tables.items():
            expected = table_weights(5, name, 0, 21, 0, 8, torch.device("cpu")) * table_scale(8)
            assert torch.equal(weights, expected), f"{name} as {state}"
