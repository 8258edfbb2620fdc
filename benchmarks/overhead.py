"""What tracking and checkpoints cost a training step.

    python benchmarks/overhead.py [--quick] [--check] [--json FILE] [--steps 50] [--rounds 7] [--batch 640]

Blocks of steps of one model are timed in turns, on the clock: plain; with everything that a step logs (its loss each
step, 40 metrics every 10 steps) through the queue into an SQLite store; with a checkpoint begun in every block of 50
steps, copied by the training thread and written by the background thread. A block ends when its last step does, and
the wait for what is still being written is not timed, as training does not wait for it either; the next block is not
begun before. The cost is the median over the rounds of a block's time over the plain block before it, less 1.

Aims: tracking under 1 % of step time, a checkpoint every 50 steps under 5 %.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from model_cases import arguments, finish, random_batch, schema_of, table
from train_step import DIM, make_model, train

from roo_ray.config import Model, Tracking
from roo_ray.training.checkpoint import RunState
from roo_ray.training.saver import Saver, name_of
from roo_ray.training.tracking import RunLogger, open_run

TRACKING, CHECKPOINT = 0.01, 0.05
HISTORY, IMPRESSIONS = 50, 10


def measure(options: Any, folder: Path) -> list[dict[str, Any]]:
    """A row per way."""
    schema = schema_of(HISTORY, DIM)
    model = make_model("hstu", schema, torch.device("cpu"))
    batch = random_batch(schema, options.batch // IMPRESSIONS, IMPRESSIONS, HISTORY, seed=1)
    run = open_run(Tracking(uri=f"sqlite:///{folder}/mlflow.db"), "train", "overhead", nodes=1)
    logger = RunLogger(run)
    saver = Saver(pafs.LocalFileSystem(), str(folder / "run"), 0, 1)
    state = RunState(
        epoch=0, step=0, schema_yaml=schema.to_yaml(), model=Model(), data_version=1, data_digest="", plan={}
    )
    done, written = 0, [0.0, 0]

    def block(each: Callable[[int], None]) -> float:
        nonlocal done
        begin = time.perf_counter()
        for step in range(options.steps):
            train(model, batch)
            done += 1
            each(step)
        return time.perf_counter() - begin

    def log(step: int) -> None:
        logger.metrics({"train/loss": 0.5}, done)
        if step % 10 == 9:
            logger.metrics({f"train/{number}": 0.5 for number in range(40)}, done)

    def save(step: int) -> None:
        if step == 0:
            saver.begin(name_of(0, done), model, state, {})

    times: dict[str, list[float]] = {"tracking": [], "checkpoint": []}
    plain: list[float] = []
    block(log)
    for turn in range(options.rounds):
        ways: list[tuple[str, Callable[[int], None]]] = [("tracking", log), ("checkpoint", save)]
        for name, each in ways if turn % 2 == 0 else ways[::-1]:
            before = block(lambda step: None)
            times[name].append(block(each) / before - 1)
            plain.append(before)
            logger.flush(60)
            if saver.busy:
                one = saver.collect()
                assert one.problem is None, one.problem
                written[0] += one.seconds
                written[1] = sum(path.stat().st_size for path in Path(one.path).iterdir())
    logger.end(True)
    step_ms = 1000 * statistics.median(plain) / options.steps
    return [
        {
            "way": name,
            "step_ms": step_ms,
            "overhead": statistics.median(costs),
            "lowest": min(costs),
            "highest": max(costs),
            "checkpoint_mb": written[1] / 1e6 if name == "checkpoint" else None,
            "write_seconds": written[0] / options.rounds if name == "checkpoint" else None,
        }
        for name, costs in times.items()
    ]


def main() -> None:
    """Runs the ways."""
    parser = arguments("What tracking and checkpoints cost a training step")
    parser.add_argument("--steps", type=int, default=50, help="of a block: a checkpoint every so many steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=640, help="impressions in a batch")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 3
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = measure(options, Path(folder))
        dist.destroy_process_group()
    cells = [
        [r["way"], f"{r['step_ms']:.1f}", f"{r['overhead']:+.2%}", f"{r['lowest']:+.2%} to {r['highest']:+.2%}"]
        + ([f"{r['checkpoint_mb']:.0f}", f"{r['write_seconds']:.2f}"] if r["checkpoint_mb"] else ["", ""])
        for r in rows
    ]
    header = ["with", "plain step ms", "overhead (median)", "lowest to highest", "checkpoint MB", "written in s"]
    print(table(header, cells))
    aims = {"tracking": TRACKING, "checkpoint": CHECKPOINT}
    missed = [
        f"{r['way']}: {r['overhead']:+.2%} of step time, aim under {aims[r['way']]:.0%}"
        for r in rows
        if r["overhead"] >= aims[r["way"]]
    ]
    print(f"blocks of {options.steps} steps, {options.rounds} rounds", file=sys.stderr)
    finish(rows, missed, options)


if __name__ == "__main__":
    main()
