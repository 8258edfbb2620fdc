"""How many workers a run wants: python jobs/size_cluster.py --config configs/X.yaml --costs FILE --prices FILE
[--workers 1,2,4,8] [--deadline 6h] [key=value ...]

Needs the data set's manifest alone: no cluster. ``--costs``: measured unit costs (benchmarks/sizing.py --costs
writes them), ``--prices``: what nodes cost, YAML or JSON both; docs/cluster.md says how. Exits with 2 where no number
of workers fits into memory and the deadline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roo_ray.errors import ConfigError
from roo_ray.terminal import human_bytes, job_parser, print_table, read_config, run_job

if TYPE_CHECKING:
    from roo_ray.cluster.sizing import Prediction, UnitCosts


def how_good(costs: UnitCosts) -> str:
    """What is known of the error of a prediction by these costs."""
    if costs.step_error is None or costs.largest_step_error is None:
        error = "how well these costs predict was not measured (benchmarks/sizing.py --costs does)"
    else:
        error = (
            f"where the costs were measured, step times were {costs.step_error:.0%} off in the mean and "
            f"{costs.largest_step_error:.0%} at most; time and cost are as uncertain"
        )
    counted = "" if costs.activation_bytes_per_megaflop else "; memory without activations, which were not measured"
    return f"{error}{counted}"


def remark(prediction: Prediction, best: bool) -> str:
    """Of a row of the table."""
    if not prediction.fits and prediction.host_memory:
        return f"{human_bytes(prediction.host_memory)} of tables for the host: too much, or worker_host_memory unknown"
    if not prediction.fits:
        return "too little memory"
    slower = f"{human_bytes(prediction.host_memory)} of tables in host memory: slower than this"
    return ", ".join(["cheapest"] * best + [slower] * bool(prediction.host_memory))


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--costs", required=True, metavar="FILE", help="measured unit costs")
    parser.add_argument("--prices", required=True, metavar="FILE", help="prices by the hour")
    parser.add_argument("--workers", default="1,2,4,8,16,32", help="numbers of workers (default: %(default)s)")
    parser.add_argument("--deadline", metavar="TIME", help="such as 90m or 6h")
    options = parser.parse_args()
    config = read_config(options)

    from roo_ray.cluster.price_files import read_costs, read_prices
    from roo_ray.cluster.sizing import cheapest, predict, shape_of
    from roo_ray.requests.manifest import load_manifest
    from roo_ray.source_config import parse_duration

    try:
        deadline = parse_duration(options.deadline)
        counts = sorted({int(text) for text in options.workers.split(",")})
    except ValueError as error:
        raise ConfigError(f"--deadline or --workers: {error}") from None
    counts = [count for count in counts if 0 < count <= config.ingest.lanes]
    if not counts:
        raise ConfigError(f"--workers {options.workers}: none from 1 to ingest.lanes {config.ingest.lanes}")
    costs, prices = read_costs(options.costs), read_prices(options.prices)
    shape = shape_of(config, load_manifest(config.requests, config.requests_version))
    if costs.gpu != config.training.gpu:
        kinds = ("on GPUs", "without") if costs.gpu else ("without GPUs", "on some")
        raise ConfigError(f"{options.costs} was measured {kinds[0]}, and training.gpu says that the run is {kinds[1]}")
    predictions = [predict(shape, count, costs, prices) for count in counts]
    best = cheapest(predictions, deadline)
    print_table(
        f"'{config.name}': {shape.epochs} epochs of {shape.steps:,} steps, {shape.requests:,.0f} requests each",
        [
            *("workers", "nodes", "step", "memory each", "data CPUs", "data nodes", "per trainer", "all-to-all each"),
            *("checkpoints", "time", "cost", ""),
        ],
        [
            [
                str(p.workers),
                str(p.trainer_nodes),
                f"{p.step_s * 1e3:.1f} ms",
                human_bytes(p.memory),
                str(p.data_cpus),
                str(p.data_nodes),
                f"{p.data_cpus / prices.data_node_cpus / p.workers:.2f}",
                human_bytes(p.exchange_bytes),
                f"{p.checkpoints} x {human_bytes(p.checkpoint_bytes)}",
                f"{p.seconds / 3600:.2f} h",
                f"{p.cost:.2f}",
                remark(p, p is best),
            ]
            for p in predictions
        ],
        how_good(costs),
    )
    if best is None:
        raise ConfigError("no number of workers fits into memory and the deadline; allow more workers or more time")


if __name__ == "__main__":
    run_job(main)
