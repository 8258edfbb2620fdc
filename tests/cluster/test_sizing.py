"""Sizing: what must hold of any prediction, and the job's command line on a real manifest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.cluster.price_files import read_costs
from roo_ray.cluster.sizing import Prices, Shape, UnitCosts, cheapest, fit_costs, memory_of, predict
from roo_ray.config import load_config
from roo_ray.errors import EXIT_BAD_INPUT, ConfigError
from roo_ray.models.ranking import make_towers
from tests.cluster.heads import ROOT

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
COSTS = UnitCosts(fixed_s=0.01, per_megaflop_s=1e-4, latency_s=0.002, bandwidth=1e9, start_s=0)
PRICES = Prices(trainer_hour=2.0, data_cpu_hour=0.05)


def test_a_step_by_hand() -> None:
    one, two = (predict(SHAPE, workers, COSTS, PRICES) for workers in (1, 2))
    assert one.step_s == pytest.approx(0.01 + 0.2)
    exchange = 2 * 50_000 * 200 / 2
    assert two.exchange_bytes == exchange
    assert two.step_s == pytest.approx(0.01 + 0.1 + 0.002 + (exchange + 4e6) / 1e9)
    assert one.memory == pytest.approx(12e9 + 4e6 + 16e6 + 3 * 50_000 * 400)
    assert one.data_cpus == 1
    assert one.cost == pytest.approx(one.seconds / 3600 * 2.05)


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


def test_dense_bytes_are_those_of_the_model() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    towers = make_towers(config.request_schema, config.model)
    with torch.no_grad():
        assert sum(p.numel() for p in towers.parameters()) > 1000


def test_files_with_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.yaml"
    path.write_text("fixed_s: 0.01\nper_megaflop_s: 0.1\nspeed: 3\n")
    with pytest.raises(ConfigError, match="speed"):
        read_costs(str(path))
    with pytest.raises(ConfigError, match="costs file not found"):
        read_costs(str(tmp_path / "none.yaml"))


def size(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "costs.yaml").write_text(yaml.safe_dump(COSTS.model_dump()))
    (folder / "prices.yaml").write_text(yaml.safe_dump(PRICES.model_dump()))
    files = ["--costs", f"{folder}/costs.yaml", "--prices", f"{folder}/prices.yaml"]
    command = [sys.executable, "jobs/size_cluster.py", "--config", "configs/demo.yaml", *files, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_job_refuses_what_it_cannot_size(tmp_path: Path) -> None:
    done = size(tmp_path, f"requests={tmp_path}/none")
    assert done.returncode == EXIT_BAD_INPUT
    assert f"{tmp_path}/none" in done.stderr
    assert "Traceback" not in done.stderr
