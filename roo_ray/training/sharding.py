"""Shards a ranking model: TorchRec's planner places the embedding tables, DDP replicates the dense part.

Tables are row-wise or table-wise, which keep a table's update rule (one row-wise Adagrad accumulator per
row), so that a run on 1 rank and on N ranks are the same run. Embeddings are updated in backward (fused).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from roo_ray.config import Training
from roo_ray.errors import ConfigError
from roo_ray.models.initialise import initialise_tables


class RowAndTableWiseSharder(EmbeddingCollectionSharder):
    """Offers the planner what is exact on every backend: row-wise and table-wise, fused kernels.

    TorchRec's own sharder also offers data-parallel tables, whose gradients are wrong on CPU.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Row-wise and table-wise."""
        return [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """The fused kernel: the optimizer runs in backward."""
        return [EmbeddingComputeKernel.FUSED.value]


@dataclass(frozen=True)
class ShardedModel:
    """``module``: the DMP-wrapped model. ``optimizer``: steps the dense part (the embeddings' optimizer runs in
    backward; it is in here for its state). ``plan``: where each table lies."""

    module: DistributedModelParallel
    optimizer: CombinedOptimizer
    plan: ShardingPlan


def embedding_collections(model: nn.Module) -> Iterator[EmbeddingCollection]:
    """All TorchRec embedding collections in a model."""
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            yield module


def table_constraints(
    model: nn.Module, row_wise_from: int, batch_requests: int, ids_per_request: dict[str, float]
) -> dict[str, ParameterConstraints]:
    """Per table: row-wise from ``row_wise_from`` rows, table-wise below, with the measured ids per request of
    each of its features (``ids_per_request``, by lookup feature), so that the planner's costs are ours."""
    constraints = {}
    for collection in embedding_collections(model):
        for table in collection.embedding_configs():
            row_wise = table.num_embeddings >= row_wise_from
            kind = ShardingType.ROW_WISE if row_wise else ShardingType.TABLE_WISE
            constraints[table.name] = ParameterConstraints(
                sharding_types=[kind.value],
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                pooling_factors=[max(ids_per_request.get(name, 1.0), 0.01) for name in table.feature_names],
                batch_sizes=[batch_requests] * len(table.feature_names),
            )
    return constraints


def shard(
    model: nn.Module,
    settings: Training,
    device: torch.device,
    *,
    batch_requests: int,
    ids_per_request: dict[str, float],
) -> ShardedModel:
    """Wraps ``model`` (its embedding collections on the meta device) for the current process group.

    ``batch_requests``: B_RO of a rank's batch. ``ids_per_request``: mean ids per request, by lookup feature.
    Every rank plans for itself from the same inputs: a collective plan that failed on rank 0 would leave the
    others waiting. Initial weights depend on ``settings.seed`` alone, not on the world size or the plan.
    Raises ConfigError where the tables do not fit.
    """
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("shard() needs an initialised process group")
    for collection in embedding_collections(model):
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": settings.embedding_lr})
    world = dist.get_world_size()
    sharders = [RowAndTableWiseSharder()]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world, local_world_size=world, compute_device=device.type),
        constraints=table_constraints(model, settings.row_wise_from, batch_requests, ids_per_request),
        debug=False,
    )
    try:
        plan = planner.plan(model, sharders)  # type: ignore[arg-type]
    except Exception as error:
        raise ConfigError(f"no sharding plan fits {world} workers: {error}") from error
    module = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan,
        sharders=sharders,  # type: ignore[arg-type]
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    initialise_tables(module, settings.seed)
    dense = {name: p for name, p in module.named_parameters() if p.requires_grad and not _is_fused(module, name)}
    dense_optimizer = KeyedOptimizerWrapper(
        dense, lambda parameters: torch.optim.Adam(parameters, lr=settings.dense_lr, fused=True)
    )
    dense_optimizer.init_state()  # otherwise a checkpoint's Adam state would silently not be loaded
    optimizer = CombinedOptimizer([module.fused_optimizer, dense_optimizer])
    return ShardedModel(module, optimizer, plan)


def _is_fused(module: DistributedModelParallel, name: str) -> bool:
    return name in module.fused_optimizer.params


def describe_plan(plan: ShardingPlan) -> list[dict[str, object]]:
    """One row per table: name, sharding type, kernel and the ranks that hold it (for logs and MLflow)."""
    rows: list[dict[str, object]] = []
    for module_plan in plan.plan.values():
        for table, sharding in module_plan.items():  # type: ignore[attr-defined]
            shards = [
                {"rank": shard.placement.rank(), "rows": shard.shard_sizes[0], "dim": shard.shard_sizes[1]}
                for shard in sharding.sharding_spec.shards
            ]
            rows.append(
                {
                    "table": table,
                    "sharding": sharding.sharding_type,
                    "kernel": sharding.compute_kernel,
                    "shards": shards,
                }
            )
    return rows
