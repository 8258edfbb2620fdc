"""How well sizing predicts: step times, numbers of steps and whole runs at 1, 2 and 3 local workers, predicted and
measured.

python benchmarks/sizing.py [--quick] [--json FILE] [--check] [--costs FILE]

Unit costs are measured first: the steps of 1 worker at two batch sizes (a fixed part and a cost of work), of 2 workers
at the smaller one (what a second worker adds), and the bandwidth of the collectives. Then runs at a third batch size,
which nothing was fitted to, are predicted and measured. ``--costs`` writes the unit costs, for jobs/size_cluster.py.
``--check`` exits with 1 where the mean error of the step times is above 25 %, or that of the numbers of steps above
5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from roo_ray import session
from roo_ray.cluster.links import measure_links
from roo_ray.cluster.sizing import Prices, UnitCosts, fit_costs, predict, shape_of
from roo_ray.config import Config, load_config
from roo_ray.requests.manifest import load_manifest
from roo_ray.terminal import print_table
from roo_ray.training.checkpoint import read_state
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare

ROOT = Path(__file__).parents[1]
AIM, STEPS_AIM = 0.25, 0.05
SMALL, LARGE, CHECKED = 256, 1024, 512  # impressions of a lane's batch
LANES = 6  # a multiple of 1, 2 and 3
FREE = Prices(trainer_hour=0, data_cpu_hour=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the data")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the aim is missed")
    parser.add_argument("--costs", metavar="FILE", help="write the measured unit costs to a file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="roo_ray_sizing_"))
    try:
        figures = measure(folder, 3000 if options.quick else 9000, options.costs)
    finally:
        shutil.rmtree(folder)
    report(figures)
    errors = {name: mean_error(figures, name) for name in ("step_s", "steps", "seconds")}
    aims = {"step_s": AIM, "steps": STEPS_AIM}
    print("mean errors: " + ", ".join(f"{name} {error:.1%}" for name, error in errors.items()))
    if options.json:
        Path(options.json).write_text(json.dumps({"figures": figures, "mean_errors": errors, "aims": aims}, indent=1))
    missed = [name for name, aim in aims.items() if errors[name] > aim]
    if options.check and missed:
        print(
            f"the aim is missed: {', '.join(f'{n} {errors[n]:.1%} > {aims[n]:.0%}' for n in missed)}", file=sys.stderr
        )
        sys.exit(1)


def config_of(folder: Path, requests: int, workers: int, batch: int) -> Config:
    """The demo's model on its synthetic log."""
    places = [f"source.path={folder}/log", f"requests={folder}/requests", f"storage={folder}/runs"]
    size = [f"source.requests={requests}", f"ingest.lanes={LANES}", f"ingest.batch_impressions={batch}"]
    run = [f"training.workers={workers}", "training.epochs=2", "tracking.enabled=false", "ingest.reader=thread"]
    return load_config(ROOT / "configs/demo.yaml", [*places, *size, *run])


def timed(config: Config) -> dict[str, float]:
    """A training run: seconds of a step of its second epoch, of its epochs together, and in all."""
    name = f"w{config.training.workers}-b{config.ingest.batch_impressions}"
    result = train(config, name, lambda line: None)
    steps = read_state(result.checkpoint).step / config.training.epochs
    step = result.metrics["epoch/seconds"] / steps
    return {"step_s": step, "steps": steps, "seconds": result.seconds}


def measure(folder: Path, requests: int, costs_file: str | None) -> list[dict[str, Any]]:
    """Measured unit costs, then predictions beside measurements."""
    first = config_of(folder, requests, 1, SMALL)
    with session.connect(first.ray.model_copy(update={"local_cpus": 6}), first.training):
        manifest = prepare(first, "data", lambda line: None)[0]
        assert manifest.version == load_manifest(first.requests).version
        small = timed(first)
        other = config_of(folder, requests, 1, LARGE)
        large = timed(other)
        shapes = [shape_of(config, manifest) for config in (first, other)]
        fixed, slope = fit_costs(
            [(shape.megaflops, run["step_s"]) for shape, run in zip(shapes, (small, large), strict=True)]
        )
        two = config_of(folder, requests, 2, SMALL)
        links = measure_links(two)
        epochs = first.training.epochs
        costs = UnitCosts(
            fixed_s=fixed,
            per_megaflop_s=slope,
            bandwidth=links.all_to_all,
            cores=os.cpu_count() or 1,
            start_s=max(0.0, small["seconds"] - epochs * small["steps"] * small["step_s"]),
        )
        second = timed(two)
        without = predict(shape_of(two, manifest), 2, costs, FREE).step_s
        costs = costs.model_copy(update={"latency_s": max(0.0, second["step_s"] - without)})
        if costs_file:
            Path(costs_file).write_text(json.dumps(costs.model_dump(), indent=1))
        print(f"unit costs: {costs.model_dump()}", flush=True)
        figures = []
        for workers in (1, 2, 3):
            config = config_of(folder, requests, workers, CHECKED)
            expected = predict(shape_of(config, manifest), workers, costs, FREE)
            run = timed(config)
            figures.append(
                {
                    "workers": workers,
                    "predicted_step_s": expected.step_s,
                    "measured_step_s": run["step_s"],
                    "predicted_steps": shape_of(config, manifest).steps,
                    "measured_steps": run["steps"],
                    "predicted_seconds": expected.seconds,
                    "measured_seconds": run["seconds"],
                }
            )
    return figures


def mean_error(figures: list[dict[str, Any]], name: str) -> float:
    """The mean absolute error of what is predicted, relative to what is measured."""
    return float(sum(abs(f[f"predicted_{name}"] / f[f"measured_{name}"] - 1) for f in figures) / len(figures))


def report(figures: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print_table(
        f"Sizing on {os.cpu_count()} cores: batches of {CHECKED} impressions a lane, {LANES} lanes",
        [
            "workers",
            "step predicted",
            "step measured",
            "error",
            "steps pred./meas.",
            "error",
            "run predicted",
            "run measured",
        ],
        [
            [
                str(f["workers"]),
                f"{f['predicted_step_s'] * 1e3:.1f} ms",
                f"{f['measured_step_s'] * 1e3:.1f} ms",
                f"{f['predicted_step_s'] / f['measured_step_s'] - 1:+.0%}",
                f"{f['predicted_steps']} / {f['measured_steps']:g}",
                f"{f['predicted_steps'] / f['measured_steps'] - 1:+.1%}",
                f"{f['predicted_seconds']:.1f} s",
                f"{f['measured_seconds']:.1f} s",
            ]
            for f in figures
        ],
        "run: with start-up, evaluation and checkpoints, which are taken from the first run",
    )


if __name__ == "__main__":
    main()
