"""The main path for real: log, shards, training on Ray Train with TorchRec over gloo, MLflow, evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Config, load_config
from roo_ray.errors import ConfigError, DataError, Stopped
from roo_ray.requests.lengths import mean_ids
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.training.checkpoint import read_state
from roo_ray.training.export_items import export_items
from roo_ray.training.folder import find_checkpoint
from roo_ray.training.launch import TrainingResult, evaluate, train
from roo_ray.training.prepare import prepare
from tests.jobs.faults import Faults, tensors
from tests.jobs.small import ROOT, small_config


def quiet(line: str) -> None:
    """Progress goes nowhere."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main_path")


@pytest.fixture(scope="module")
def built(local_ray: None, folder: Path) -> Manifest:
    return prepare(small_config(folder), "build", quiet)[0]


@pytest.fixture(scope="module")
def two_workers(built: Manifest, folder: Path) -> tuple[Config, TrainingResult]:
    config = small_config(folder)
    return config, train(config, "two-workers", quiet)


def curve(config: Config, result: TrainingResult, metric: str = "train/loss") -> dict[int, float]:
    """The metric's points by step; fails where a step was logged twice."""
    points = MlflowClient(config.tracking.uri).get_metric_history(result.run.run_id, metric)
    assert len({point.step for point in points}) == len(points), "a step was logged twice"
    return {point.step: point.value for point in points}


