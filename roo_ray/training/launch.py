"""The driver's side of training and evaluation: check, open the MLflow run, run the TorchTrainer, report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from roo_ray import session
from roo_ray.config import Config, WorkerRange
from roo_ray.errors import ConfigError, Evicted
from roo_ray.ingest.expected import mean_cost
from roo_ray.ingest.holdout import check_sides
from roo_ray.ingest.plan import plan_inputs
from roo_ray.models.check import check_model, evaluated_as
from roo_ray.models.cost import training_megaflops
from roo_ray.models.item_index import tower_of
from roo_ray.redact import redact_text
from roo_ray.requests.lengths import MeanIds, mean_ids, sequence_shares
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.review.record import review_evaluation, review_training
from roo_ray.schema import Schema
from roo_ray.storage import join_path, open_filesystem
from roo_ray.training.causes import cause_of
from roo_ray.training.checkpoint import finite, read_state
from roo_ray.training.entry import train_worker
from roo_ray.training.folder import (
    PLAN_FILE,
    RESULT_FILE,
    folder_size,
    has_begun,
    refuse_another_run,
    refuse_other_weights,
    save_json,
)
from roo_ray.training.job import WorkerJob
from roo_ray.training.lease import at_work
from roo_ray.training.prepare import data_metrics
from roo_ray.training.progress import Say, progress_board
from roo_ray.training.saver import KEEP_SCORE
from roo_ray.training.signals import forward_terminate, watch_workers
from roo_ray.training.snapshot import mend_snapshot
from roo_ray.training.tracking import RunHandle, RunLogger, open_run
from roo_ray.training.waiting import Waiting

CHECKPOINT_ARTIFACT_LIMIT = 2_000_000_000  # bytes; a larger checkpoint is named in the run, not copied into it
GOES_ON = "Submit the same run_name again, and it goes on from the last checkpoint"


@dataclass(frozen=True)
class TrainingResult:
    """``checkpoint``: path or URI of the last one. ``metrics``: of the last epoch, held-out under ``eval/``."""

    run_name: str
    checkpoint: str
    metrics: dict[str, float]
    run: RunHandle
    seconds: float


def check_schema_fits(schema: Schema, manifest: Manifest, data_set: str) -> None:
    """Raises ConfigError where the training schema names a column that the data set was not built with."""
    built = set(manifest.request_schema().columns)
    missing = [column for column in schema.columns if column not in built]
    if missing:
        raise ConfigError(
            f"the schema names columns that {data_set} does not have: {', '.join(missing)}; "
            "build the data set again with this schema, or take the columns out of it"
        )


def mean_requests_per_batch(config: Config, manifest: Manifest, ids: MeanIds) -> float:
    """How many mean requests, with so many ids, fill a lane's batch."""
    schema = config.request_schema
    impressions = max(manifest.impressions / max(manifest.requests, 1), 1.0)
    tokens = manifest.tokens / max(manifest.requests, 1)
    coefficients = training_megaflops(schema, config.model)
    shares = sequence_shares(schema, manifest, ids)
    cost = float(mean_cost(schema, coefficients, np.array(impressions), np.array(tokens), shares))
    ingest = config.ingest
    fits = [ingest.batch_impressions / impressions] if ingest.batch_impressions else []
    fits += [ingest.batch_cost / cost] if ingest.batch_cost else []
    return max(min(fits), 1.0)


def make_job(config: Config, manifest: Manifest, mode: Any, run: RunHandle, board: Any) -> WorkerJob:
    """What the workers get."""
    ids = mean_ids(config.request_schema, manifest, config.requests)
    requests = config.ingest.lanes * mean_requests_per_batch(config, manifest, ids)
    return WorkerJob(
        mode=mode,
        config=config,
        data_version=manifest.version,
        data_digest=manifest.digest(),
        ids=ids,
        requests_per_step=requests,
        impressions_per_step=requests * manifest.impressions / max(manifest.requests, 1),
        run=run,
        board=board,
        plan=order_of_data(config, manifest),
    )


@contextmanager
def readable_failures() -> Iterator[None]:
    """Turns a failure of the worker group into the one error of ours that caused it, where there is one."""
    try:
        yield
    except ray.train.WorkerGroupError as error:  # type: ignore[attr-defined]
        raise cause_of(list(error.worker_failures.values())) or error from None
    except ray.exceptions.RayError as error:
        raise cause_of([error]) or error from None


def elastic(workers: WorkerRange) -> int | tuple[int, int]:
    """The number of workers as Ray Train takes a range."""
    return workers.min if workers.min == workers.max else (workers.min, workers.max)


def checkpoints_to_keep(config: Config) -> CheckpointConfig:
    """Ray Train keeps the last checkpoint in any case; those within an epoch have no NE and go first."""
    training = config.training
    if training.keep_by == "last":
        return CheckpointConfig(num_to_keep=training.keep_checkpoints)
    return CheckpointConfig(
        num_to_keep=training.keep_checkpoints, checkpoint_score_attribute=KEEP_SCORE, checkpoint_score_order="max"
    )


