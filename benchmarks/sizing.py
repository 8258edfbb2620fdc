"""How well sizing predicts: step times, numbers of steps and whole runs at 1, 2 and 3 workers, predicted and measured.

python benchmarks/sizing.py [--quick] [--json FILE] [--check] [--costs FILE]
python benchmarks/sizing.py --config configs/X.yaml [--workers 1,2,3] [--seconds 60] --costs FILE [key=value ...]

The first measures the demo's model on a log made for it. The second measures a config's own model, on its data set and
the cluster at RAY_ADDRESS, on GPUs where ``training.gpu`` says so: what ``jobs/size_cluster.py`` wants before a long
run; each of its runs trains for so many seconds.

Unit costs are measured first: the steps of 1 worker at two batch sizes (a fixed part and a cost of work), of 2 workers
at both (a latency and the bytes of the exchange), the bandwidth of the collectives, of the copy of a checkpoint and of
the storage, what a CPU reads, and what a step holds until backward. Then runs at a third batch size, which nothing was
fitted to, are predicted and measured. ``--costs`` writes the unit costs and the error of the step times. ``--check``
exits with 1 where the mean error of the step times is above 25 %, or that of the numbers of steps above 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from roo_ray import session  # before ray
from roo_ray.cluster.links import measure_links
from roo_ray.cluster.sizing import (
    Prices,
    Shape,
    UnitCosts,
    fit_costs,
    fit_exchange,
    predict,
    sent_bytes,
    shape_of,
)
from roo_ray.cluster.unit_costs import copy_bandwidth, held_per_megaflop, read_rate, storage_bandwidth
from roo_ray.config import Config, load_config
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.storage import join_path, open_filesystem
from roo_ray.terminal import print_table
from roo_ray.training.checkpoint import read_state
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare

ROOT = Path(__file__).parents[1]
AIM, STEPS_AIM = 0.25, 0.05
SMALL, LARGE = 0.5, 2.0  # batches of the runs that costs are fitted to, of those that are checked
BATCH = 512  # impressions of a lane's batch, of the demo
LANES = 6  # a multiple of 1, 2 and 3
FREE = Prices(trainer_hour=0, data_cpu_hour=0)


@dataclass(frozen=True)
class Subject:
    """What is measured. ``whole``: runs of two epochs, whose number of steps can be checked; otherwise such of
    ``seconds``."""

    config: Config
    workers: list[int]
    whole: bool
    seconds: float

    def at(self, workers: int, scale: float = 1.0) -> Config:
        """The run of so many workers, with batches of another size."""
        ingest, training = self.config.ingest, self.config.training
        budgets = {
            "batch_impressions": ingest.batch_impressions and max(1, round(ingest.batch_impressions * scale)),
            "batch_cost": ingest.batch_cost and ingest.batch_cost * scale,
        }
        length = {"epochs": 2} if self.whole else {"epochs": 1, "max_seconds": self.seconds}
        quiet = {"checkpoint_every_steps": None, "checkpoint_every_minutes": None, "workers": workers}
        return self.config.model_copy(
            update={
                "ingest": ingest.model_copy(update=budgets),
                "training": training.model_copy(update=length | quiet),
                "tracking": self.config.tracking.model_copy(update={"enabled": False}),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the data")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the aim is missed")
    parser.add_argument("--costs", metavar="FILE", help="write the measured unit costs to a path or URI")
    parser.add_argument("--config", metavar="FILE", help="measure this config's model, on its data set")
    parser.add_argument("--workers", default="1,2,3", help="of the runs that are checked (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run's training, with --config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options = parser.parse_args()
    workers = [int(text) for text in options.workers.split(",")]
    if options.config:
        config = load_config(options.config, options.overrides)
        if config.ray.address:
            os.environ["RAY_ADDRESS"] = config.ray.address
        folder = join_path(config.storage, f"sizing-{time.strftime('%Y%m%d-%H%M%S')}")
        subject = Subject(config.model_copy(update={"storage": folder}), workers, False, options.seconds)
    else:
        folder = tempfile.mkdtemp(prefix="roo_ray_sizing_")
        subject = Subject(demo(folder, 3000 if options.quick else 9000), workers, True, 0)
    try:
        costs, figures = measure(subject)
    finally:
        if options.config:
            filesystem, inner = open_filesystem(folder)
            if filesystem.get_file_info(inner).type == pafs.FileType.Directory:
                filesystem.delete_dir(inner)
        else:
            shutil.rmtree(folder)
    names = ("step_s", "steps", "seconds") if subject.whole else ("step_s",)
    errors = {name: mean_error(figures, name) for name in names}
    largest = max(abs(f["predicted_step_s"] / f["measured_step_s"] - 1) for f in figures)
    costs = costs.model_copy(update={"step_error": errors["step_s"], "largest_step_error": largest})
    report(figures, subject)
    print("mean errors: " + ", ".join(f"{name} {error:.1%}" for name, error in errors.items()))
    print(f"largest error of a step time: {largest:.1%}")
    if options.costs:
        filesystem, inner = open_filesystem(options.costs)
        with filesystem.open_output_stream(inner) as stream:
            stream.write(json.dumps(costs.model_dump(), indent=1).encode())
    aims = {name: aim for name, aim in (("step_s", AIM), ("steps", STEPS_AIM)) if name in errors}
    if options.json:
        content = {"figures": figures, "mean_errors": errors, "aims": aims, "costs": costs.model_dump()}
        Path(options.json).write_text(json.dumps(content, indent=1))
    missed = [name for name, aim in aims.items() if errors[name] > aim]
    if options.check and missed:
        print(
            f"the aim is missed: {', '.join(f'{n} {errors[n]:.1%} > {aims[n]:.0%}' for n in missed)}", file=sys.stderr
        )
        sys.exit(1)


def demo(folder: str, requests: int) -> Config:
    """The demo's model on its synthetic log."""
    places = [f"source.path={folder}/log", f"requests={folder}/requests", f"storage={folder}/runs"]
    size = [f"source.requests={requests}", f"ingest.lanes={LANES}", f"ingest.batch_impressions={BATCH}"]
    run = ["tracking.enabled=false", "ingest.reader=thread", "ray.local_cpus=6"]
    return load_config(ROOT / "configs/demo.yaml", [*places, *size, *run])


