"""Runs a function in N processes over gloo, and trains a small sharded model in them: what the tests of
sharding and checkpoints share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from roo_ray.config import Embeddings, Model, Training
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.models.losses import ranking_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import Schema
from roo_ray.training.sharding import ShardedModel, shard
from tests.models.batches import random_batch, schema
from tests.processes import start_ranks

# row-wise from 20 rows on: with the test schema's tables that mixes row-wise and table-wise
TRAINING = Training(row_wise_from=20, embedding_lr=0.1, dense_lr=0.01)
MODEL = Model(dim=8, layers=1, heads=2, user_dim=8, cross_layers=1, cross_rank=4, tower=[8])
LANES = 6


def _entry(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(function(rank, world, *args), f"{folder}/result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``[function(rank, world, *args) for every rank]``, each rank a process of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_entry, (world, folder, function, args), world)
        return [torch.load(Path(folder) / f"result{rank}.pt") for rank in range(world)]


def sharded_model(
    embeddings: Embeddings | None = None, of: Schema | None = None, towers: str | None = None, kind: str = MODEL.kind
) -> ShardedModel:
    """A sharded model with seeded weights."""
    torch.manual_seed(0)
    settings = MODEL.model_copy(update={"embeddings": embeddings or Embeddings(), "towers": towers, "kind": kind})
    model = RankingModel(of or schema(), settings, sparse_device=torch.device("meta"))
    return shard(
        model, TRAINING, torch.device("cpu"), batch_requests=4, ids_per_request={}, embeddings=settings.embeddings
    )


def lane_batches(step: int) -> list[RequestBatch]:
    """The batches of all lanes at a step: unequal sizes; lane 5 is drained from step 1 on."""
    sizes = [[3, 1, 4], [1], [2, 2], [5, 1, 1, 1], [2], [3]]
    lanes = [random_batch(schema(), size, seed=10 * step + lane) for lane, size in enumerate(sizes)]
    return lanes if step == 0 else lanes[:5]


def train_steps(
    model: ShardedModel,
    rank: int,
    world: int,
    steps: range,
    *,
    explode: bool = False,
    of: Schema | None = None,
    lanes_of: Callable[[int], list[RequestBatch]] = lane_batches,
) -> list[float]:
    """Trains on the rank's lanes of each step's global batch; the losses of the global batches."""
    losses = []
    of = of or schema()
    task_weights = torch.tensor([label.weight for label in of.labels])
    for step in steps:
        lanes = lanes_of(step)
        mine = lanes[rank::world]
        batch = RequestBatch.concat(mine) if mine else dummy_batch(of)
        if explode:
            batch = batch.explode()
        known = torch.stack([lane.weights.sum(0) for lane in lanes]).sum(0)
        loss = ranking_loss(model.module(batch), batch.labels, batch.weights, task_weights, known, world)
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        total = loss.detach() / world
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def full_weights(model: ShardedModel) -> dict[str, torch.Tensor]:
    """All weights, tables gathered (collective); on rank 0, empty elsewhere."""
    gathered = {}
    for name, value in model.module.state_dict().items():
        if isinstance(value, ShardedTensor):
            out = torch.empty(value.size(), dtype=value.dtype) if dist.get_rank() == 0 else None
            value.gather(dst=0, out=out)
            gathered[name] = out
        else:
            gathered[name] = value.clone()
    return gathered if dist.get_rank() == 0 else {}


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone: what a sharded model needs."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
