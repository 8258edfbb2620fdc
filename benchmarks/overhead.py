"""What tracking and checkpoints cost a training step.

    python benchmarks/overhead.py [--quick] [--check] [--json FILE] [--seconds 400] [--batch 640] [--uri URI]

One process group, one model, one process; two independent answers to the same question.

Accounts. What a step pays for tracking is known part by part: the time the training thread spends in calls (putting
entries into the queue, beginning and collecting a checkpoint), measured around each call, and the CPU time of all other
threads (the sender, MLflow's system metrics, the checkpoint's writer), which is taken as if there were no other core
for it and the training thread stood still meanwhile. Both as shares of the time, or CPU time, of plain steps; their sum
is an upper bound on a machine with fewer cores than it needs, and resolves hundredths of a percent whatever else the
machine does. The other threads' CPU time of plain steps is subtracted. A stretch of tracking is longer than what it
gathers for (5 s, 15 s with SQLite), so that sending is in it; what is still being written at the end of a stretch is
counted until it is written. By default MLflow's store is SQLite in this process, as on a laptop; with a server at
``--uri``, as on a cluster, its work is not the trainer's.

Pairs. Stretches with and without take turns (off, on, on, off), as long as the time lasts, each timed by the clock and
by the training thread's CPU; the medians of the pairs' differences with 95 % intervals (bootstrap over pairs). What the
accounts leave out (caches, the interpreter's lock) would show here; an interval wider than the aim says that this
machine was too busy to tell.

Aims: tracking under 1 % of step time, a checkpoint every 50 steps under 5 %. Met where the accounts, the upper bound,
are below the aim, or the whole interval of the pairs by the clock is (there are cores to spare then); missed in any
case where that whole interval is above. A checkpoint has all that a worker's has: the metrics of all training, the
random number generators, and the position, agreed on by the ranks. Ray Train's taking note of it needs a run of several
processes: give the median that a run has logged (``checkpoint/report_ms``) as ``--report-ms``, to have it counted.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from model_cases import arguments, finish, random_batch, schema_of, table
from train_step import DIM, make_model, train

from roo_ray.config import Model, Tracking
from roo_ray.training.checkpoint import RunState
from roo_ray.training.outbox import gather_seconds
from roo_ray.training.quality import Quality
from roo_ray.training.saver import Saver, name_of
from roo_ray.training.system import system_metrics
from roo_ray.training.tracking import RunHandle, RunLogger, open_run

AIMS = {"tracking": 0.01, "checkpoint": 0.05}
HISTORY, IMPRESSIONS = 50, 10
LANES = 8
EVERY = 50  # steps from one checkpoint to the next
LINE, LINE_METRICS = 10, 40  # steps from one line of the log to the next, and the metrics that it has


@dataclass
class Stretch:
    """Steps in a row. ``wall``, ``cpu``: of the training thread, in steps; ``calls``, ``calls_cpu``: of it, in what is
    being measured; ``others``: CPU seconds of all other threads, until what was begun has ended, which took ``until``
    seconds."""

    steps: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    calls: float = 0.0
    calls_cpu: float = 0.0
    others: float = 0.0
    until: float = 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Times a call of the training thread."""
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        self.calls += time.perf_counter() - wall
        self.calls_cpu += time.thread_time() - cpu


@dataclass
class Way:
    """``each``: what is done after a step (its number in the stretch); ``end``: waits for what was begun."""

    each: Callable[[Stretch, int], None]
    end: Callable[[Stretch], None]
    on: list[Stretch] = field(default_factory=list)
    off: list[Stretch] = field(default_factory=list)


