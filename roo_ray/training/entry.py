"""Ray Train's entry point on each rank: what a worker does, from its start to its end."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from typing import Any

import ray
import ray.train

from roo_ray.config import Holdout
from roo_ray.errors import BadInput, Evicted, Stopped, TrainingDiverged
from roo_ray.models.embeddings import lookup_features
from roo_ray.training import checkpoint
from roo_ray.training.causes import cause_of
from roo_ray.training.counts import Counts
from roo_ray.training.job import BEFORE_FILE, WorkerJob
from roo_ray.training.saver import remove_leftovers
from roo_ray.training.sharding import describe_plan
from roo_ray.training.signals import StopWatch
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
    if (found is not None or job.checkpoint is not None) and (odd := worker.saver.overlook(worker.model)) is not None:
        worker.say(f"warning: what it starts from has values that are not finite: {odd}")
    if worker.rank == 0:
        for name in remove_leftovers(worker.storage, worker.folder, worker.steps_done if found else -1):
            worker.say(f"removed {name}, which a run that was killed has left")
    read_by = lookup_features(worker.schema)
    plan = [
        row | {"ids_per_request": {name: job.ids.per_request[name] for name in read_by[str(row["table"])]}}
        for row in describe_plan(worker.model.plan)
    ]
    tables = [f"{row['table']} {row['sharding']}{' pooled' if row['pooled'] else ''}" for row in plan]
    worker.say(f"{worker.world} workers ready; tables: {', '.join(tables)}")
    worker.say(f"placed for {job.requests_per_step:,.0f} requests a step over all workers; {job.ids.describe()}")
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
    if ray.get(job.board.is_final.remote()):
        return  # Ray Train starts the workers again after any failure; this one would come again
    try:
        run_worker(job)
    except Exception as error:
        found = cause_of([error])
        if isinstance(found, BadInput):  # of one rank, perhaps: the others end as it fails
            ray.get(job.board.end_with.remote(found))
        raise


def run_worker(job: WorkerJob) -> None:
    """A worker's life. As long as it lasts, from before the model is built, the driver is to know that workers run."""
    first = ray.train.get_context().get_world_rank() == 0
    with StopWatch(job.board) if first else nullcontext(threading.Event()) as stop:
        worker = Worker(job, stop)
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