def test_training_logs_what_a_reviewer_needs(
    two_workers: tuple[Config, TrainingResult], built: Manifest, tmp_path: Path
) -> None:
    config, result = two_workers
    client = MlflowClient(config.tracking.uri)
    run = client.get_run(result.run.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.workers"] == "2"
    assert run.data.tags["data_digest"] == built.digest()
    metrics = run.data.metrics
    assert 0 < metrics["train/balance"] <= 1
    assert 1 < metrics["train/batch_users"] <= metrics["train/batch_requests"]
    assert 0 < metrics["train/false_negative_rate"] < 1
    for name in ("ne", "auc", "gauc", "calibration", "bayes_ne", "bayes_auc"):
        assert f"eval/click/{name}" in metrics
    assert 0 <= metrics["epoch/data_wait_share"] <= 1
    for unit in ("requests", "impressions"):
        each, every = (metrics[f"train/{unit}_per_second{of}"] for of in ("_per_worker", ""))
        assert 2 * each == pytest.approx(every)
    assert metrics["data/dedup_ratio_disk_bytes"] > 1
    assert metrics["eval/click/bayes_ne"] < metrics["eval/click/ne"]
    artifacts = {item.path for item in client.list_artifacts(result.run.run_id)}
    assert {"schema.yaml", "ledger.json", "sharding_plan.json", "checkpoint"} <= artifacts
    plan = json.loads(
        Path(client.download_artifacts(result.run.run_id, "sharding_plan.json", str(tmp_path))).read_text()
    )
    planned = {name: ids for row in plan for name, ids in row["ids_per_request"].items()}
    assert planned == mean_ids(config.request_schema, built, config.requests).per_request
    stored = {Path(item.path).name for item in client.list_artifacts(result.run.run_id, "checkpoint")}
    assert {".metadata", "state.json"} <= stored


def test_every_request_is_trained_and_evaluated_once(
    two_workers: tuple[Config, TrainingResult], built: Manifest
) -> None:
    _, result = two_workers
    last_day = built.days[-1]
    held_out = [file for file in built.files if file.day == last_day]
    assert result.metrics["eval/requests"] == sum(file.requests for file in held_out)
    assert result.metrics["eval/impressions"] == sum(file.impressions for file in held_out)
    assert result.metrics["epoch/requests"] == built.requests - result.metrics["eval/requests"]
    assert result.metrics["epoch/impressions"] == built.impressions - result.metrics["eval/impressions"]


def test_the_impression_level_form_has_the_same_curve(two_workers: tuple[Config, TrainingResult], folder: Path) -> None:
    """Neither the reader nor the form of the batch changes the training."""
    config, reference = two_workers
    result = train(small_config(folder, "ingest.reader=thread", "training.form=impression"), "impression", quiet)
    expected = curve(config, reference)
    assert len(expected) > 40
    assert curve(config, result) == pytest.approx(expected, rel=2e-4)
    for name in ("ne", "auc", "gauc"):
        assert result.metrics[f"eval/click/{name}"] == pytest.approx(reference.metrics[f"eval/click/{name}"], abs=2e-3)


@pytest.mark.slow
def test_from_two_workers_to_one_to_three_through_checkpoints(
    two_workers: tuple[Config, TrainingResult], folder: Path, tmp_path: Path
) -> None:
    """SIGKILL on one of two workers, SIGTERM to the driver with one, then three to the end: the undisturbed curve and
    weights in one MLflow run, and every request trained on once."""
    config, reference = two_workers
    faults = Faults(folder / "runs/chain", [(2, "kill"), (4, "stop")], delay=0.0)

    def with_workers(workers: int) -> Config:
        settings = ("training.checkpoint_every_steps=2", "training.log_every=1", "training.max_failures=0")
        return small_config(folder, *settings, f"training.workers={workers}")

    with faults.at_work():
        with pytest.raises(Exception):  # noqa: B017, PT011  (whatever Ray makes of a lost process)
            train(with_workers(2), "chain", faults.listen)
        assert [fault.what for fault in faults.done] == ["kill"]
        with pytest.raises(Stopped, match="the same run_name goes on there") as stopped:
            train(with_workers(1), "chain", faults.listen)
        client = MlflowClient(config.tracking.uri)
        named = "tags.`roo_ray.run` = 'train/chain'"
        experiment = client.get_experiment_by_name("roo_ray").experiment_id
        assert [run.info.status for run in client.search_runs([experiment], named)] == ["KILLED"]
        result = train(with_workers(3), "chain", faults.listen)
    killed, stop = faults.resumed  # (step, whether within an epoch)
    last = max(curve(config, reference))
    assert faults.done[0].known <= killed[0] < last
    assert stop[0] == int(re.findall(r"at step (\d+)", str(stopped.value))[0])
    assert killed[1] or killed[0] == last // 2  # at the end of the first epoch there is nothing to go on within
    assert stop[1]

    runs = client.search_runs([experiment], named)
    assert [(run.info.status, run.info.run_id) for run in runs] == [("FINISHED", result.run.run_id)]
    assert runs[0].data.tags["changed_on_resume"] == "training.workers: 2 -> 3"
    assert curve(config, result) == pytest.approx(curve(config, reference), rel=2e-4)
    for name in ("epoch/requests", "epoch/impressions"):
        assert result.metrics[name] == reference.metrics[name]
    states = [read_state(one.checkpoint) for one in (result, reference)]
    assert states[0].trained == states[1].trained  # the sum of the request keys among it
    assert states[0].trained["requests"] == result.metrics["epoch/requests"]
    assert states[0].position is None
    of_model = [
        {name: value for name, value in tensors(one.checkpoint, tmp_path).items() if name.startswith("/model/")}
        for one in (reference, result)
    ]
    assert of_model[0].keys() == of_model[1].keys()
    for name, expected in of_model[0].items():  # up to the order of sums
        apart = float((of_model[1][name] - expected).double().norm() / max(float(expected.double().norm()), 1e-3))
        assert apart < 5e-3, (name, apart)


def test_another_order_is_refused_with_the_difference(two_workers: tuple[Config, TrainingResult], folder: Path) -> None:
    """A run whose data would come in another order does not go on, and what it has logged stays as it is."""
    config, result = two_workers
    with pytest.raises(ConfigError, match=r"run 'two-workers' exists .* seed was 0 and is 5; restore this"):
        train(small_config(folder, "training.seed=5"), "two-workers", quiet)
    with pytest.raises(ConfigError, match=r"run 'two-workers' exists with another model: model.dim was 32 and is 64"):
        train(small_config(folder, "model.dim=64"), "two-workers", quiet)
    assert MlflowClient(config.tracking.uri).get_run(result.run.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_retrieval_trains_and_its_checkpoint_has_the_same_recall(built: Manifest, folder: Path) -> None:
    """What ``drop_last`` drops is counted, too."""
    options = ("model.kind=retrieval", "training.epochs=1", "training.autocast=bf16", "training.deterministic=true")
    config = small_config(folder, *options, "ingest.drop_last=true")
    result = train(config, "retrieval", quiet)
    assert result.metrics["eval/recall_at_10"] <= result.metrics["eval/recall_at_100"] < 1
    assert result.metrics["eval/recall_at_100"] > 0
    assert result.metrics["eval/items"] > 100
    dropped = curve(config, result, "epoch/dropped_requests")
    assert len(dropped) == 1
    assert result.metrics["epoch/requests"] + sum(dropped.values()) + result.metrics["eval/requests"] == built.requests
    with pytest.raises(ConfigError, match="'retrieval' is a training"):
        evaluate(config, find_checkpoint(config, "retrieval"), "retrieval", quiet)
    again = evaluate(config, find_checkpoint(config, "retrieval"), "retrieval-again", quiet)
    assert again.metrics["eval/recall_at_10"] == pytest.approx(result.metrics["eval/recall_at_10"], abs=1e-6)
    path = str(folder / "items.parquet")
    done = export_items(config, again.checkpoint, path, quiet)
    among_all = evaluate(config, again.checkpoint, "retrieval-all", quiet, items=path)
    assert among_all.metrics["eval/items"] == done.items > again.metrics["eval/items"]
    assert among_all.metrics["eval/recall_at_100"] > 0
    assert MlflowClient(config.tracking.uri).get_run(among_all.run.run_id).data.tags["items"] == path


def test_truncated_shard_gives_one_error_naming_the_file(built: Manifest, folder: Path) -> None:
    config = small_config(folder, f"requests={folder}/damaged", "training.max_failures=0")
    prepare(config, "damaged", quiet)
    manifest = load_manifest(config.requests)
    victim = Path(config.requests) / manifest.files[0].path
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError, match=victim.name):
        train(config, "damaged", quiet)
    runs = MlflowClient(config.tracking.uri)
    experiment = runs.get_experiment_by_name("roo_ray")
    failed = runs.search_runs([experiment.experiment_id], "tags.`roo_ray.run` = 'train/damaged'")
    assert [run.info.status for run in failed] == ["FAILED"]


@pytest.mark.slow
def test_real_data_end_to_end(local_ray: None, ebnerd_folder: Path, tmp_path: Path) -> None:
    """EB-NeRD in its publisher's files: 1,046 requests and 10,848 impressions, counted at every stage."""
    config = load_config(
        ROOT / "configs/ebnerd.yaml",
        [
            f"source.path={ebnerd_folder}",
            f"requests={tmp_path}/requests",
            f"storage={tmp_path}/runs",
            f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
            "training.epochs=1",
        ],
    )
    manifest, _ = prepare(config, "ebnerd", quiet)
    assert (manifest.requests, manifest.impressions) == (1046, 10848)
    result = train(config, "ebnerd", quiet)
    trained, held_out = result.metrics["epoch/requests"], result.metrics["eval/requests"]
    assert trained > 0
    assert held_out > 0
    assert trained + held_out == 1046
    assert result.metrics["epoch/impressions"] + result.metrics["eval/impressions"] == 10848
    assert result.metrics["eval/click/impressions"] == result.metrics["eval/impressions"]
    assert "eval/click/bayes_ne" not in result.metrics  # nobody knows it
    again = train(config.model_copy(update={"requests_version": 1}), "ebnerd", quiet)  # nothing is left to do
    assert again.run == result.run
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True)
    assert MlflowClient(config.tracking.uri).get_run(result.run.run_id).info.status == "FINISHED"
