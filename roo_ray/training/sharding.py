"""Shards a model: TorchRec's planner places the embedding tables, DDP replicates the dense part.

By default tables are row-wise or table-wise, which keep a table's update rule (one row-wise Adagrad accumulator
per row), so that a run on 1 rank and on N ranks are the same run. Other kinds are opted in to per table; what
the device cannot do is refused. Embeddings are updated in backward (fused).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torchrec.optim
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from roo_ray.config import Embeddings, Training
from roo_ray.errors import ConfigError
from roo_ray.models.check import refuse_what_cannot_be
from roo_ray.models.initialise import initialise_tables
from roo_ray.training.hosts import describe, places, topology

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torchrec.optim.Adagrad,
    "sgd": torchrec.optim.SGD,
    "adam": torchrec.optim.Adam,
    "lamb": torchrec.optim.LAMB,
}


_WAYS_OUT = "take more or larger hosts, fewer rows, a smaller dim, or model.embeddings.weights=fp16"


class TableSharder(EmbeddingCollectionSharder):
    """Offers the planner what is exact on every backend: row-wise, table-wise and column-wise, fused kernels.

    TorchRec's own sharder also offers data-parallel tables, whose gradients are wrong on CPU. The constraints of
    each table choose among the kinds.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Row-wise, table-wise and column-wise; on a GPU data-parallel."""
        kinds = [ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE]
        kinds += [] if compute_device_type == "cpu" else [ShardingType.DATA_PARALLEL]
        return [kind.value for kind in kinds]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Fused kernels: the optimizer runs in backward (data-parallel tables take the dense part's)."""
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        kernels = [EmbeddingComputeKernel.FUSED]
        kernels += [] if compute_device_type == "cpu" else [EmbeddingComputeKernel.FUSED_UVM_CACHING]
        return [kernel.value for kernel in kernels]


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
    model: nn.Module,
    row_wise_from: int,
    batch_requests: int,
    ids_per_request: dict[str, float],
    embeddings: Embeddings | None = None,
    world_size: int = 1,
    device_type: str = "cpu",
) -> dict[str, ParameterConstraints]:
    """Per table: as ``embeddings.sharding`` says, otherwise row-wise from ``row_wise_from`` rows and table-wise
    below, with the measured ids per request of each of its features (``ids_per_request``, by lookup feature;
    impression-level features have theirs times impressions), so that the planner's costs are ours. The batch of
    every feature is B_RO: candidates are looked up as lists of their request.

    On a GPU the planner chooses between its memory and host memory with a cache on it (UVM), by what fits, where
    ``embeddings.uvm`` does not say it."""
    embeddings = embeddings or Embeddings()
    constraints = {}
    for collection in embedding_collections(model):
        for table in collection.embedding_configs():
            default = "row_wise" if table.num_embeddings >= row_wise_from else "table_wise"
            kind = embeddings.sharding.get(table.name, default)
            kernels = [EmbeddingComputeKernel.FUSED]
            if kind == "data_parallel":
                kernels = [EmbeddingComputeKernel.DENSE]
            elif table.name in embeddings.uvm:
                kernels = [EmbeddingComputeKernel.FUSED_UVM_CACHING]
            elif device_type != "cpu":
                kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING)
            # columns are cut in multiples of 4 floats
            columns = max(4, -(-table.embedding_dim // world_size) // 4 * 4)
            constraints[table.name] = ParameterConstraints(
                sharding_types=[kind],
                compute_kernels=[kernel.value for kernel in kernels],
                min_partition=columns if kind == "column_wise" else None,
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
    embeddings: Embeddings | None = None,
) -> ShardedModel:
    """Wraps ``model`` (its embedding collections on the meta device) for the current process group.

    ``batch_requests``: B_RO of a rank's batch. ``ids_per_request``: mean ids per request, by lookup feature.
    ``embeddings``: how tables are stored, placed and updated.
    Every rank plans for itself from the same inputs: a collective plan that failed on rank 0 would leave the
    others waiting. Initial weights depend on ``settings.seed`` alone, not on the world size or the plan.
    Raises ConfigError where the tables do not fit the hosts' memory (or the GPUs'), or cannot be had as
    ``embeddings`` says.
    """
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("shard() needs an initialised process group")
    embeddings = embeddings or Embeddings()
    tables = [table.name for c in embedding_collections(model) for table in c.embedding_configs()]
    refuse_what_cannot_be(embeddings, tables, device.type)
    for collection in embedding_collections(model):
        fused = [p for n, p in collection.named_parameters() if not _is_data_parallel(n, embeddings)]
        apply_optimizer_in_backward(OPTIMIZERS[embeddings.optimizer], fused, {"lr": settings.embedding_lr})
    ranks = places(device)
    world = len(ranks)
    sharders = [TableSharder(use_index_dedup=embeddings.index_dedup)]
    planner = EmbeddingShardingPlanner(
        topology=topology(ranks, device.type),
        constraints=table_constraints(
            model, settings.row_wise_from, batch_requests, ids_per_request, embeddings, world, device.type
        ),
        debug=False,
    )
    try:
        plan = planner.plan(model, sharders)  # type: ignore[arg-type]
    except PlannerError as error:
        if error.error_type != PlannerErrorType.INSUFFICIENT_STORAGE:
            raise ConfigError(f"no sharding plan for {world} workers: {error}") from error
        raise ConfigError(f"{_sizes(model)} do not fit {describe(ranks)}: {_WAYS_OUT}") from error
    module = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan,
        sharders=sharders,  # type: ignore[arg-type]
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    initialise_tables(module, settings.seed)
    # by name: a rank that holds nothing of a table has a parameter for it all the same, and no fused state
    fused_tables = {
        f"embeddings.{table}.weight" for table in tables if embeddings.sharding.get(table) != "data_parallel"
    }
    dense = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and ".".join(name.split(".")[-3:]) not in fused_tables
    }
    dense_optimizer = KeyedOptimizerWrapper(
        dense, lambda parameters: torch.optim.Adam(parameters, lr=settings.dense_lr, fused=True)
    )
    dense_optimizer.init_state()  # otherwise a checkpoint's Adam state would silently not be loaded
    optimizer = CombinedOptimizer([module.fused_optimizer, dense_optimizer])
    return ShardedModel(module, optimizer, plan)


def _sizes(model: nn.Module) -> str:
    """The tables by their bytes, the largest first."""
    sizes = {
        table.name: table.num_embeddings * table.embedding_dim * DATA_TYPE_NUM_BITS[table.data_type] / 8 / 2**30
        for collection in embedding_collections(model)
        for table in collection.embedding_configs()
    }
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"'{name}' {size:,.1f} GiB" for name, size in largest)
    return f"the embedding tables ({sum(sizes.values()):,.1f} GiB and the optimizer's state; {named})"


def _is_data_parallel(parameter: str, embeddings: Embeddings) -> bool:
    return embeddings.sharding.get(parameter.split(".")[-2]) == "data_parallel"


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