def make_trainer(job: WorkerJob, run_name: str) -> TorchTrainer:
    """The TorchTrainer of a job."""
    training = job.config.training
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if training.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.workers if isinstance(training.workers, int) else elastic(training.workers),
            elastic_resize_monitor_interval_s=getattr(training.workers, "check_seconds", 60.0),
            use_gpu=training.gpu,
            resources_per_worker={"CPU": job.config.ray.cpus_per_worker}
            | ({"GPU": 1} if training.gpu else {})
            | job.config.ray.worker_resources,
            label_selector=job.config.ray.worker_labels or None,
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=job.config.storage,
            failure_config=FailureConfig(max_failures=training.max_failures if job.mode == "train" else 0),
            checkpoint_config=checkpoints_to_keep(job.config),
        ),
    )


def fit(job: WorkerJob, run_name: str) -> ray.train.Result:
    """Runs the job's workers to their end."""
    job.board.expect_workers.remote()
    return make_trainer(job, run_name).fit()


def train(
    config: Config,
    run_name: str,
    say: Say,
    *,
    start_from: str | None = None,
    day: str | None = None,
    parent: RunHandle | None = None,
    register: bool = True,
    patience: float = 0.0,
) -> TrainingResult:
    """Trains on the newest version of the request data set, or goes on with the run of that name.

    ``start_from``: a checkpoint whose weights a new run begins with; ``day``: evaluate it on that day's data before;
    ``parent``: the MLflow run that this one is shown under; ``register``: the model, under ``serving.register_as``;
    ``patience``: seconds for which an MLflow server that is away is waited for, before anything starts.
    Raises BadInput (data, config, cluster) and TrainingDiverged with one message; the MLflow run is then marked
    FAILED. Raises Stopped after SIGTERM, with a last checkpoint where workers ran; the MLflow run is then marked
    KILLED. Raises NoWorkers where none has run for ``ray.wait_for_workers_s``. Raises ConfigError where another job is
    at work on the run.
    """
    config = config.model_copy(update={"run_name": run_name})
    with at_work(join_path(config.storage, run_name), f"run '{run_name}'", say) as sign:
        return _train(config, run_name, say, start_from, day, parent, register, patience, sign)


def _train(
    config: Config,
    run_name: str,
    say: Say,
    start_from: str | None,
    day: str | None,
    parent: RunHandle | None,
    register: bool,
    patience: float,
    sign: str,
) -> TrainingResult:
    begin = time.perf_counter()
    for line in check_model(config.request_schema, config.model, "cuda" if config.training.gpu else "cpu"):
        say(f"warning: {line}")
    manifest = load_manifest(config.requests, config.requests_version)
    check_schema_fits(config.request_schema, manifest, config.requests)
    check_sides(
        config.requests, manifest, config.request_schema, config.holdout, on_bad_shard=config.ingest.on_bad_shard
    )
    plan = order_of_data(config, manifest)
    refuse_another_run(config, run_name, plan)
    mend_snapshot(config, run_name, say)
    begun = has_begun(config, run_name)
    if start_from is not None and not begun:
        refuse_other_weights(config, start_from)
    nodes = session.alive_nodes()
    run = open_run(
        config.tracking, "train", run_name, nodes, reopen=True, begun=begun, parent=parent, patience=patience
    )
    logger = RunLogger(run, say, config.tracking.end_wait_seconds)
    say(
        f"training '{run_name}' on version {manifest.version} of {config.requests}: {manifest.requests:,} requests, "
        f"{manifest.impressions:,} impressions, {workers_of(config)} workers, {config.ingest.lanes} lanes; "
        "starting the workers"
    )
    succeeded = False
    try:
        changed = logger.params(config.model_dump(mode="json", exclude={"request_schema"}), patience)
        if changed:  # a run's parameters cannot change in MLflow: what a resume has changed stands beside them
            words = [f"{name}: {before} -> {now}" for name, (before, now) in sorted(changed.items())]
            logger.tags({"changed_on_resume": "; ".join(words)})
            say(f"resuming with other settings: {'; '.join(words)}")
        data = {"data_set": config.requests, "data_version": manifest.version, "data_digest": manifest.digest()}
        logger.tags(data)
        logger.text(config.request_schema.to_yaml(), "schema.yaml")
        logger.json(manifest.ledger, "ledger.json")
        logger.metrics({f"data/{name}": value for name, value in data_metrics(manifest).items()})
        save_json(config, run_name, PLAN_FILE, plan)
        with progress_board(say) as board, readable_failures():
            job = make_job(config, manifest, "train", run, board)
            job = replace(job, checkpoint=start_from, day=day, sign=sign)
            waiting = Waiting(config.ray, config.training, say, GOES_ON)
            with forward_terminate(board, waiting):
                result = fit(job, run_name)
                while isinstance(ended := ray.get(board.outcome.remote()), Evicted):
                    # no failure: the run may be evicted any number of times
                    say(f"{ended}; starting the workers again")
                    result = fit(job, run_name)
        if ended is not None:
            raise ended
        if result.checkpoint is None or result.metrics is None:
            raise ConfigError(f"run '{run_name}' trained nothing: it has no checkpoint and no epochs left")
        reported = {name: value for name, value in result.metrics.items() if name != KEEP_SCORE}
        # Ray takes the scheme off the path
        path = join_path(config.storage, run_name, os.path.basename(result.checkpoint.path))
        save_json(
            config,
            run_name,
            RESULT_FILE,
            {"checkpoint": redact_text(path), "metrics": finite(reported), "mlflow_run_id": run.run_id},
        )
        if folder_size(path) <= CHECKPOINT_ARTIFACT_LIMIT:
            with result.checkpoint.as_directory() as folder:
                logger.folder(folder, "checkpoint")
        logger.tags({"checkpoint": path})
        logger.flush()  # the review reads what was logged
        review_training(config, manifest, path, run, say, register=register)
        succeeded = True
    finally:
        logger.end(succeeded)
    metrics = {name: math.nan if value is None else value for name, value in reported.items()}
    return TrainingResult(run_name, path, metrics, run, time.perf_counter() - begin)