def timed(config: Config, name: str) -> dict[str, float]:
    """A training run: seconds of a step of its last epoch, of its epochs together, and in all."""
    result = train(config, name, lambda line: None)
    state = read_state(result.checkpoint)
    steps = state.step / config.training.epochs
    step = result.metrics["epoch/seconds"] / steps
    print(f"{name}: {step * 1e3:.1f} ms a step", flush=True)
    return {"step_s": step, "steps": steps, "seconds": result.seconds}


def measure(subject: Subject) -> tuple[UnitCosts, list[dict[str, Any]]]:
    """Measured unit costs, then predictions beside measurements."""
    most = subject.at(max(subject.workers))
    with session.connect(most.ray, most.training):
        manifest = prepare(most, "data", lambda line: None)[0] if subject.whole else load_manifest(most.requests)
        costs = unit_costs(subject, manifest)
        print(f"unit costs: {costs.model_dump()}", flush=True)
        figures = []
        for workers in subject.workers:
            config = subject.at(workers)
            shape = shape_of(config, manifest)
            expected, run = predict(shape, workers, costs, FREE), timed(config, f"{workers}-workers")
            figures.append(
                {
                    "workers": workers,
                    "predicted_step_s": expected.step_s,
                    "measured_step_s": run["step_s"],
                    "predicted_steps": shape.steps,
                    "measured_steps": run["steps"],
                    "predicted_seconds": expected.seconds,
                    "measured_seconds": run["seconds"],
                }
            )
    return costs, figures


def unit_costs(subject: Subject, manifest: Manifest) -> UnitCosts:
    """From runs of 1 and 2 workers at two batch sizes, and measurements of the machines."""
    config = subject.at(1, SMALL)
    gpu = config.training.gpu
    shapes: dict[tuple[int, float], Shape] = {}
    runs: dict[tuple[int, float], dict[str, float]] = {}
    for workers in (1, 2):
        for scale in (SMALL, LARGE):
            run = subject.at(workers, scale)
            shapes[workers, scale] = shape_of(run, manifest)
            runs[workers, scale] = timed(run, f"{workers}-workers-{scale:g}")
    one = [(shapes[1, scale].megaflops, runs[1, scale]["step_s"]) for scale in (SMALL, LARGE)]
    fixed, slope = fit_costs(one)
    first = runs[1, SMALL]
    trained = first["steps"] * config.training.epochs * first["step_s"]
    shares_cores = not gpu and session.alive_nodes() == 1
    costs = UnitCosts(
        fixed_s=fixed,
        per_megaflop_s=slope,
        cores=(os.cpu_count() or 1) if shares_cores else 0,
        start_s=max(0.0, first["seconds"] - trained),
        read_requests_per_s=read_rate(config, manifest),
        copy_bandwidth=copy_bandwidth(config),
        checkpoint_bandwidth=storage_bandwidth(config),
        activation_bytes_per_megaflop=held_per_megaflop(config, manifest),
        gpu=gpu,
    )
    alone = costs.model_copy(update={"latency_s": 0.0, "bandwidth": 1e15})
    beyond = []
    for scale in (SMALL, LARGE):
        shape = shapes[2, scale]
        own = predict(shape, 2, alone, FREE).step_s
        beyond.append((sent_bytes(shape, 2), max(0.0, runs[2, scale]["step_s"] - own)))
    latency, bandwidth = fit_exchange(beyond, measure_links(subject.at(2)).all_to_all)
    return costs.model_copy(update={"latency_s": latency, "bandwidth": bandwidth})


def mean_error(figures: list[dict[str, Any]], name: str) -> float:
    """The mean absolute error of what is predicted, relative to what is measured."""
    return float(sum(abs(f[f"predicted_{name}"] / f[f"measured_{name}"] - 1) for f in figures) / len(figures))


def report(figures: list[dict[str, Any]], subject: Subject) -> None:
    """Prints the table."""
    where = "GPUs" if subject.config.training.gpu else f"{os.cpu_count()} cores"
    header = ["workers", "step predicted", "step measured", "error"]
    header += ["steps pred./meas.", "error", "run predicted", "run measured"] if subject.whole else []
    rows = []
    for f in figures:
        row = [str(f["workers"]), f"{f['predicted_step_s'] * 1e3:.1f} ms", f"{f['measured_step_s'] * 1e3:.1f} ms"]
        row += [f"{f['predicted_step_s'] / f['measured_step_s'] - 1:+.0%}"]
        if subject.whole:
            row += [f"{f['predicted_steps']} / {f['measured_steps']:g}"]
            row += [f"{f['predicted_steps'] / f['measured_steps'] - 1:+.1%}"]
            row += [f"{f['predicted_seconds']:.1f} s", f"{f['measured_seconds']:.1f} s"]
        rows.append(row)
    note = "run: with start-up, evaluation and checkpoints, which are taken from the first run" if subject.whole else ""
    print_table(f"Sizing on {where}: '{subject.config.name}', {subject.config.ingest.lanes} lanes", header, rows, note)


if __name__ == "__main__":
    main()
