"""An epoch of training by real workers (gloo, no Ray): evicted amid it, gone on with, refused where its data would
come in another order; and what the epoch counts, as MLflow has it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as pafs
import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient

from roo_ray.config import Config, load_config
from roo_ray.errors import ConfigError, Evicted, Stopped
from roo_ray.ingest.plan import plan_inputs
from roo_ray.ingest.stream import Step
from roo_ray.requests.lengths import mean_ids
from roo_ray.requests.manifest import load_manifest
from roo_ray.training import checkpoint, clock, throughput, worker
from roo_ray.training.job import WorkerJob
from roo_ray.training.launch import PLAN_FILE, refuse_another_run, save_json
from roo_ray.training.positions import refuse_another_stream
from roo_ray.training.tracking import RunHandle, open_run
from tests.ingest import shard_maker
from tests.ingest.plan_changes import CHANGES, inputs
from tests.ingest.shard_maker import random_rows, write_data_set
from tests.training.ranks import MODEL, run_ranks
from tests.training.test_checkpoint import STATE
from tests.training.test_clock import Clock

WORLD, REQUESTS = 2, 96
INGEST = {
    "lanes": 3,
    "batch_impressions": 16,
    "window_units": 4,
    "reader": "thread",
    "interleave": 1,
    "on_bad_shard": "skip",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_refused_where_its_data_would_come_in_another_order(change: str, tmp_path: Path) -> None:
    """By the driver, from what lies beside the run's checkpoints, and by the workers, from the checkpoint."""
    changes, words = CHANGES[change]
    with pytest.raises(ConfigError) as of_worker:
        refuse_another_stream("place", inputs(), inputs(changes))
    config: Any = SimpleNamespace(storage=str(tmp_path), model=MODEL, requests=str(tmp_path))
    (tmp_path / "run/c").mkdir(parents=True)
    (tmp_path / "run/c/state.json").write_text(checkpoint.state_json(STATE, {}))
    save_json(config, "run", PLAN_FILE, inputs())
    refuse_another_run(config, "run", inputs())
    with pytest.raises(ConfigError) as of_driver:
        refuse_another_run(config, "run", inputs(changes))
    for error in (of_worker, of_driver):
        assert words in str(error.value)
        assert "cannot go on" in str(error.value)


def test_the_same_order_is_not_refused() -> None:
    refuse_another_stream("place", inputs(), inputs({"reader": "thread", "prefetch_batches": 1}))


# ---- workers ---------------------------------------------------------------------------------------------


class EvictedAfter(threading.Event):
    """As SIGTERM at a step."""

    def __init__(self, of: worker.Worker, steps: int) -> None:
        super().__init__()
        self.of, self.steps = of, steps

    def is_set(self) -> bool:
        return self.of.steps_done + 1 >= self.steps


def a_worker(rank: int, config: Config, run: RunHandle, folder: str, plan: dict[str, Any]) -> worker.Worker:
    """A real one, with what Ray Train would tell it."""
    lines: list[str] = []
    board = SimpleNamespace(post=SimpleNamespace(remote=lines.append), lines=lines)
    storage = SimpleNamespace(storage_filesystem=pafs.LocalFileSystem(), experiment_fs_path=folder)
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: WORLD, get_storage=lambda: storage)
    worker.ray.train.get_context = lambda: context  # type: ignore[assignment,return-value]
    worker.get_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    worker.watch_worker = threading.Event
    ids = mean_ids(config.request_schema, load_manifest(config.requests), config.requests)
    job = WorkerJob("train", config, 1, "digest", ids, 8.0, 24.0, run, board, plan)
    return worker.Worker(job, threading.Event())


