"""A trained model as a product: scored without Ray, by Ray Data, evaluated against another, all giving one figure."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from sklearn.metrics import roc_auc_score

from roo_ray.config import Config
from roo_ray.errors import ConfigError, DataError
from roo_ray.metrics.held_out import read_scores
from roo_ray.requests.manifest import Manifest
from roo_ray.review.evaluation import compare_models
from roo_ray.serving.export import export_model, input_types
from roo_ray.serving.predict import NOTE, predict
from roo_ray.serving.scorer import Scorer, plain_columns
from roo_ray.sources.hashing import hash_rows
from roo_ray.training.launch import TrainingResult, train
from roo_ray.training.prepare import prepare
from tests.jobs.small import ROOT, small_config


def quiet(line: str) -> None:
    """Progress goes nowhere."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("product")


@pytest.fixture(scope="module")
def trained(local_ray: None, folder: Path) -> tuple[Config, Manifest, TrainingResult]:
    """Trained on 2 workers with sharded tables, its held-out scores written, the model registered."""
    extra = [f"evaluation.scores={folder}/scores", "serving.register_as=clicks", "training.row_wise_from=1000"]
    early = ["training.checkpoint_every_steps=2", "training.keep_checkpoints=100"]
    config = small_config(folder, *extra, *early, "training.epochs=1")
    manifest, _ = prepare(config, "build", quiet)
    return config, manifest, train(config, "product", quiet)


def stored_requests(config: Config, manifest: Manifest) -> pa.Table:
    held_out = [file.path for file in manifest.files if file.day == manifest.days[-1]]
    return pa.concat_tables([pq.read_table(f"{config.requests}/{path}") for path in held_out])


def worker_scores(config: Config, folder: Path) -> dict[tuple[int, int], float]:
    """(request key, place) -> the probability that the training worker evaluated."""
    table, _ = read_scores(f"{folder}/scores")
    chances = 1 / (1 + np.exp(-table.column("logit_click").to_numpy().astype(np.float64)))
    keys = zip(table.column("request_key").to_pylist(), table.column("impression_index").to_pylist(), strict=True)
    return dict(zip(keys, chances.tolist(), strict=True))


def test_evaluation_is_exact(trained: tuple[Config, Manifest, TrainingResult], folder: Path) -> None:
    config, _, result = trained
    table, _ = read_scores(f"{folder}/scores")
    labels, logits = table.column("label_click").to_numpy(), table.column("logit_click").to_numpy()
    assert result.metrics["eval/exact"] == 1
    assert result.metrics["eval/impressions"] == table.num_rows
    assert result.metrics["eval/click/auc"] == pytest.approx(roc_auc_score(labels, logits), rel=1e-12)
    assert 0 < result.metrics["eval/click/gauc_user"] < 1
    client = MlflowClient(config.tracking.uri)
    metrics = client.get_run(result.run.run_id).data.metrics
    assert metrics["train_lifetime/click/impressions"] == metrics["epoch/impressions"]


def test_scores_in_a_plain_process_equal_the_workers(
    trained: tuple[Config, Manifest, TrainingResult], folder: Path
) -> None:
    config, manifest, result = trained
    client = MlflowClient(config.tracking.uri)
    version = client.get_model_version("clicks", "1")
    model = client.get_model_version_download_uri("clicks", "1")
    assert version.run_id == result.run.run_id
    requests = stored_requests(config, manifest)
    (folder / "in.json").write_text(json.dumps(plain_columns(requests, config.request_schema)))
    command = [sys.executable, "-m", "tests.serving.plain_process", model, f"{folder}/in.json", f"{folder}/out.json"]
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "ROO_RAY_HOME": str(folder), "MLFLOW_TRACKING_URI": config.tracking.uri}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((folder / "out.json").read_text())
    assert list(scores) == ["click"]
    expected = worker_scores(config, folder)
    keys = hash_rows(requests, config.request_schema.keys.request).view(np.int64).tolist()
    found = {(key, i): s for key, row in zip(keys, scores["click"], strict=True) for i, s in enumerate(row)}
    assert found.keys() == expected.keys()
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), abs=1e-6)


