"""Runs that nobody watches: the MLflow server goes and comes back, the best checkpoint stays, a diverging run ends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from roo_ray.errors import DataError, TrainingDiverged
from roo_ray.requests.manifest import Manifest
from roo_ray.training.checkpoint import read_state, state_json
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare
from roo_ray.training.saver import step_of
from tests.jobs.faults import tensors
from tests.jobs.small import small_config
from tests.jobs.test_main_path import quiet
from tests.mlflow_server import Server

SETTINGS = ("training.workers=1", "ingest.reader=thread", "training.log_every=4")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_that_stops_and_the_best_checkpoint(local_ray: None, server: Server, tmp_path: Path) -> None:
    keep = ("training.keep_by=best", "training.keep_checkpoints=1", "training.checkpoint_every_minutes=0.0005")
    learns = ("training.epochs=4", "training.embedding_lr=1.0")  # too fast: it is at its best before the end
    tracking = (f"tracking.uri={server.uri}", "tracking.end_wait_seconds=120")
    config = small_config(tmp_path, *SETTINGS, *keep, *learns, *tracking)
    prepare(config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})}), "b", quiet)
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        if server.process is not None and re.search(r"epoch 1/4  step \d+ ", line):
            server.stop()
        elif server.process is None and "held out:" in line:
            server.start()  # no line comes meanwhile; training goes on

    result = train(config, "watched by nobody", listen)
    away = [at for at, line in enumerate(lines) if "MLflow does not answer" in line]
    back = [at for at, line in enumerate(lines) if "MLflow answers again" in line]
    assert len(away) == len(back) >= 1  # a server that is slow to start may seem to go again
    assert all(went < came for went, came in zip(away, back, strict=True))
    client = MlflowClient(server.uri)
    run = client.get_run(result.run.run_id)
    assert run.info.status == "FINISHED"
    losses = sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
    last = step_of(Path(result.checkpoint).name)
    assert last is not None
    assert losses == list(range(1, last + 1))  # nothing is lost, and nothing there twice

    found = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "eval/click/ne")}
    assert len(found) == 4
    best = min(found, key=lambda step: found[step])
    kept = {step_of(folder.name) for folder in Path(config.storage, "watched by nobody").glob("epoch-*")}
    assert kept == {best, last}
    written = {point.step for point in client.get_metric_history(run.info.run_id, "checkpoint/write_ms")}
    assert len(written) > 4  # some were due by the minutes, within an epoch
    assert {"checkpoint/copy_ms", "checkpoint/report_ms"} <= run.data.metrics.keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_loss_that_is_not_finite_ends_the_run_and_names_requests(local_ray: None, tmp_path: Path) -> None:
    config = small_config(tmp_path, *SETTINGS, "training.dense_lr=1e30", "training.max_failures=3")
    prepare(config, "build", quiet)
    lines: list[str] = []
    with pytest.raises(TrainingDiverged, match=r"requests of the batch, by rank: rank 0: .*request_id"):
        train(config, "diverges", lines.append)
    assert sum("workers ready" in line for line in lines) == 1  # it would end the same way again
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    [run] = client.search_runs([experiment], "tags.`roo_ray.job` = 'train'")
    assert run.info.status == "FAILED"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_shard_that_is_deleted_under_a_run_ends_it_once(local_ray: None, tmp_path: Path) -> None:
    # Ray Data would have read dozens of such small epochs ahead
    thread = ("ingest.reader=thread", "training.epochs=500", "training.max_failures=3", "training.log_every=1")
    config = small_config(tmp_path, *thread)
    manifest, _ = prepare(config, "build", quiet)
    victim = next(file.path for file in manifest.files if file.day == manifest.days[0])
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        if "epoch 2/500  step" in line:
            (tmp_path / "requests" / victim).unlink(missing_ok=True)

    with pytest.raises(DataError, match=re.escape(victim) + " is missing"):
        train(config, "loses a shard", listen)
    assert sum("workers ready" in line for line in lines) == 1  # it would be missing again
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    [run] = client.search_runs([experiment], "tags.`roo_ray.job` = 'train'")
    assert run.info.status == "FAILED"


ITEMS = "sparse.collections.dim_32.embeddings.item.weight"


def item_of_one_request(manifest: Manifest, folder: Path) -> int:
    """An item that one request of the first day reads, in its history or among its candidates, and no other does."""
    day, seen = dict[int, str](), Counter[int]()
    for file in manifest.files:
        table = pq.read_table(folder / file.path, columns=["history_item", "item_id"])
        for history, candidates in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            items = {*history, *candidates}
            seen.update(items)
            day.update(dict.fromkeys(items, file.day))
    return next(item for item, requests in seen.items() if requests == 1 and day[item] == manifest.days[0])


def with_broken_row(checkpoint: str, row: int, folder: Path) -> str:
    """A copy of a checkpoint in which an item's embedding is infinite."""
    dcp_to_torch_save(checkpoint, folder / "whole.pt")
    whole = torch.load(folder / "whole.pt", weights_only=False)
    whole["model"][ITEMS][row] = float("inf")
    torch.save(whole, folder / "whole.pt")
    broken = folder / "broken" / Path(checkpoint).name
    torch_save_to_dcp(folder / "whole.pt", broken)
    sizes = {path.name: path.stat().st_size for path in broken.iterdir()}
    (broken / "state.json").write_text(state_json(read_state(checkpoint), sizes))
    return str(broken)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_request_whose_loss_is_not_finite_is_left_out_on_both_workers(local_ray: None, tmp_path: Path) -> None:
    config = small_config(tmp_path, "training.workers=2", "training.on_nan=skip", "training.log_every=1")
    manifest, _ = prepare(config, "build", quiet)
    row = item_of_one_request(manifest, tmp_path / "requests")
    broken = with_broken_row(train(config, "before", quiet).checkpoint, row, tmp_path)
    lines: list[str] = []
    result = train(config, "goes on", lines.append, start_from=broken)

    client = MlflowClient(config.tracking.uri)
    run = client.get_run(result.run.run_id)
    assert run.info.status == "FINISHED"
    metrics = run.data.metrics
    counted = client.get_metric_history(run.info.run_id, "train/not_finite_batches")
    assert [point.value for point in counted] == [1, 2]  # once an epoch
    assert sum("the batch is left out" in line for line in lines) == 2
    held_out = sum(file.requests for file in manifest.files if file.day == manifest.days[-1])
    assert metrics["epoch/not_finite_requests"] > 1  # the batches of both workers
    assert metrics["epoch/requests"] + metrics["epoch/not_finite_requests"] == manifest.requests - held_out
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "train/loss")}
    assert steps.isdisjoint(point.step for point in counted)
    for name, value in tensors(result.checkpoint, tmp_path).items():  # nothing was updated with it
        if name.startswith(("/model", "/optimizer", "/packed")):
            wrong = (~value.isfinite()).reshape(len(value), -1).any(1).nonzero().flatten().tolist()
            assert wrong == ([row] if name == f"/model/{ITEMS}" else []), name
