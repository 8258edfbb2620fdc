"""Ray Train's entry point on each rank: what a worker does, from its start to its end."""

from __future__ import annotations

import json
from typing import Any

import ray
import ray.train

from roo_ray.config import Holdout
from roo_ray.errors import Evicted, Stopped, TrainingDiverged
from roo_ray.training import checkpoint
from roo_ray.training.counts import Counts
from roo_ray.training.job import BEFORE_FILE, WorkerJob
from roo_ray.training.saver import remove_leftovers
from roo_ray.training.sharding import describe_plan
from roo_ray.training.system import system_metrics
from roo_ray.training.worker import Worker


def measure_before(worker: Worker) -> None:
    """Evaluates the model that a day's training starts from, on the day and on its held-out requests, and keeps the
    figures beside the run's checkpoints (collective)."""
    assert worker.job.day is not None
    everything = Holdout(by="all", only_days=[worker.job.day])
    figures = {"day": worker.evaluate(everything), "held_out": worker.evaluate()}
    if worker.rank == 0:
        with worker.storage.open_output_stream(f"{worker.folder}/{BEFORE_FILE}") as stream:
            stream.write(json.dumps({side: checkpoint.finite(values) for side, values in figures.items()}).encode())
    for side, values in figures.items():
        worker.logger.metrics({f"before/{side}/{name.removeprefix('eval/')}": v for name, v in values.items()})


def train(worker: Worker, found: ray.train.Checkpoint | None) -> None:
    """Trains the epochs that are left, from a checkpoint of the run where there is one."""
    job = worker.job
    if worker.rank == 0:
        worker.logger.recover()
    if found is not None:
        worker.restore(found)
        within = " (within an epoch)" if worker.position else ""
        worker.say(f"resumed after epoch {worker.epochs_done}, step {worker.steps_done}{within}")
    elif job.checkpoint is not None:
        worker.restore(checkpoint.open_checkpoint(job.checkpoint), weights_only=True)
        worker.say(f"starts from {job.checkpoint}")
    if worker.rank == 0:
        for name in remove_leftovers(worker.storage, worker.folder, worker.steps_done if found else -1):
            worker.say(f"removed {name}, which a run that was killed has left")
    plan = describe_plan(worker.model.plan)
    worker.say(f"{worker.world} workers ready; tables: " + ", ".join(f"{r['table']} {r['sharding']}" for r in plan))
    worker.logger.json(plan, "sharding_plan.json")
    if found is None and job.checkpoint is not None and job.day is not None:
        measure_before(worker)
    epochs = job.config.training.epochs
    stream = worker.stream("train") if worker.epochs_done < epochs else None
    while stream is not None and worker.epochs_done < epochs and not worker.clock.is_over():
        with system_metrics(worker.logger):
            metrics = worker.train_epoch(stream, worker.epochs_done)
        worker.epochs_done += 1
        worker.position = None
        metrics |= worker.evaluate()
        worker.logger.metrics(metrics, worker.steps_done)
        worker.save(metrics, wait=worker.epochs_done == epochs or worker.clock.is_over())
        worker.counts = Counts.since({})


def train_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train's entry point on each rank."""
    job: WorkerJob = loop_config["job"]
    worker = Worker(job)
    try:
        if job.mode == "evaluate":
            assert job.checkpoint is not None
            worker.restore(checkpoint.open_checkpoint(job.checkpoint))
            metrics = worker.evaluate()
            if worker.rank == 0:
                ray.get(job.board.keep.remote(metrics))
            return
        train(worker, ray.train.get_checkpoint())
    except (Evicted, Stopped, TrainingDiverged) as error:
        # all ranks end together: no failure in Ray Train's eyes; the driver knows what to do
        ray.get(job.board.end_with.remote(error))
    finally:
        worker.logger.close()
        if worker.stopping is not None:  # until here the driver is to know that workers run
            worker.stopping.close()
