"""Sizing: what must hold of any prediction, and the job's command line on a real manifest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.cluster.memory import Table, worker_memory
from roo_ray.cluster.price_files import read_costs
from roo_ray.cluster.sizing import (
    Prices,
    Shape,
    UnitCosts,
    cheapest,
    checkpoints_of,
    exchanged_bytes,
    fit_costs,
    fit_exchange,
    memory_of,
    predict,
    sent_bytes,
    shape_of,
)
from roo_ray.config import load_config
from roo_ray.errors import EXIT_BAD_INPUT, EXIT_OK, ConfigError
from roo_ray.models.ranking import make_towers
from roo_ray.requests.manifest import load_manifest
from tests.cluster.heads import ROOT
from tests.ingest import shard_maker
from tests.ingest.shard_maker import random_rows, write_data_set

SHAPE = Shape(
    steps=1000,
    requests=400.0,
    megaflops=2000.0,
    lookup_bytes=50_000.0,
    tables={
        "items": Table(8e9, "split"),
        "users": Table(4e9, "split"),
        "cities": Table(1e6),
        "topics": Table(3e6),
    },
    dense_bytes=4e6,
    epochs=2,
    lanes=24,
)
COSTS = UnitCosts(
    fixed_s=0.01,
    per_megaflop_s=1e-4,
    latency_s=0.002,
    bandwidth=1e9,
    start_s=0,
    step_error=0.12,
    largest_step_error=0.31,
)
PRICES = Prices(trainer_hour=2.0, data_cpu_hour=0.05)


def test_a_step_by_hand() -> None:
    one, two = (predict(SHAPE, workers, COSTS, PRICES) for workers in (1, 2))
    assert one.step_s == pytest.approx(0.01 + 0.2)
    exchange = 2 * 50_000 * 200 / 2
    assert two.exchange_bytes == exchange
    assert two.step_s == pytest.approx(0.01 + 0.1 + 0.002 + (exchange + 4e6) / 1e9)
    assert one.memory == pytest.approx(12e9 + 4e6 + 16e6 + 3 * 50_000 * 400)
    assert one.data_cpus == 1
    assert one.data_nodes == 1
    assert one.cost == pytest.approx(one.seconds / 3600 * (2.0 + 16 * 0.05))  # a data node is paid whole
    state = 12e9 + 4e6 + 3 * 4e6
    assert one.checkpoints == 2
    assert one.seconds == pytest.approx(2 * 1000 * one.step_s + 2 * state / 2e9 + state / 2e8)
    fast = COSTS.model_copy(update={"read_requests_per_s": 100.0})
    assert predict(SHAPE, 1, fast, PRICES).data_cpus == 20  # 400 requests in 0.21 s, 100/s a CPU
    assert predict(SHAPE, 1, fast, PRICES).data_nodes == 2


def test_tables_that_a_gpu_has_no_room_for_go_to_the_host() -> None:
    """12 GB on two workers, of 6 GB each: 4 GB and 2 GB, and little else."""
    on_gpu = COSTS.model_copy(update={"gpu": True})

    def on(memory: float | None, host: float | None = None) -> tuple[bool, float]:
        prices = Prices(trainer_hour=2, worker_memory=memory, worker_host_memory=host)
        predicted = predict(SHAPE, 2, on_gpu, prices)
        return predicted.fits, predicted.host_memory

    assert on(None) == on(8e9) == (True, 0)
    assert on(5e9) == (False, 4e9)  # what the host has is not known
    assert on(5e9, 20e9) == (True, 4e9)
    assert on(5e9, 4.5e9) == (False, 4e9)  # of which a fifth is not for tables
    assert on(2e9, 20e9) == (True, 6e9)
    assert on(1e9, 20e9) == (False, 0)  # the cache of a fifth is too much
    cpus = Prices(trainer_hour=2, worker_memory=5e9, worker_host_memory=20e9)
    assert not predict(SHAPE, 2, COSTS, cpus).fits


def test_what_every_worker_has_does_not_shrink() -> None:
    copied = replace(SHAPE, tables={"items": Table(3e9, "copied")})
    for workers in (1, 2, 8):
        assert memory_of(copied, workers, COSTS).device >= 4e9  # with the gradient
    assert sent_bytes(copied, 2) - sent_bytes(replace(copied, tables={}), 2) == pytest.approx(1e9)
    assert memory_of(copied, 2, COSTS).in_host(3e9) is None


@given(
    st.lists(st.tuples(st.floats(1, 1e9), st.sampled_from(["split", "whole"]), st.booleans()), max_size=8),
    st.integers(1, 8),
    st.floats(0, 2e9),
)
def test_the_fullest_worker(tables: list[tuple[float, Any, bool]], workers: int, room: float) -> None:
    """It has at least its share; what goes to its host is room enough, and never more than there is."""
    more = 1 + 1e-6  # of rounding
    memory = worker_memory([Table(*table) for table in tables], workers, 5.0)
    total = sum(size for size, *_ in tables)
    held = sum(memory.tables) + memory.hosted
    assert total / workers <= held * more
    assert held <= total * more
    in_host = memory.in_host(room)
    if in_host is None:
        assert 5.0 + 0.2 * held > room * (2 - more) - 1e-6
    else:
        assert memory.hosted <= in_host <= held * more
        assert 5.0 + 0.2 * in_host + (held - in_host) <= room * more + 1e-6


@pytest.mark.parametrize(("workers", "nodes"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_nodes_of_trainers_are_paid_whole(workers: int, nodes: int) -> None:
    prices = Prices(trainer_hour=2.0, trainers_per_node=4, data_cpu_hour=0)
    predicted = predict(SHAPE, workers, COSTS, prices)
    assert predicted.trainer_nodes == nodes
    assert predicted.cost == pytest.approx(predicted.seconds / 3600 * nodes * 4 * 2.0)


@pytest.mark.parametrize(
    ("steps", "minutes", "write_s", "number"),
    [(None, None, 1.0, 2), (500, None, 1.0, 6), (None, 1.0, 1.0, 9), (500, 1.0, 1.0, 9), (1, None, 60.0, 9)],
)
def test_checkpoints_are_counted(steps: int | None, minutes: float | None, write_s: float, number: int) -> None:
    """Of 2 epochs of 1000 steps in 7 minutes; while one is being written the next one waits."""
    shape = replace(SHAPE, checkpoint_every_steps=steps, checkpoint_every_minutes=minutes)
    assert checkpoints_of(shape, 420.0, write_s) == number


@given(st.floats(0, 0.1), st.floats(1e6, 1e9), st.floats(1e3, 1e6), st.floats(1.5, 10))
def test_the_cost_of_an_exchange_is_found_again(latency: float, bandwidth: float, small: float, more: float) -> None:
    measured = [(sent, latency + sent / bandwidth) for sent in (small, small * more)]
    found = fit_exchange(measured, 1e10)
    assert found[1] == pytest.approx(bandwidth, rel=1e-3)
    assert found[0] == pytest.approx(latency, abs=1e-6 + 1e-3 * small / bandwidth)
    quick = fit_exchange(measured, bandwidth / 2)
    assert quick[1] == pytest.approx(bandwidth / 2)
    with pytest.raises(ConfigError, match="two batch sizes"):
        fit_exchange([(1.0, 1.0), (1.0, 2.0)], 1e9)


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=2, max_size=2, unique=True))
def test_more_workers_hold_less_and_a_shared_core_is_no_gain(workers: list[int]) -> None:
    few, many = sorted(workers)
    assert memory_of(SHAPE, many, COSTS).device < memory_of(SHAPE, few, COSTS).device
    shared = COSTS.model_copy(update={"cores": 1})
    assert predict(SHAPE, many, shared, PRICES).step_s >= predict(SHAPE, few, shared, PRICES).step_s
    assert predict(SHAPE, many, COSTS, PRICES).step_s < predict(SHAPE, few, COSTS, PRICES).step_s


def test_the_cheapest_within_the_deadline() -> None:
    predictions = [predict(SHAPE, workers, COSTS, PRICES) for workers in (1, 2, 4, 8)]
    free = cheapest(predictions, None)
    assert free is not None
    assert free.cost == min(p.cost for p in predictions)
    late = cheapest(predictions, free.seconds * 0.6)
    assert late is not None
    assert late.workers > free.workers
    assert cheapest(predictions, 1.0) is None
    small = [predict(SHAPE, workers, COSTS, Prices(trainer_hour=2, worker_memory=5e9)) for workers in (1, 2, 4, 8)]
    assert [p.fits for p in small] == [False, False, True, True]
    assert cheapest(small, None).workers >= 4  # type: ignore[union-attr]


@given(st.floats(0, 1), st.floats(1e-6, 1e-2), st.lists(st.floats(1, 1e4), min_size=2, max_size=6, unique=True))
def test_unit_costs_are_found_again(fixed: float, slope: float, works: list[float]) -> None:
    if max(works) - min(works) < 1:
        return
    found = fit_costs([(work, fixed + slope * work) for work in works])
    assert found[0] == pytest.approx(fixed, abs=1e-6 + 1e-4 * slope * max(works))
    assert found[1] == pytest.approx(slope, rel=1e-3)


def test_unit_costs_never_are_negative() -> None:
    assert fit_costs([(1.0, 2.0), (2.0, 1.0)]) == (0.0, 1.0)
    fixed, slope = fit_costs([(1.0, 0.5), (2.0, 2.0)])
    assert fixed == 0
    assert slope > 0
    with pytest.raises(ConfigError, match="two batch sizes"):
        fit_costs([(1.0, 2.0), (1.0, 2.1)])


def test_uneven_lanes_wait_for_the_fullest_rank() -> None:
    uneven = replace(SHAPE, lanes=4)
    assert predict(uneven, 3, COSTS, PRICES).step_s >= predict(uneven, 2, COSTS, PRICES).step_s


def test_files_with_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.yaml"
    path.write_text("fixed_s: 0.01\nper_megaflop_s: 0.1\nspeed: 3\n")
    with pytest.raises(ConfigError, match="speed"):
        read_costs(str(path))
    with pytest.raises(ConfigError, match="costs file not found"):
        read_costs(str(tmp_path / "none.yaml"))


def size(folder: Path, *arguments: str, config: str | None = None) -> subprocess.CompletedProcess[str]:
    (folder / "costs.yaml").write_text(yaml.safe_dump(COSTS.model_dump()))
    (folder / "prices.yaml").write_text(yaml.safe_dump(PRICES.model_dump()))
    files = ["--costs", f"{folder}/costs.yaml", "--prices", f"{folder}/prices.yaml"]
    path = f"{folder}/{config}" if config else "configs/demo.yaml"
    command = [sys.executable, "jobs/size_cluster.py", "--config", path, *files, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_shape_of_a_run_on_real_shards(tmp_path: Path) -> None:
    """Steps, bytes of tables and of the model against those of a manifest's files and the modules themselves; the
    job prints a table for them."""
    schema = shard_maker.schema()
    (tmp_path / "schema.yaml").write_text(schema.to_yaml())
    counts = [1 + i % 9 for i in range(400)]
    rows = random_rows(counts, 3, days=4)
    write_data_set(tmp_path / "requests", rows, schema, row_group=20, file_rows=100)
    manifest = load_manifest(str(tmp_path / "requests"))
    content = {"name": "sized", "schema": "schema.yaml", "requests": f"{tmp_path}/requests"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content | {"ingest": {"batch_impressions": 40, "lanes": 4}}))
    config = load_config(tmp_path / "config.yaml")
    shape = shape_of(config, manifest)
    trained = sum(file.requests for file in manifest.files if file.day != manifest.days[-1])
    impressions = sum(file.impressions for file in manifest.files if file.day != manifest.days[-1])
    assert impressions / (40 * config.ingest.lanes) <= shape.steps <= 1.5 * impressions / (40 * config.ingest.lanes)
    assert shape.requests * shape.steps == pytest.approx(trained)
    assert shape.full_requests >= shape.requests
    # ids of a mean request, by features' own lengths: the tables of items and topics have 8 floats a row, the others 4
    shown = manifest.impressions / manifest.requests
    events = min(fmean(len(row["history_item"] or []) for row in rows), 4)
    interests = min(fmean(len(row["interest_words"] or []) for row in rows), 3)
    device = fmean(row["device_id"] is not None for row in rows)
    tags = min(fmean(sum(len(bag or []) for bag in row["tag_ids"]) for row in rows), 2 * shown)
    wide, narrow = 2 * events + 2 * shown + tags, 1 + interests + device
    assert shape.lookup_bytes == pytest.approx(4 * (8 * wide + 4 * narrow))
    towers = make_towers(schema, config.model)
    assert shape.dense_bytes == 4 * sum(p.numel() for p in towers.parameters())
    for name, held in shape.tables.items():
        table = schema.tables[name]
        assert held.size == table.rows * table.dim * 4 + table.rows * 4  # row-wise Adagrad: a float a row
    with_adagrad = load_config(tmp_path / "config.yaml", ["model.embeddings.optimizer=adagrad"])
    for name, held in shape_of(with_adagrad, manifest).tables.items():
        assert held.size > shape.tables[name].size
    first, *others = shape.tables
    placed = ["training.gpu=true", f"model.embeddings.sharding={{{first}: data_parallel}}"]
    placed += [f"model.embeddings.uvm=[{others[0]}]"]
    on_gpus = shape_of(load_config(tmp_path / "config.yaml", placed), manifest).tables
    assert on_gpus[first] == Table(3 * schema.tables[first].rows * schema.tables[first].dim * 4, "copied")
    assert [name for name, held in on_gpus.items() if held.hosted] == [others[0]]
    embedding = 4 * schema.tables["word"].dim
    bags = "model.embeddings.pooled=[word]"  # one vector per bag, instead of one per id
    rest = shape.lookup_bytes - embedding * interests
    pooled = shape_of(load_config(tmp_path / "config.yaml", [bags]), manifest)
    assert pooled.lookup_bytes == pytest.approx(rest + embedding)
    rows = shape_of(load_config(tmp_path / "config.yaml", [bags, "training.row_wise_from=30"]), manifest)
    assert rows.lookup_bytes == pytest.approx(rest)
    assert rows.reduced_bytes == embedding
    for workers in (2, 8):  # every worker sends its part of each bag
        apart = exchanged_bytes(rows, workers) - exchanged_bytes(replace(rows, reduced_bytes=0.0), workers)
        lanes = -(-rows.lanes // workers) / rows.lanes
        assert apart == pytest.approx(2 * embedding * rows.requests * lanes * (workers - 1))
    assert shape.map_bytes == 0
    managed = schema.to_yaml().replace("hash: true", "managed: true")
    (tmp_path / "managed.yaml").write_text(managed)
    options = [f"schema={tmp_path}/managed.yaml", "model.embeddings.managed={policy: lfu, buffer: 1000}"]
    maps = shape_of(load_config(tmp_path / "config.yaml", options), manifest)
    hashed = [table.rows for table in schema.tables.values() if table.hash]
    assert maps.map_bytes == sum(3 * 8 * rows + 28 * 1000 for rows in hashed) > 0
    assert memory_of(maps, 8, COSTS).rest == memory_of(shape, 8, COSTS).rest + maps.map_bytes
    done = size(tmp_path, "--workers", "1,2,4,99", "--deadline", "10h", config="config.yaml")
    assert done.returncode == EXIT_OK, done.stderr
    assert "12% off in the mean and 31% at most" in " ".join(done.stdout.split())
    assert "memory without activations" in " ".join(done.stdout.split())
    on_gpus = size(tmp_path, "training.gpu=true", config="config.yaml")
    assert on_gpus.returncode == EXIT_BAD_INPUT
    assert "was measured without GPUs" in on_gpus.stderr
    assert done.stdout.count("cheapest") == 1
    late = size(tmp_path, "--deadline", "0.001s", config="config.yaml")
    assert late.returncode == EXIT_BAD_INPUT
    assert "no number of workers fits" in late.stderr


def test_the_job_refuses_what_it_cannot_size(tmp_path: Path) -> None:
    done = size(tmp_path, f"requests={tmp_path}/none")
    assert done.returncode == EXIT_BAD_INPUT
    assert f"{tmp_path}/none" in done.stderr
    assert "Traceback" not in done.stderr