def _evict_and_go_on(rank: int, world: int, path: str, run: RunHandle, folder: str) -> dict[str, Any]:
    config = load_config(path)
    reported: list[str] = []
    worker.ray.train.report = lambda metrics, checkpoint, **how: reported.append(checkpoint.path)  # type: ignore[assignment]
    ingest, manifest = config.ingest, load_manifest(config.requests)

    def plan(**changes: Any) -> dict[str, Any]:
        changed = ingest.model_copy(update=changes)
        return plan_inputs(manifest, config.request_schema, changed, config.holdout, "train", 0, "shuffled", (1.0,) * 5)

    lost = Path(config.requests) / manifest.files[0].path
    barrier = torch.distributed.barrier
    barrier()
    if rank == 0:
        lost.rename(lost.with_suffix(".gone"))
    barrier()
    first = a_worker(rank, config, run, folder, plan())
    first.evicted = EvictedAfter(first, 3 if rank else 10**9)
    found: dict[str, Any] = {}
    stream = first.stream("train")
    with pytest.raises(Evicted, match="at step 3"):
        first.train_epoch(stream, 0)
    stream.close()
    barrier()
    if rank == 0:
        lost.with_suffix(".gone").rename(lost)
    barrier()
    source = ray.train.Checkpoint(reported[-1], filesystem=pafs.LocalFileSystem())
    found["state"] = checkpoint.read_state(reported[-1]).model_dump()
    second = a_worker(rank, config, run, folder, plan(drop_last=True))
    with pytest.raises(ConfigError, match=r"cannot go on from .*: drop_last was False and is True; restore this"):
        second.restore(source)
    second = a_worker(rank, config, run, folder, plan())
    second.restore(source)
    assert second.position is not None
    found["restored"] = (second.steps_done, second.position.lanes, second.position.skipped)
    stream = second.stream("train")
    at = Clock()
    clock.time = throughput.time = SimpleNamespace(perf_counter=at.perf_counter)  # type: ignore[assignment]
    epoch = stream.epoch

    def slow_to_start(number: int) -> Iterator[Step]:
        for taken, step in enumerate(epoch(number)):
            at.now += 1 if taken else 100
            yield step

    stream.epoch = slow_to_start  # type: ignore[method-assign]
    before = second.clock.passed
    metrics = second.train_epoch(stream, 0)
    found["seconds"] = second.clock.passed - before
    clock.time = throughput.time = time
    stream.close()
    second.logger.metrics(metrics, second.steps_done)
    second.epochs_done += 1
    second.save(metrics, wait=True)
    found["last"] = checkpoint.read_state(reported[-1]).model_dump()
    found["lines"] = [*first.job.board.lines, *second.job.board.lines]
    found["stopped"] = {
        drop: _stop_in_evaluation(rank, config, RunHandle(None), folder, drop) for drop in (False, True)
    }
    for one in (first, second):
        one.logger.close()
    return found | {"metrics": metrics}


def _stop_in_evaluation(rank: int, config: Config, run: RunHandle, folder: str, drop_last: bool) -> list[Any]:
    """Three of four files are lost, so that lanes end with windows of which nothing can be read. What is counted after
    the epoch, and after a restart from the checkpoint of an evaluation that was left."""
    changed = {"window_units": 1, "interleave": None, "drop_last": drop_last}
    config = config.model_copy(update={"ingest": config.ingest.model_copy(update=changed)})
    manifest = load_manifest(config.requests)
    files = [Path(config.requests) / file.path for file in manifest.files[:3]]
    torch.distributed.barrier()
    for file in files if rank == 0 else []:
        file.rename(file.with_suffix(".gone"))
    torch.distributed.barrier()
    reported: list[str] = []
    worker.ray.train.report = lambda metrics, checkpoint, **how: reported.append(checkpoint.path)  # type: ignore[assignment]
    counted = []
    for attempt in range(2):
        one = a_worker(rank, config, run, f"{folder}-{drop_last}", {})
        if attempt:
            one.restore(ray.train.Checkpoint(reported[-1], filesystem=pafs.LocalFileSystem()))
        stream = one.stream("train")
        one.train_epoch(stream, 0)
        stream.close()
        counted.append(one.counts.over_ranks(one.device))
        if not attempt:
            with pytest.raises(Stopped):
                one.leave_evaluation(stop=True)
        one.logger.close()
    torch.distributed.barrier()
    for file in files if rank == 0 else []:
        file.with_suffix(".gone").rename(file)
    return counted