def test_predict_scores_every_row_once(trained: tuple[Config, Manifest, TrainingResult], folder: Path) -> None:
    config, manifest, _ = trained
    done = predict(config, "product", f"{folder}/predicted", quiet)
    assert (done.requests, done.impressions) == (manifest.requests, manifest.impressions)
    table = pq.read_table(f"{folder}/predicted")
    assert table.column_names == ["request_id", "item_id", "score_click"]
    tracked = MlflowClient(config.tracking.uri).get_run(done.run.run_id)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["predict/impressions"] == manifest.impressions
    assert tracked.data.metrics["predict/impressions_per_second"] > 0
    assert tracked.data.tags["data_version"] == str(manifest.version)
    source = pa.concat_tables([pq.read_table(f"{config.requests}/{f.path}") for f in manifest.files])
    stored = {
        (request, item)
        for request, items in zip(source["request_id"].to_pylist(), source["item_id"].to_pylist(), strict=True)
        for item in items
    }
    rows = list(zip(table["request_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))
    assert len(rows) == len(set(rows)) == manifest.impressions
    assert set(rows) == stored
    scores = dict(zip(rows, table["score_click"].to_pylist(), strict=True))
    held_out = stored_requests(config, manifest)
    keys = hash_rows(held_out, config.request_schema.keys.request).view(np.int64).tolist()
    expected = worker_scores(config, folder)
    both = zip(keys, held_out["request_id"].to_pylist(), held_out["item_id"].to_pylist(), strict=True)
    pairs = [(scores[request, item], expected[key, i]) for key, request, items in both for i, item in enumerate(items)]
    assert [pair[0] for pair in pairs] == pytest.approx([pair[1] for pair in pairs], abs=1e-6)
    assert json.loads((folder / "predicted" / NOTE).read_text())["impressions"] == manifest.impressions
    with pytest.raises(ConfigError, match="exists and is not empty"):
        predict(config, "product", f"{folder}/predicted", quiet)


@pytest.mark.slow
def test_predict_from_and_to_an_object_store(
    trained: tuple[Config, Manifest, TrainingResult], bucket: Callable[[str], str], folder: Path
) -> None:
    """The same scores as from and to local files; the note comes last, and what fails leaves no file behind."""
    config, manifest, _ = trained
    remote, base = pafs.FileSystem.from_uri(bucket("sets/requests"))
    pafs.copy_files(config.requests, base, pafs.LocalFileSystem(), remote)
    stored = config.model_copy(update={"requests": bucket("sets/requests")})
    done = predict(stored, "product", bucket("scores/all"), quiet, actors=2)
    assert (done.requests, done.impressions) == (manifest.requests, manifest.impressions)
    names = sorted(item.base_name for item in remote.get_file_info(pafs.FileSelector("bucket/scores/all")))
    assert names == [NOTE, *(f"part-{number:05d}.parquet" for number in range(done.files))]
    found = pq.read_table("bucket/scores/all", filesystem=remote)
    local = predict(config, "product", f"{folder}/predicted-beside", quiet)
    assert found.equals(pq.read_table(local.output))
    with remote.open_input_stream(f"bucket/scores/all/{NOTE}") as stream:
        note = stream.read().decode()
    assert json.loads(note)["impressions"] == manifest.impressions
    assert "hunter2" not in note  # the keys of a URI are not kept
    with pytest.raises(ConfigError, match="s3://bucket/scores/all exists and is not empty"):
        predict(stored, "product", bucket("scores/all"), quiet)
    remote.delete_file(f"{base}/{manifest.files[-1].path}")
    with pytest.raises(DataError, match=Path(manifest.files[-1].path).name):
        predict(stored, "product", bucket("scores/half"), quiet)
    left = remote.get_file_info(pafs.FileSelector("bucket/scores/half", allow_not_found=True, recursive=True))
    assert [item.path for item in left if item.is_file] == []


def test_a_failed_prediction_leaves_nothing(
    trained: tuple[Config, Manifest, TrainingResult], folder: Path, tmp_path: Path
) -> None:
    config, manifest, result = trained
    exported = export_model(
        result.checkpoint, input_types(config.requests, manifest, config.request_schema), tmp_path / "model"
    )
    schema = (exported / "schema.yaml").read_text()
    (exported / "schema.yaml").write_text(schema.replace("user_age", "user_shoe_size"))
    with pytest.raises(DataError, match="user_shoe_size"):
        predict(config, str(exported), f"{tmp_path}/predicted", quiet)
    assert not list(tmp_path.glob("predicted*"))
    scorer = Scorer.load(tmp_path / "model")
    with pytest.raises(DataError, match="no column user_shoe_size"):
        scorer.score(stored_requests(config, manifest))
    with pytest.raises(DataError, match="exists already"):
        export_model(result.checkpoint, scorer.inputs, tmp_path / "model")
    (tmp_path / "model" / "weights.pt").unlink()
    with pytest.raises(DataError, match=r"weights\.pt is missing"):
        Scorer.load(tmp_path / "model")


@pytest.mark.slow
def test_a_model_against_its_beginnings_on_another_number_of_workers(
    trained: tuple[Config, Manifest, TrainingResult], bucket: Callable[[str], str], folder: Path
) -> None:
    """The figures are those of the training's own evaluation, whatever model and workers the config names; of the
    storage, an object store with options in its URI, only its own scores are removed."""
    config, _, result = trained
    early = min((folder / "runs/product").glob("epoch-0000-*"))
    other = small_config(folder, "training.workers=1", "model.dim=64")  # the checkpoint's model is what counts
    other = other.model_copy(update={"storage": bucket("runs")})
    remote, base = pafs.FileSystem.from_uri(other.storage)
    with remote.open_output_stream(f"{base}/others/epoch-0001/state.json") as stream:
        stream.write(b"{}")
    compared = compare_models(other, result.checkpoint, str(early), "against", "request", 200, quiet)
    found = {d.metric: d for d in compared.differences["click"]}
    assert found["ne"].first == pytest.approx(result.metrics["eval/click/ne"], rel=1e-5)
    assert found["auc"].first == pytest.approx(result.metrics["eval/click/auc"], rel=1e-5)
    assert found["gauc"].first == pytest.approx(result.metrics["eval/click/gauc"], rel=1e-5)
    assert found["ne"].low > 0
    assert compared.impressions == result.metrics["eval/impressions"]
    client = MlflowClient(config.tracking.uri)
    run = client.get_run(compared.run.run_id)
    assert run.data.metrics["compare/click/ne_difference_low"] == pytest.approx(found["ne"].low)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    [evaluated] = client.search_runs([experiment], "tags.`roo_ray.run` = 'evaluate/against-a'")
    for name in ("ne", "auc", "gauc", "calibration", "bayes_ne"):
        expected = pytest.approx(result.metrics[f"eval/click/{name}"], rel=1e-5)
        assert evaluated.data.metrics[f"eval/click/{name}"] == expected
    left = remote.get_file_info(pafs.FileSelector(base, recursive=True))
    assert [item.path for item in left if item.is_file] == ["bucket/runs/others/epoch-0001/state.json"]
