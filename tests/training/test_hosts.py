"""Hosts: what memory the planner gives to each rank, and tables that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner

from roo_ray.config import Embeddings, Training
from roo_ray.errors import ConfigError
from roo_ray.training.hosts import TABLES_SHARE, Place, describe, free_memory, host_memory, topology
from roo_ray.training.sharding import TableSharder, describe_plan, shard, table_constraints
from tests.training.ranks import one_rank

GIB = 2**30


def test_ranks_share_the_memory_of_their_host() -> None:
    ranks = [Place("a", 100 * GIB, 0), Place("a", 100 * GIB, 0), Place("b", 60 * GIB, 0), Place("b", 60 * GIB, 0)]
    made = topology(ranks, "cpu")
    # of the poorest: with unequal memory the planner would cut rows unequally, which the lookup does not know
    assert {device.storage.ddr for device in made.devices} == {int(TABLES_SHARE * 60 * GIB) // 2}
    assert made.local_world_size == 2
    assert describe(ranks) == "4 workers on 2 hosts with 48.0 GiB for tables each"


def test_gpus_have_their_own_memory() -> None:
    made = topology([Place("a", 100 * GIB, 80 * GIB), Place("b", 100 * GIB, 40 * GIB)], "cuda")
    assert {device.storage.hbm for device in made.devices} == {40 * GIB}
    assert made.local_world_size == 1


@pytest.mark.parametrize("names", ["aab", "aba", "abb", "abcc"])
def test_unequal_hosts_are_hosts_of_one_rank(names: str) -> None:
    assert topology([Place(name, GIB, 0) for name in names], "cpu").local_world_size == 1


def test_a_container_has_what_its_limit_says(tmp_path: Path) -> None:
    everything = host_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == everything
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory(tmp_path) == 1_000_000


@pytest.mark.parametrize(("version", "prefix"), [(2, ""), (1, "total_")])
def test_a_container_has_free_what_its_limit_leaves(version: int, prefix: str, tmp_path: Path) -> None:
    """What it holds of files is given back when it is wanted; Ray's object store in /dev/shm is no file."""
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    limit, usage = (
        ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    everything = free_memory(tmp_path)
    assert everything > 2_000_000
    (folder / usage).write_text("900000\n")
    stat = f"shmem 500000\ninactive_file 1\n{prefix}inactive_file 200000\n{prefix}active_file 100000\n"
    (folder / "memory.stat").write_text(stat)
    (folder / limit).write_text("max\n")
    assert free_memory(tmp_path) > 2_000_000
    (folder / limit).write_text("1000000\n")
    assert free_memory(tmp_path) == 400_000
    (folder / usage).write_text("1400000\n")
    assert free_memory(tmp_path) == 0


def test_rows_are_cut_evenly() -> None:
    """Lookup assumes it: shards cut in proportion to memory would give other embeddings on 3 ranks than on 1."""
    table = EmbeddingConfig(name="item", num_embeddings=50, embedding_dim=8, feature_names=["item"])
    model = nn.ModuleDict({"sparse": EmbeddingCollection(device=torch.device("meta"), tables=[table])})
    for sizes in ((30, 30, 30), (90, 70, 30)):
        ranks = [Place(f"host of {size}", size * GIB, 0) for size in sizes]
        planner = EmbeddingShardingPlanner(
            topology=topology(ranks, "cpu"), constraints=table_constraints(model, 1, 8, {}, world_size=3)
        )
        (row,) = describe_plan(planner.plan(model, [TableSharder()]))
        assert [shard["rows"] for shard in row["shards"]] == [17, 17, 16]


def test_tables_that_do_not_fit_are_refused() -> None:
    """Before anything is allocated: of twice the memory that is here."""
    rows = 2 * host_memory() // (64 * 4)
    table = EmbeddingConfig(name="item", num_embeddings=rows, embedding_dim=64, feature_names=["item"])
    model = nn.ModuleDict({"sparse": EmbeddingCollection(device=torch.device("meta"), tables=[table])})
    with (
        one_rank(),
        pytest.raises(ConfigError, match=r"'item' [\d.,]+ GiB\) do not fit 1 workers on 1 host") as refused,
    ):
        shard(model, Training(), torch.device("cpu"), batch_requests=8, ids_per_request={})
    assert "model.embeddings.weights=fp16" in str(refused.value)


@pytest.mark.parametrize(("rows", "kernel"), [(GIB // 256, "fused"), (20 * GIB // 256, "fused_uvm_caching")])
def test_tables_larger_than_a_gpu_are_cached_on_it(rows: int, kernel: str) -> None:
    """Planned here, for a GPU of 16 GiB beside 100 GiB of host memory: 1 GiB and 20 GiB of a table."""
    table = EmbeddingConfig(name="item", num_embeddings=rows, embedding_dim=64, feature_names=["item"])
    model = nn.ModuleDict({"sparse": EmbeddingCollection(device=torch.device("meta"), tables=[table])})
    planner = EmbeddingShardingPlanner(
        topology=topology([Place("a", 100 * GIB, 16 * GIB)], "cuda"),
        constraints=table_constraints(model, 1000, 64, {}, device_type="cuda"),
    )
    plan = planner.plan(model, [TableSharder()])
    assert [row["kernel"] for row in describe_plan(plan)] == [kernel]


def test_a_data_parallel_table_is_whole_on_every_rank() -> None:
    tables = [
        EmbeddingConfig(name=name, num_embeddings=1000, embedding_dim=64, feature_names=[name])
        for name in ("item", "user")
    ]
    model = nn.ModuleDict({"sparse": EmbeddingCollection(device=torch.device("meta"), tables=tables)})
    embeddings = Embeddings(sharding={"item": "data_parallel"})
    planner = EmbeddingShardingPlanner(
        topology=topology([Place("a", 100 * GIB, 16 * GIB)] * 2, "cuda"),
        constraints=table_constraints(model, 1000, 64, {}, embeddings, world_size=2, device_type="cuda"),
    )
    item, user = describe_plan(planner.plan(model, [TableSharder()]))
    assert item == {
        "table": "item",
        "sharding": "data_parallel",
        "kernel": "dense",
        "pooled": False,
        "shards": [{"rank": 0}, {"rank": 1}],
    }
    assert user["shards"] == [{"rank": 0, "rows": 500, "dim": 64}, {"rank": 1, "rows": 500, "dim": 64}]
