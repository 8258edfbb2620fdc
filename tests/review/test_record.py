"""What a finished run gets for its reviewer, without Ray: model, data set, pictures, ratios; none of it fatal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Config, Serving, Tracking
from roo_ray.errors import ConfigError, DataError
from roo_ray.metrics.collection import RankingMetrics
from roo_ray.metrics.curves import CURVES_FILE, curves_of
from roo_ray.review.again import review_again
from roo_ray.review.history import baseline_run, cumulative, step_milliseconds
from roo_ray.review.record import evaluation_pictures, review_training
from roo_ray.serving import export
from roo_ray.serving.publish import MODEL_OF_TAG, register_model
from roo_ray.terminal import human_bytes
from roo_ray.training.folder import RESULT_FILE, save_json
from roo_ray.training.outbox import Outbox
from roo_ray.training.tracking import RunHandle, RunLogger, open_run
from tests.ingest.shard_maker import schema
from tests.metrics.reference import random_batch
from tests.serving.test_scorer import MODEL, Trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    settings = {"name": "record", "schema": schema(), "requests": str(folder / "data"), "model": MODEL}
    made = Config.model_validate(settings | {"storage": str(folder), "serving": {"register_as": "recorded"}})
    return made.model_copy(update={"tracking": Tracking(uri=f"sqlite:///{folder}/mlflow.db")})


def logged_run(
    config: Config, name: str, form: str, unknown: int | None = None, params: Mapping[str, Any] | None = None
) -> RunHandle:
    """A training run as workers leave it: windows of 100 impressions and 2 s, curves of the evaluation. The workers
    were killed after step 25, and have gone on from step 20, faster and with a line at 22."""
    run = open_run(config.tracking, "train", name, 1)
    logger = RunLogger(run)
    logger.params({"training": {"form": form, "seed": 0}, "model": {"dim": 8}} | dict(params or {}))
    logger.tags({"data_digest": "same"})
    for step, seconds in ((10, 2.0), (20, 4.0), (25, 7.0), (22, 4.3), (30, 6.0)):
        if step == 22:
            logger.close()
            logger = RunLogger(run)
        figures = {"train/impressions": 100.0, "train/seconds": 2.0, "train/data_wait_share": 0.25}
        figures |= {"train_lifetime/impressions": 10.0 * step, "train_lifetime/seconds": seconds}
        nes = {f"train/{t}/ne": 1 - step / 100 for t in ("click", "buy")}
        nes |= {f"train_lifetime/{t}/ne": 1 - step / 200 for t in ("click", "buy")}
        logger.metrics(figures | nes, step)
    logits, labels, weights, counts = random_batch(1, 100)
    if unknown is not None:
        weights[:, unknown] = 0
    metrics = RankingMetrics(["click", "buy"])
    metrics.update(logits, labels, weights, counts)
    logger.json(curves_of(metrics), CURVES_FILE)
    logger.end(True)
    return run


def test_a_run_is_completed(config: Config, folder: Path) -> None:
    trained = Trained(folder)
    other = logged_run(config, "baseline", "impression")
    rate = {"form": "impression", "seed": 0, "dense_lr": 0.5}
    for changed in ({"model": {"dim": 16}}, {"training": rate}, {"ingest": {"batch_impressions": 9}}):
        logged_run(config, "newer, of something else", "impression", params=changed)
    run = logged_run(config, "roo", "request")
    said: list[str] = []
    review_training(config, trained.manifest, trained.checkpoint, run, said.append)
    assert [line for line in said if "could not" in line] == []
    client = MlflowClient(config.tracking.uri)
    found = client.get_run(run.run_id)
    pictures = {Path(item.path).name for item in client.list_artifacts(run.run_id, "review")}
    for task in ("click", "buy"):
        expected = {f"{kind}_{task}.png" for kind in ("roc", "calibration", "ne_over_steps", "ne_over_time")}
        assert expected <= pictures
    others = {"impressions_per_request.png", "length_of_history.png", "step_time.png", "curves.json"}
    assert others <= pictures
    for name in ("lookups", "all_to_all_bytes", "flops"):
        assert found.data.metrics[f"data/dedup_ratio_{name}"] > 1
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("data v1", trained.manifest.digest()[:8])
    assert data.tags[0].value == "train"
    assert client.get_model_version("recorded", "1").run_id == run.run_id
    assert found.data.tags[MODEL_OF_TAG] == trained.checkpoint
    assert baseline_run(client, found) == ("impression-level (baseline)", other.run_id)
    points = cumulative(client, run.run_id, "click")
    found_points = [(p.step, p.impressions, p.seconds) for p in points]
    assert found_points == [(10, 100, 2), (20, 200, 4), (22, 220, 4.3), (25, 250, 6), (30, 300, 6)]
    assert step_milliseconds(client, found) == pytest.approx(
        {"waiting for data": 50.0, "computing and communicating": 150.0}
    )
    for name, value in (("forward", 3.0), ("total", 9.0), ("forward", 5.0)):  # as training.timing names them
        client.log_metric(run.run_id, f"step/{name}_ms", value, step=int(value))
    assert step_milliseconds(client, client.get_run(run.run_id)) == {"forward": 4.0}


def test_a_task_without_known_labels_costs_no_other_its_pictures(config: Config, tmp_path: Path) -> None:
    run = logged_run(config, "later conversions", "request", unknown=0)
    said: list[str] = []
    evaluation_pictures(run, tmp_path, said.append)
    assert {path.name for path in tmp_path.iterdir()} == {"calibration_buy.png", "roc_buy.png"}
    assert [line for line in said if "'click' has no known label" in line] == said != []


def test_a_model_is_registered_when_it_may_be_and_once(config: Config, folder: Path) -> None:
    """Not with the training of a day that may be refused; not again by a job that is started again."""
    trained = Trained(folder / "days")
    config = config.model_copy(update={"requests": trained.data, "serving": Serving(register_as="daily")})
    run = open_run(config.tracking, "train", "day", 1)
    client = MlflowClient(config.tracking.uri)
    for _ in range(2):
        review_training(config, trained.manifest, trained.checkpoint, run, lambda line: None, register=False)
    assert client.search_model_versions("name = 'daily'") == []
    tags = client.get_run(run.run_id).data.tags
    assert register_model(config, trained.checkpoint, run) == "1"
    assert register_model(config, trained.checkpoint, run) == "1"
    assert client.get_run(run.run_id).data.tags == tags  # the model that was logged first
    [version] = client.search_model_versions("name = 'daily'")
    assert version.run_id == run.run_id
    with pytest.raises(DataError, match="has no model of"):
        register_model(config, trained.checkpoint + "-next", run)


def test_a_run_whose_server_was_away_is_completed_later(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(folder / "later")
    config = config.model_copy(update={"requests": trained.data, "storage": str(folder / "later"), "run_name": "late"})
    run = logged_run(config, "late", "request")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    said: list[str] = []
    away = RunHandle("http://127.0.0.1:9", run.run_id, run.experiment_id)
    assert not review_training(config, trained.manifest, trained.checkpoint, away, said.append)
    assert len(said) == 2
    assert "python jobs/review.py --config CONFIG run_name=late" in said[1]
    left = Outbox("http://127.0.0.1:9", run.run_id, said.append)
    left.put([{"kind": "tags", "tags": {"came": "late"}}])
    waits = left.close(0.1)
    assert waits is not None
    waits.write_text(waits.read_text().replace("http://127.0.0.1:9", str(run.uri)))

    with pytest.raises(ConfigError, match="'late' is no finished run"):
        review_again(config, "late", said.append)
    save_json(config, "late", RESULT_FILE, {"checkpoint": trained.checkpoint, "mlflow_run_id": run.run_id})
    for _ in range(2):
        assert review_again(config, "late", said.append).run_id == run.run_id
    client = MlflowClient(run.uri)
    assert "review" in {item.path for item in client.list_artifacts(run.run_id)}
    completed = client.get_run(run.run_id)
    assert completed.data.tags["came"] == "late"
    assert completed.inputs.dataset_inputs
    assert len([one for one in client.search_model_versions("name = 'recorded'") if one.run_id == run.run_id]) == 1
    assert not waits.exists()


def test_a_model_that_does_not_fit_is_said_with_what_to_do(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is allocated: the kernel would end the job. All else of the run is there."""
    trained = Trained(folder / "large")
    needed = 2.5 * sum(value.nbytes for value in trained.model.state_dict().values())
    run = logged_run(config, "large", "request")
    client = MlflowClient(config.tracking.uri)
    monkeypatch.setattr(export, "free_memory", lambda: int(needed) - 1)
    with monkeypatch.context() as none:
        none.setattr(export, "RankingModel", None)
        said: list[str] = []
        assert not review_training(config, trained.manifest, trained.checkpoint, run, said.append)
    first, last = said
    assert first.startswith("the model could not be logged: exporting the whole model of")
    assert f"needs {human_bytes(needed)} of memory, and this node has {human_bytes(needed - 1)} free" in first
    assert "jobs/review.py" in first
    assert "serving.log_model=false" in first
    assert "python jobs/review.py" in last
    assert MODEL_OF_TAG not in client.get_run(run.run_id).data.tags
    assert client.get_run(run.run_id).inputs.dataset_inputs
    monkeypatch.setattr(export, "free_memory", lambda: int(needed))  # on a machine with more
    assert review_training(config, trained.manifest, trained.checkpoint, run, said.append)
    assert client.get_run(run.run_id).data.tags[MODEL_OF_TAG] == trained.checkpoint


def test_what_cannot_be_made_is_said_and_not_raised(config: Config, folder: Path) -> None:
    run = open_run(config.tracking, "train", "broken", 1)
    said: list[str] = []
    manifest = Trained(folder / "another").manifest
    review_training(config, manifest, str(folder / "no_checkpoint"), run, said.append)
    assert any(line.startswith("the model could not be logged") for line in said)
    assert any(line.startswith("the evaluation's pictures could not be logged") for line in said)
    assert MlflowClient(config.tracking.uri).get_run(run.run_id).inputs.dataset_inputs
    review_training(config, manifest, "", RunHandle(None), said.append)  # tracking is off