class Bench:
    """A model that takes steps, and the two ways of disturbing it."""

    def __init__(self, options: Any, folder: Path, run: RunHandle) -> None:
        schema = schema_of(HISTORY, DIM)
        self.model = make_model("hstu", schema, torch.device("cpu"))
        self.batch = random_batch(schema, options.batch // IMPRESSIONS, IMPRESSIONS, HISTORY, seed=1)
        self.logger = RunLogger(run)
        self.saver = Saver(pafs.LocalFileSystem(), str(folder / "run"), 0, 1, self.logger.keep)
        self.state = RunState(
            epoch=0, step=0, schema_yaml=schema.to_yaml(), model=Model(), data_version=1, data_digest="", plan={}
        )
        self.quality = Quality([label.name for label in schema.labels], LINE)
        self.done, self.bytes, self.write_seconds = 0, 0, list[float]()
        self.ways = {
            "tracking": Way(self.log, lambda stretch: None),
            "checkpoint": Way(self.save, self.collect),
        }

    def log(self, stretch: Stretch, step: int) -> None:
        """What a worker logs: a line's metrics and losses every so many steps."""
        if step % LINE == LINE - 1:
            with stretch.call():
                for past in range(LINE):
                    self.logger.metrics({"train/loss": 0.5}, self.done - LINE + 1 + past)
                self.logger.metrics({f"train/{number}": 0.5 for number in range(LINE_METRICS)}, self.done)

    def save(self, stretch: Stretch, step: int) -> None:
        """Begins a checkpoint at a stretch's first step, and collects it once it is written."""
        if step == 0:
            with stretch.call():
                lanes = torch.zeros((LANES, 2), dtype=torch.int64)
                dist.all_reduce(lanes)  # the position, and what was trained on
                dist.all_reduce(lanes[0])
                run = self.quality.tensors() | {"rng_0": torch.get_rng_state()}
                self.saver.begin(name_of(0, self.done), self.model, self.state, {}, run)
        elif self.saver.written:
            self.collect(stretch)

    def collect(self, stretch: Stretch) -> None:
        """Takes note of a checkpoint that is written, or waits for it."""
        if not self.saver.busy:
            return
        late = not self.saver.written  # training would have gone on meanwhile
        with Stretch().call() if late else stretch.call():
            one = self.saver.collect()
        assert one.problem is None, one.problem
        self.write_seconds.append(one.seconds)
        self.bytes = sum(path.stat().st_size for path in Path(one.path).iterdir())
        for path in Path(one.path).iterdir():
            path.unlink()

    def stretch(self, way: Way | None, over: Callable[[Stretch], bool]) -> Stretch:
        """Steps until it is ``over``."""
        one = Stretch()
        begin, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
        while not over(one):
            train(self.model, self.batch)
            self.done += 1
            if way is not None:
                way.each(one, one.steps)
            one.steps += 1
            one.wall, one.cpu = time.perf_counter() - begin, time.thread_time() - thread
        if way is not None:
            way.end(one)
        one.until = time.perf_counter() - begin
        one.others = (time.process_time() - process) - (time.thread_time() - thread)
        return one

    def pairs(self, name: str, seconds: float, over: Callable[[Stretch], bool]) -> None:
        """Stretches off, on, on, off and so on, for so long, at least one of each."""
        way, begin, turn = self.ways[name], time.perf_counter(), 0
        while not way.on or time.perf_counter() - begin < seconds:
            for on in (False, True) if turn % 2 == 0 else (True, False):
                (way.on if on else way.off).append(self.stretch(way if on else None, over))
                self.logger.flush(60)
            turn += 1


def accounts(on: list[Stretch], off: list[Stretch]) -> dict[str, float]:
    """Shares of step time: of calls of the training thread, of other threads' CPU time, and both."""

    def total(stretches: list[Stretch], name: str) -> float:
        return float(sum(getattr(one, name) for one in stretches))

    steps = total(on, "steps")
    plain_wall, plain_cpu = (total(off, name) / total(off, "steps") * steps for name in ("wall", "cpu"))
    idle = total(off, "others") / total(off, "until") * total(on, "until")
    calls = total(on, "calls") / plain_wall
    others = max(total(on, "others") - idle, 0.0) / plain_cpu
    return {"calls": calls, "other_threads": others, "overhead": calls + others}


def paired(on: list[Stretch], off: list[Stretch], name: str, draws: int = 2000) -> tuple[float, float, float]:
    """(median of the pairs' differences as a share, and the 95 % interval of that) of ``name`` per step."""
    if len(on) == 1:  # of --quick: no interval
        share = getattr(on[0], name) / on[0].steps / (getattr(off[0], name) / off[0].steps) - 1
        return share, -math.inf, math.inf
    one, other = (np.array([getattr(s, name) / s.steps for s in stretches]) for stretches in (on, off))
    shares = one / other - 1
    chosen = np.random.default_rng(0).integers(len(shares), size=(draws, len(shares)))
    low, high = np.percentile(np.median(shares[chosen], axis=1), [2.5, 97.5])
    return float(np.median(shares)), float(low), float(high)


def measure(options: Any, folder: Path) -> list[dict[str, Any]]:
    """A row per way."""
    run = open_run(Tracking(uri=options.uri or f"sqlite:///{folder}/mlflow.db"), "train", "overhead", nodes=1)
    bench = Bench(options, folder, run)
    warm = bench.stretch(bench.ways["tracking"], lambda one: one.steps >= 2 * LINE)  # imports MLflow, too
    bench.logger.flush(60)
    bench.stretch(bench.ways["checkpoint"], lambda one: one.steps >= LINE)

    # tracking with MLflow's system metrics, which sample on their own: one long stretch; then with and without in turns
    share, gather = options.seconds, gather_seconds(str(run.uri))
    with system_metrics(bench.logger):
        long = bench.stretch(bench.ways["tracking"], lambda one: one.wall >= max(0.3 * share, 2.2 * gather))
    bench.logger.flush(60)
    bench.pairs("tracking", 0.35 * share, lambda one: one.wall >= gather + 0.2)
    bench.pairs("checkpoint", 0.35 * share, lambda one: one.steps >= EVERY)
    bench.logger.end(True)

    rows = []
    for name, way in bench.ways.items():
        plain = [s for other in bench.ways.values() for s in other.off]
        row = {"way": name, "step_ms": 1000 * sum(s.wall for s in plain) / sum(s.steps for s in plain)}
        row |= accounts([long] if name == "tracking" else way.on, plain)
        for clock in ("wall", "cpu"):
            row |= dict(zip((f"{clock}", f"{clock}_low", f"{clock}_high"), paired(way.on, way.off, clock), strict=True))
        row |= {"pairs": len(way.on), "steps": sum(s.steps for s in way.on)}
        if name == "checkpoint":
            row |= {"checkpoint_mb": bench.bytes / 1e6, "write_seconds": float(np.median(bench.write_seconds))}
            row["copy_ms"] = 1000 * sum(s.calls for s in way.on) / len(way.on)
            row["report_ms"] = options.report_ms
            row["overhead"] += options.report_ms / (EVERY * row["step_ms"])
        rows.append(row)
    print(f"warm-up of {warm.steps} steps, a stretch of {long.wall:.0f} s with system metrics", file=sys.stderr)
    return rows


def judged(rows: list[dict[str, Any]]) -> list[str]:
    """The aims that are missed."""
    missed = []
    for row in rows:
        aim = AIMS[row["way"]]
        if row["overhead"] >= aim and row["wall_high"] >= aim:
            missed.append(f"{row['way']}: {row['overhead']:.2%} of step time, aim under {aim:.0%}")
        elif row["wall_low"] >= aim:
            missed.append(f"{row['way']}: {row['wall']:.2%} by the clock, surely above the aim of {aim:.0%}")
        if row["wall_high"] - row["wall_low"] > 2 * aim:
            print(f"{row['way']}: the machine was too busy for the pairs to tell {aim:.0%}", file=sys.stderr)
    return missed


def main() -> None:
    """Runs both ways."""
    parser = arguments("What tracking and checkpoints cost a training step")
    parser.add_argument("--seconds", type=float, default=400, help="of measuring, in all")
    parser.add_argument("--report-ms", type=float, default=0.0, help="median checkpoint/report_ms of a run")
    parser.add_argument("--batch", type=int, default=640, help="impressions in a batch")
    parser.add_argument("--uri", help="a tracking server's; else SQLite, whose work is done in this process")
    options = parser.parse_args()
    if options.quick:
        options.seconds = min(options.seconds, 36)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = measure(options, Path(folder))
        dist.destroy_process_group()

    def interval(row: dict[str, Any], clock: str) -> str:
        return f"{row[clock]:+.2%} ({row[f'{clock}_low']:+.2%} to {row[f'{clock}_high']:+.2%})"

    cells = [
        [r["way"], f"{r['step_ms']:.1f}", f"{r['calls']:.2%}", f"{r['other_threads']:.2%}", f"**{r['overhead']:.2%}**"]
        + [f"{r['pairs']} x {r['steps'] // r['pairs']}", interval(r, "wall"), interval(r, "cpu")]
        + ([f"{r['checkpoint_mb']:.0f}", f"{r['write_seconds']:.2f}"] if "checkpoint_mb" in r else ["", ""])
        for r in rows
    ]
    header = [
        "with",
        "plain step ms",
        "calls",
        "other threads' CPU",
        "overhead",
        "pairs x steps",
        "pairs, clock (95 %)",
    ]
    if not options.report_ms:
        print("the checkpoint's account leaves out Ray Train's report: see --report-ms", file=sys.stderr)
    print(table([*header, "pairs, training thread's CPU (95 %)", "checkpoint MB", "written in s"], cells))
    finish(rows, judged(rows), options)


if __name__ == "__main__":
    main()