def write_small_run(folder: Path, **training: Any) -> None:
    """A data set and ``config.yaml`` of a run of two workers over it, five steps an epoch."""
    rows = random_rows([1 + i % 4 for i in range(2 * REQUESTS)], 9, days=2)
    rows = [row | {"user_id": f"u{n % 3}"} for n, row in enumerate(rows)]
    write_data_set(folder / "requests", rows, shard_maker.schema(), row_group=4, file_rows=24)
    (folder / "schema.yaml").write_text(shard_maker.schema().to_yaml())
    content = {"name": "x", "schema": f"{folder}/schema.yaml", "requests": f"{folder}/requests", "ingest": INGEST}
    content |= {"tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}, "model": MODEL.model_dump(mode="json")}
    content |= {"training": {"workers": WORLD, "epochs": 1, "log_every": 1, "row_wise_from": 20} | training}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 found, and the metrics that MLflow has: name -> values."""
    folder = tmp_path_factory.mktemp("going_on")
    write_small_run(folder)
    config = load_config(folder / "config.yaml")
    run = open_run(config.tracking, "train", "going-on", 1)
    found = run_ranks(WORLD, _evict_and_go_on, str(folder / "config.yaml"), run, str(folder / "runs"))[0]
    client = MlflowClient(config.tracking.uri)
    names = client.get_run(run.run_id).data.metrics
    return found | {"mlflow": {name: [m.value for m in client.get_metric_history(run.run_id, name)] for name in names}}


def test_a_checkpoint_holds_what_was_skipped(gone_on: dict[str, Any]) -> None:
    """Of the windows in progress, and how much in all."""
    state = gone_on["state"]
    assert any(state["position_skipped"])
    assert state["trained"]["unreadable_requests"] > 0
    lanes, skipped = state["position"], tuple(map(tuple, state["position_skipped"]))
    assert gone_on["restored"] == (3, tuple(map(tuple, lanes)), skipped)


def test_every_request_is_trained_on_or_counted_as_skipped(gone_on: dict[str, Any]) -> None:
    """The shard is back for the second part of the epoch, so that a part of it is skipped."""
    trained = gone_on["last"]["trained"]
    assert trained["requests"] + trained["unreadable_requests"] == REQUESTS
    assert 0 < trained["unreadable_requests"] < 24
    assert trained["unreadable_requests"] >= gone_on["state"]["trained"]["unreadable_requests"]
    assert gone_on["metrics"]["epoch/requests"] == trained["requests"]
    assert any(f"{trained['unreadable_requests']} requests of shards that cannot be" in s for s in gone_on["lines"])


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_job_that_is_stopped_in_evaluation_has_counted_its_epoch_once(
    gone_on: dict[str, Any], drop_last: bool
) -> None:
    """Also what could not be read behind the last batch."""
    after, again = gone_on["stopped"][drop_last]
    assert after == again
    assert after["unreadable_requests"] == 72
    assert after["requests"] <= 24
    assert drop_last or after["requests"] == 24


def test_mlflow_has_what_was_skipped_and_crowded(gone_on: dict[str, Any]) -> None:
    values = gone_on["mlflow"]
    assert values["epoch/skipped_requests"] == [gone_on["last"]["trained"]["unreadable_requests"]]
    crowded, steps = values["train/crowded_requests"], len(values["train/loss"])
    assert len(crowded) == steps > 3  # a line a step
    assert all(count >= 0 for count in crowded)
    assert sum(crowded) > 0  # 3 users: their requests cannot all be apart
    assert "train/false_negative_rate" in values


def test_the_time_of_an_epoch_begins_with_its_first_batch(gone_on: dict[str, Any]) -> None:
    """Of its throughput, of the windows' and of ``training.max_seconds`` alike: 100 s of start are in none."""
    assert 0 < gone_on["seconds"] < 50
    assert gone_on["metrics"]["epoch/seconds"] == gone_on["seconds"]
    assert sum(gone_on["mlflow"]["train/seconds"][-int(gone_on["seconds"]) :]) == gone_on["seconds"]
