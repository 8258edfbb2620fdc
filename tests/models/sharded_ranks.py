"""What each rank of the sharded parity test runs (its own module, so that spawned processes can import it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from roo_ray.config import Model
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.objective import training_loss
from roo_ray.models.ranking import RankingModel
from tests.models.batches import random_batch, schema

SIZES: dict[str, Any] = {"dim": 8, "layers": 2, "heads": 2, "user_dim": 8, "cross_rank": 4, "tower": [16, 8]}
# every architecture once, and what communicates or draws within a forward pass
MODELS = {
    **{kind: Model(**SIZES, kind=kind) for kind in ("dcn", "hstu", "hstu_targets", "cross_attention", "two_tower")},
    "batch_statistics": Model(**SIZES, kind="dcn", normalisation="batch"),
    "random_choices": Model(**SIZES, kind="hstu_targets", dropout=0.3, stochastic_length=1.2),
    "retrieval": Model(**SIZES, kind="retrieval"),
}
AUTOCAST = [kind for kind in MODELS if kind in ARCHITECTURES]  # with the towers in bfloat16 too
TASK_WEIGHTS = torch.tensor([1.0, 0.5])
# Adagrad's first update is as large for a gradient of pure rounding as for a real one, were it not for eps
EMBEDDINGS = {"lr": 0.1, "eps": 1e-4}
DENSE_LR = 0.1
TABLES_LR = 1.0  # of SGD


class Sharder(EmbeddingCollectionSharder):
    """Leaves the choice to the plan."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        kinds = [ShardingType.ROW_WISE, ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE]
        return [kind.value for kind in kinds]


def steps(world: int) -> list[list[RequestBatch | None]]:
    """Per step, per rank: a batch, or None for a rank without data. Unequal requests; one empty rank a step."""
    of = schema()
    shapes = [[[3, 1, 4, 2], [5, 1]], [[2, 2], None], [None, [1, 6, 3]]]
    extra = [[7], [1, 1, 1, 2], None]
    for step, more in zip(shapes, extra, strict=True):
        step.append(more)
    return [
        [shape and random_batch(of, shape, 10 * s + r) for r, shape in enumerate(step[:world])]
        for s, step in enumerate(shapes)
    ]


def build(settings: Model, sparse_device: torch.device | None = None, autocast: bool = False) -> RankingModel:
    torch.manual_seed(0)
    return RankingModel(schema(), settings, sparse_device, autocast)


def plan_for(model: RankingModel, sharder: Sharder, world: int) -> ShardingPlan:
    """Row-wise and table-wise in the same collection, tables on different ranks."""
    kinds = {
        "dim_8": {"item": row_wise(), "topic": table_wise(rank=world - 1)},
        "dim_4": {"word": row_wise(), "tag": table_wise(rank=0)},
    }
    return ShardingPlan(
        {
            f"sparse.collections.{name}": construct_module_sharding_plan(
                collection, kinds[name], sharder=sharder, local_size=world, world_size=world, device_type="cpu"
            )
            for name, collection in model.sparse.collections.items()
        }
    )


def full_tables(model: DistributedModelParallel) -> dict[str, Tensor]:
    """The whole tables, by name, on rank 0 (collective)."""
    tables = {}
    for name, weight in model.state_dict().items():
        if name.startswith("sparse."):
            whole = torch.zeros(weight.shape) if dist.get_rank() == 0 else None
            weight.gather(0, whole)
            tables[name] = whole
    return tables


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)


def run(rank: int, world: int, folder: str) -> None:
    """Trains every model on the steps; rank 0 stores what ``train`` gives."""
    start(rank, world, folder)
    results = {name: train(settings, rank, world) for name, settings in MODELS.items()}
    for name in AUTOCAST:  # by SGD: Adagrad's first update is much the same for a gradient of any scale
        results[f"{name} in bfloat16"] = train(MODELS[name], rank, world, autocast=True, sgd=True)
    if rank == 0:
        torch.save(results, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def loss_of(model: torch.nn.Module, batch: RequestBatch, known: Tensor, world: int) -> Tensor:
    """The loss that a model is trained with, known (K,) over all ranks."""
    return training_loss(model, batch, TASK_WEIGHTS, known, world)[1]


def train(settings: Model, rank: int, world: int, autocast: bool = False, sgd: bool = False) -> dict[str, Any]:
    """Each step's loss and dense gradients, the tables and dense weights after it, and the tables before the first.
    ``sgd``: the tables' optimizer, instead of row-wise Adagrad."""
    model = build(settings, torch.device("meta"), autocast)
    if sgd:
        apply_optimizer_in_backward(torch.optim.SGD, model.sparse.parameters(), {"lr": TABLES_LR})
    else:
        apply_optimizer_in_backward(RowWiseAdagrad, model.sparse.parameters(), EMBEDDINGS)
    sharder = Sharder()
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=plan_for(model, sharder, world),
        sharders=[sharder],
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    initialise_tables(sharded, 0)
    result: dict[str, Any] = {"tables_before": clones(full_tables(sharded)), "steps": []}
    dense = {name: p for name, p in sharded.named_parameters() if name.startswith("dense.")}
    optimizer = torch.optim.SGD(dense.values(), lr=DENSE_LR)
    for batches in steps(world):
        batch = batches[rank] or dummy_batch(schema())
        known = batch.weights.sum(0)
        dist.all_reduce(known)
        optimizer.zero_grad()
        loss = loss_of(sharded, batch, known, world)
        loss.backward()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        gradients, tables = clones({n: p.grad for n, p in dense.items()}), clones(full_tables(sharded))
        optimizer.step()
        result["steps"].append({"loss": mean, "gradients": gradients, "tables": tables, "dense": clones(dense)})
    return result


def look_up_initial_weights(rank: int, world: int, folder: str) -> None:
    """Looks up every row of tables of which each is sharded in another way, with shards given as ShardedTensor
    and as DTensor; stores on rank 0 what it found."""
    start(rank, world, folder)
    kinds = {
        "rows": row_wise(),
        "one_rank": table_wise(rank=1),
        "columns": column_wise(ranks=[1, 0]),
    }
    found = {}
    for dtensor in (False, True):
        collection = EmbeddingCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingConfig(name=kind, num_embeddings=21, embedding_dim=8, feature_names=[kind]) for kind in kinds
            ],
        )
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), EMBEDDINGS)
        sharder = Sharder()
        plan = construct_module_sharding_plan(
            collection, kinds, sharder=sharder, local_size=world, world_size=world, device_type="cpu"
        )
        env = ShardingEnv.from_process_group(dist.group.WORLD)
        if dtensor:
            env.device_mesh = dist.init_device_mesh("cpu", (world,))
            env.output_dtensor = True
        model = DistributedModelParallel(
            collection,
            env=env,
            device=torch.device("cpu"),
            plan=ShardingPlan({"": plan}),
            sharders=[sharder],
        )
        initialise_tables(model, 5)
        ids = torch.arange(21).repeat(len(kinds))
        looked_up = model(KeyedJaggedTensor(list(kinds), ids, lengths=torch.full((len(kinds),), 21)))
        kind_of_state = type(next(iter(model.state_dict().values()))).__name__
        found[kind_of_state] = {kind: looked_up[kind].values().detach() for kind in kinds}
    if rank == 0:
        torch.save(found, Path(folder) / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


def clones(tensors: dict[str, Any]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.detach().clone() for name, t in tensors.items()}