def workers_of(config: Config) -> str:
    """``2``, or ``1 to 4``."""
    workers = config.training.workers
    return str(workers) if isinstance(workers, int) else f"{workers.min} to {workers.max}"


def order_of_data(config: Config, manifest: Manifest) -> dict[str, Any]:
    """All that decides in which order a run's data comes."""
    schema, seed, ingest = config.request_schema, config.training.seed, config.ingest
    cost = training_megaflops(schema, config.model)
    return plan_inputs(manifest, schema, ingest, config.holdout, "train", seed, ingest.mode, cost)


def evaluate(
    config: Config, checkpoint: str, run_name: str, say: Say, patience: float = 0.0, items: str | None = None
) -> TrainingResult:
    """Scores a checkpoint on the held-out side of the data set, with the model and schema in the checkpoint; how its
    tables were placed and updated in training does not matter. ``patience``: as in ``train``. ``items``: the exported
    index (a path or URI that all nodes see) that a retrieval checkpoint's recall is measured in; by default it is in
    the items of the held-out side. Raises BadInput, TrainingDiverged and NoWorkers as ``train`` does."""
    begin = time.perf_counter()
    manifest = load_manifest(config.requests, config.requests_version)
    state = read_state(checkpoint)
    if items is not None:
        if state.model.kind != "retrieval" or state.model.towers is not None:
            kind = state.model.towers or state.model.kind
            raise ConfigError(f"{checkpoint} is a model of kind '{kind}': retrieval alone looks for items (--items)")
        tower_of(items)  # no worker need start for a file that cannot be read
    model = evaluated_as(state.model, "cuda" if config.training.gpu else "cpu")
    config = config.model_copy(update={"model": model, "request_schema": state.request_schema()})
    check_model(config.request_schema, model, "cuda" if config.training.gpu else "cpu")
    check_schema_fits(config.request_schema, manifest, config.requests)
    if has_begun(config, run_name):  # its folder is removed at the end
        raise ConfigError(f"run '{run_name}' is a training: an evaluation needs a run_name of its own")
    run = open_run(config.tracking, "evaluate", run_name, session.alive_nodes(), patience=patience)
    logger = RunLogger(run)
    say(f"evaluating {checkpoint}; starting the workers")
    succeeded = False
    try:
        logger.params(config.model_dump(mode="json", exclude={"request_schema"}), patience)
        data = {"data_set": config.requests, "data_version": manifest.version, "data_digest": manifest.digest()}
        logger.tags({"checkpoint": checkpoint} | data | ({"items": items} if items else {}))
        logger.text(config.request_schema.to_yaml(), "schema.yaml")
        with progress_board(say) as board, readable_failures():
            job = make_job(config, manifest, "evaluate", run, board)
            with watch_workers(board, Waiting(config.ray, config.training, say, "Run the evaluation again")):
                fit(replace(job, checkpoint=checkpoint, items=items), run_name)
            if (ended := ray.get(board.outcome.remote())) is not None:
                raise ended
            metrics = ray.get(board.kept.remote())
        logger.metrics(metrics)
        review_evaluation(config, manifest, run, say)
        succeeded = True
    finally:
        logger.end(succeeded)
        filesystem, base = open_filesystem(config.storage)  # Ray's notes on the run; it has no checkpoint
        if filesystem.get_file_info(f"{base}/{run_name}").type == pafs.FileType.Directory:
            filesystem.delete_dir(f"{base}/{run_name}")
    return TrainingResult(run_name, checkpoint, metrics, run, time.perf_counter() - begin)
