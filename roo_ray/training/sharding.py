"""Shards a model: TorchRec's planner places the embedding tables, DDP replicates the dense part.

By default tables are row-wise or table-wise, which keep a table's update rule (one row-wise Adagrad accumulator
per row), so that a run on 1 rank and on N ranks are the same run. Other kinds are opted in to per table; what
the device cannot do is refused. Embeddings are updated in backward (fused).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torchrec.optim
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
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
from roo_ray.models.managed import managed_ids
from roo_ray.models.pooled import PooledLookup
from roo_ray.training.hosts import describe, places, topology

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torchrec.optim.Adagrad,
    "sgd": torchrec.optim.SGD,
    "adam": torchrec.optim.Adam,
    "lamb": torchrec.optim.LAMB,
}


_WAYS_OUT = "take more or larger hosts, fewer rows, a smaller dim, or model.embeddings.weights=fp16"


SHARDING_TYPES = {
    "table_wise": ShardingType.TABLE_WISE,
    "row_wise": ShardingType.ROW_WISE,
    "column_wise": ShardingType.COLUMN_WISE,
    "data_parallel": ShardingType.DATA_PARALLEL,
    "grid": ShardingType.GRID_SHARD,
}


def compute_kernels(sharding_type: str, compute_device_type: str) -> list[str]:
    """Fused kernels: the optimizer runs in backward (data-parallel tables take the dense part's)."""
    if sharding_type == ShardingType.DATA_PARALLEL.value:
        return [EmbeddingComputeKernel.DENSE.value]
    kernels = [EmbeddingComputeKernel.FUSED]
    kernels += [] if compute_device_type == "cpu" else [EmbeddingComputeKernel.FUSED_UVM_CACHING]
    return [kernel.value for kernel in kernels]


class TableSharder(EmbeddingCollectionSharder):
    """Offers the planner what is exact on every backend: row-wise, table-wise and column-wise, fused kernels.

    TorchRec's own sharder also offers data-parallel tables, whose gradients are wrong on CPU. The constraints of
    each table choose among the kinds.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Row-wise, table-wise and column-wise; on a GPU data-parallel."""
        kinds = ["table_wise", "row_wise", "column_wise"]
        kinds += [] if compute_device_type == "cpu" else ["data_parallel"]
        return [SHARDING_TYPES[kind].value for kind in kinds]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """See ``compute_kernels``."""
        return compute_kernels(sharding_type, compute_device_type)


class PooledTableSharder(EmbeddingBagCollectionSharder):
    """The same for pooled tables, of which all kinds are exact on every backend."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All that a config can name."""
        return [kind.value for kind in SHARDING_TYPES.values()]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """See ``compute_kernels``."""
        return compute_kernels(sharding_type, compute_device_type)


@dataclass(frozen=True)
class ShardedModel:
    """``module``: the DMP-wrapped model. ``optimizer``: steps the dense part (the embeddings' optimizer runs in
    backward; it is in here for its state). ``plan``: where each table lies."""

    module: DistributedModelParallel
    optimizer: CombinedOptimizer
    plan: ShardingPlan


def embedding_collections(model: nn.Module) -> Iterator[EmbeddingCollection | EmbeddingBagCollection]:
    """All TorchRec embedding collections in a model, those of pooled tables too."""
    for module in model.modules():
        if isinstance(module, (EmbeddingCollection, EmbeddingBagCollection)):
            yield module


def tables_of(model: nn.Module) -> Iterator[EmbeddingConfig | EmbeddingBagConfig]:
    """All tables of a model."""
    for collection in embedding_collections(model):
        if isinstance(collection, EmbeddingBagCollection):
            yield from collection.embedding_bag_configs()
        else:
            yield from collection.embedding_configs()


def table_constraints(
    model: nn.Module,
    row_wise_from: int,
    batch_requests: int,
    ids_per_request: dict[str, float],
    embeddings: Embeddings | None = None,
    world_size: int = 1,
    device_type: str = "cpu",
    batch_impressions: int | None = None,
    hosts: int = 1,
) -> dict[str, ParameterConstraints]:
    """Per table: as ``embeddings.sharding`` says, otherwise row-wise from ``row_wise_from`` rows and table-wise
    below, with the measured ids per request of each of its features (``ids_per_request``, by lookup feature;
    impression-level features have theirs times impressions), so that the planner's costs are ours. The batch of
    every feature is B_RO (``batch_requests``): candidates are looked up as lists of their request. That of pooled
    tables which bags of impressions read is B_NRO (``batch_impressions``; None: as many as requests).

    On a GPU the planner chooses between its memory and host memory with a cache on it (UVM), by what fits, where
    ``embeddings.uvm`` does not say it; managed tables lie in its memory. A grid cuts columns over the ``hosts``, and
    rows over the ranks of each."""
    embeddings = embeddings or Embeddings()
    managed = managed_ids(model)
    on_device = set(managed.features) if managed else set()  # their rows are written to outside the lookup
    lookups = [module for module in model.modules() if isinstance(module, PooledLookup)]
    by_impression = {t for lookup in lookups for t, level in lookup.levels.items() if level == "impression"}
    constraints = {}
    for table in tables_of(model):
        default = "row_wise" if table.num_embeddings >= row_wise_from else "table_wise"
        kind = embeddings.sharding.get(table.name, default)
        kernels = [EmbeddingComputeKernel.FUSED]
        if kind == "data_parallel":
            kernels = [EmbeddingComputeKernel.DENSE]
        elif table.name in embeddings.uvm:
            kernels = [EmbeddingComputeKernel.FUSED_UVM_CACHING]
        elif device_type != "cpu" and table.name not in on_device:
            kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING)
        parts = {"column_wise": world_size, "grid": hosts}.get(kind)  # of the columns, cut in multiples of 4 floats
        rows = (batch_impressions or batch_requests) if table.name in by_impression else batch_requests
        ids = [ids_per_request.get(name, 1.0) * batch_requests / rows for name in table.feature_names]
        constraints[table.name] = ParameterConstraints(
            sharding_types=[SHARDING_TYPES[kind].value],
            compute_kernels=[kernel.value for kernel in kernels],
            min_partition=max(4, -(-table.embedding_dim // parts) // 4 * 4) if parts else None,
            pooling_factors=[max(mean, 0.01) for mean in ids],
            batch_sizes=[rows] * len(table.feature_names),
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
    batch_impressions: int | None = None,
) -> ShardedModel:
    """Wraps ``model`` (its embedding collections on the meta device) for the current process group.

    ``batch_requests``, ``batch_impressions``: B_RO and B_NRO of a rank's batch (None: as many as requests).
    ``ids_per_request``: mean ids per request, by lookup feature. ``embeddings``: how tables are stored, placed and
    updated.
    Every rank plans for itself from the same inputs: a collective plan that failed on rank 0 would leave the
    others waiting. Initial weights depend on ``settings.seed`` alone, not on the world size or the plan.
    Raises ConfigError where the tables do not fit the hosts' memory (or the GPUs'), or cannot be had as
    ``embeddings`` says.
    """
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("shard() needs an initialised process group")
    embeddings = embeddings or Embeddings()
    tables = [table.name for table in tables_of(model)]
    refuse_what_cannot_be(embeddings, tables, device.type)
    for collection in embedding_collections(model):
        fused = [p for n, p in collection.named_parameters() if not _is_data_parallel(n, embeddings)]
        apply_optimizer_in_backward(OPTIMIZERS[embeddings.optimizer], fused, {"lr": settings.embedding_lr})
    ranks = places(device)
    world, hosts = len(ranks), topology(ranks, device.type)
    if "grid" in embeddings.sharding.values():  # TorchRec reads here which ranks are of one host
        os.environ["LOCAL_WORLD_SIZE"] = str(hosts.local_world_size)
    sharders = [TableSharder(use_index_dedup=embeddings.index_dedup), PooledTableSharder()]
    planner = EmbeddingShardingPlanner(
        topology=hosts,
        constraints=table_constraints(
            model,
            settings.row_wise_from,
            batch_requests,
            ids_per_request,
            embeddings,
            world,
            device.type,
            batch_impressions,
            world // hosts.local_world_size,
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
        (kind, table, "weight")
        for table in tables
        for kind in ("embeddings", "embedding_bags")
        if embeddings.sharding.get(table) != "data_parallel"
    }
    dense = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not (name.startswith("sparse.") and tuple(name.split(".")[-3:]) in fused_tables)
    }
    dense_optimizer = KeyedOptimizerWrapper(
        dense, lambda parameters: torch.optim.Adam(parameters, lr=settings.dense_lr, fused=True)
    )
    _make_state(dense_optimizer)
    optimizer = CombinedOptimizer([module.fused_optimizer, dense_optimizer])
    return ShardedModel(module, optimizer, plan)


def _make_state(adam: KeyedOptimizerWrapper) -> None:
    """Makes Adam's state, else a checkpoint's would silently not be loaded; by a step, which does not count: at step 2
    Adam would take the first gradient at 0.74 of its learning rate."""
    adam.init_state()
    for state in adam.state.values():
        state["step"].zero_()


def _sizes(model: nn.Module) -> str:
    """The tables by their bytes, the largest first."""
    sizes = {
        table.name: table.num_embeddings * table.embedding_dim * DATA_TYPE_NUM_BITS[table.data_type] / 8 / 2**30
        for table in tables_of(model)
    }
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"'{name}' {size:,.1f} GiB" for name, size in largest)
    return f"the embedding tables ({sum(sizes.values()):,.1f} GiB and the optimizer's state; {named})"


def _is_data_parallel(parameter: str, embeddings: Embeddings) -> bool:
    return embeddings.sharding.get(parameter.split(".")[-2]) == "data_parallel"


def describe_plan(plan: ShardingPlan) -> list[dict[str, object]]:
    """One row per table: name, sharding type, kernel, whether it is pooled, and the ranks that hold it (for logs and
    MLflow), with rows and dim of their parts; ranks of a data-parallel table hold all of it."""
    rows: list[dict[str, object]] = []
    for module, module_plan in plan.plan.items():
        for table, sharding in module_plan.items():  # type: ignore[attr-defined]
            if sharding.sharding_spec is None:  # what is not cut has no shards
                shards = [{"rank": rank} for rank in sharding.ranks]
            else:
                shards = [
                    {"rank": shard.placement.rank(), "rows": shard.shard_sizes[0], "dim": shard.shard_sizes[1]}
                    for shard in sharding.sharding_spec.shards
                ]
            rows.append(
                {
                    "table": table,
                    "sharding": sharding.sharding_type,
                    "kernel": sharding.compute_kernel,
                    "pooled": ".pooled." in module,
                    "shards": shards,
                }
            )
    return rows
