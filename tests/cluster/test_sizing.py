"""Sizing: what must hold of any prediction, and the job's command line on a real manifest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.cluster.price_files import read_costs
from roo_ray.cluster.sizing import (
    Prices,
    Shape,
    UnitCosts,
    cheapest,
    checkpoints_of,
    fit_costs,
    fit_exchange,
    memory_of,
    predict,
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
    table_bytes={"items": (8e9, True), "users": (4e9, True), "cities": (1e6, False), "topics": (3e6, False)},
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
    assert memory_of(SHAPE, many, COSTS) < memory_of(SHAPE, few, COSTS)
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
    write_data_set(tmp_path / "requests", random_rows(counts, 3, days=4), schema, row_group=20, file_rows=100)
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
    towers = make_towers(schema, config.model)
    assert shape.dense_bytes == 4 * sum(p.numel() for p in towers.parameters())
    for name, (size_of_table, _) in shape.table_bytes.items():
        table = schema.tables[name]
        assert size_of_table == table.rows * table.dim * 4 + table.rows * 4  # row-wise Adagrad: a float a row
    with_adagrad = load_config(tmp_path / "config.yaml", ["model.embeddings.optimizer=adagrad"])
    for name, (size_of_table, _) in shape_of(with_adagrad, manifest).table_bytes.items():
        assert size_of_table > shape.table_bytes[name][0]
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
