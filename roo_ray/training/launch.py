"""The driver's side of training and evaluation: check, open the MLflow run, run the TorchTrainer, report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from roo_ray import session
from roo_ray.config import Config, WorkerRange
from roo_ray.errors import ConfigError, Evicted, RooError
from roo_ray.ingest.holdout import check_sides
from roo_ray.ingest.plan import plan_inputs
from roo_ray.models.check import check_model
from roo_ray.models.cost import training_megaflops
from roo_ray.redact import redact_text
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.review.record import review_evaluation, review_training
from roo_ray.schema import Schema
from roo_ray.storage import join_path, open_filesystem
from roo_ray.training.checkpoint import finite, open_checkpoint, read_state
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
from roo_ray.training.signals import forward_terminate
from roo_ray.training.tracking import RunHandle, RunLogger, open_run

CHECKPOINT_ARTIFACT_LIMIT = 2_000_000_000  # bytes; a larger checkpoint is named in the run, not copied into it


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


def mean_ids_per_request(schema: Schema, manifest: Manifest) -> dict[str, float]:
    """Mean ids per request of each lookup feature, from the manifest, for the planner's cost model."""
    requests = max(manifest.requests, 1)
    impressions = manifest.impressions / requests
    tokens = manifest.tokens / requests / max(len(schema.sequences), 1)
    means: dict[str, float] = {}
    for feature in schema.features:
        if feature.kind == "sequence":
            for column in feature.sequence_ids:
                means[f"{feature.name}.{column.column}"] = min(tokens, feature.max_length or tokens)
        elif feature.kind == "ids":
            means[feature.name] = impressions if feature.level == "impression" else 1.0
    return means


def mean_requests_per_batch(config: Config, manifest: Manifest) -> float:
    """How many mean requests fill a lane's batch."""
    impressions = max(manifest.impressions / max(manifest.requests, 1), 1.0)
    tokens = manifest.tokens / max(manifest.requests, 1)
    one, t, tt, n, nt = training_megaflops(config.request_schema, config.model)
    cost = one + t * tokens + tt * tokens * tokens + n * impressions + nt * impressions * tokens
    ingest = config.ingest
    fits = [ingest.batch_impressions / impressions] if ingest.batch_impressions else []
    fits += [ingest.batch_cost / cost] if ingest.batch_cost else []
    return max(min(fits), 1.0)


def make_job(config: Config, manifest: Manifest, mode: Any, run: RunHandle, board: Any) -> WorkerJob:
    """What the workers get."""
    return WorkerJob(
        mode=mode,
        config=config,
        data_version=manifest.version,
        data_digest=manifest.digest(),
        ids_per_request=mean_ids_per_request(config.request_schema, manifest),
        requests_per_step=config.ingest.lanes * mean_requests_per_batch(config, manifest),
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
        raise _cause(list(error.worker_failures.values())) or error from None
    except ray.exceptions.RayError as error:
        raise _cause([error]) or error from None


def _cause(errors: list[BaseException]) -> RooError | None:
    seen: list[BaseException] = []
    queue = list(errors)
    while queue:
        error = queue.pop(0)
        if error in seen:
            continue
        seen.append(error)
        if isinstance(error, RooError):
            return error
        linked = (getattr(error, "cause", None), error.__cause__, error.__context__)
        queue += [item for item in linked if isinstance(item, BaseException)]
    return None


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


def train(
    config: Config,
    run_name: str,
    say: Say,
    *,
    start_from: str | None = None,
    day: str | None = None,
    parent: RunHandle | None = None,
    register: bool = True,
) -> TrainingResult:
    """Trains on the newest version of the request data set, or goes on with the run of that name.

    ``start_from``: a checkpoint whose weights a new run begins with; ``day``: evaluate it on that day's data before;
    ``parent``: the MLflow run that this one is shown under; ``register``: the model, under ``serving.register_as``.
    Raises BadInput (data, config, cluster) and TrainingDiverged with one message; the MLflow run is then marked
    FAILED. Raises Stopped after SIGTERM, with a last checkpoint where workers ran; the MLflow run is then marked
    KILLED. Raises ConfigError where another job is at work on the run.
    """
    config = config.model_copy(update={"run_name": run_name})
    with at_work(join_path(config.storage, run_name), f"run '{run_name}'", say):
        return _train(config, run_name, say, start_from, day, parent, register)


def _train(
    config: Config,
    run_name: str,
    say: Say,
    start_from: str | None,
    day: str | None,
    parent: RunHandle | None,
    register: bool,
) -> TrainingResult:
    begin = time.perf_counter()
    check_model(config.request_schema, config.model, "cuda" if config.training.gpu else "cpu")
    manifest = load_manifest(config.requests, config.requests_version)
    check_schema_fits(config.request_schema, manifest, config.requests)
    check_sides(config.requests, manifest, config.request_schema, config.holdout)
    plan = order_of_data(config, manifest)
    refuse_another_run(config, run_name, plan)
    begun = has_begun(config, run_name)
    if start_from is not None and not begun:
        refuse_other_weights(config, start_from)
    nodes = session.alive_nodes()
    run = open_run(config.tracking, "train", run_name, nodes, reopen=True, begun=begun, parent=parent)
    logger = RunLogger(run, say, config.tracking.end_wait_seconds)
    say(
        f"training '{run_name}' on version {manifest.version} of {config.requests}: {manifest.requests:,} requests, "
        f"{manifest.impressions:,} impressions, {workers_of(config)} workers, {config.ingest.lanes} lanes; "
        "starting the workers"
    )
    succeeded = False
    try:
        changed = logger.params(config.model_dump(mode="json", exclude={"request_schema"}))
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
            job = replace(make_job(config, manifest, "train", run, board), checkpoint=start_from, day=day)
            with forward_terminate(board):
                result = make_trainer(job, run_name).fit()
                while isinstance(ended := ray.get(board.outcome.remote()), Evicted):
                    # no failure: the run may be evicted any number of times
                    say(f"{ended}; starting the workers again")
                    result = make_trainer(job, run_name).fit()
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


def evaluate(config: Config, checkpoint: str, run_name: str, say: Say) -> TrainingResult:
    """Scores a checkpoint on the held-out side of the data set, with the model and schema in the checkpoint."""
    begin = time.perf_counter()
    manifest = load_manifest(config.requests, config.requests_version)
    with open_checkpoint(checkpoint).as_directory() as folder:
        state = read_state(folder)
    config = config.model_copy(update={"model": state.model, "request_schema": state.request_schema()})
    check_schema_fits(config.request_schema, manifest, config.requests)
    run = open_run(config.tracking, "evaluate", run_name, session.alive_nodes())
    logger = RunLogger(run)
    say(f"evaluating {checkpoint}; starting the workers")
    succeeded = False
    try:
        logger.params(config.model_dump(mode="json", exclude={"request_schema"}))
        data = {"data_set": config.requests, "data_version": manifest.version, "data_digest": manifest.digest()}
        logger.tags({"checkpoint": checkpoint} | data)
        logger.text(config.request_schema.to_yaml(), "schema.yaml")
        with progress_board(say) as board, readable_failures():
            job = make_job(config, manifest, "evaluate", run, board)
            make_trainer(replace(job, checkpoint=checkpoint), run_name).fit()
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
