"""Both arms of the comparison of forms, run to their ends, and what MLflow holds of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.requests.manifest import load_manifest
from roo_ray.review.forms import FORMS, compare_forms, comparison_rows
from roo_ray.training.prepare import prepare
from tests.jobs.small import small_config


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_both_arms_end_in_one_comparison(local_ray: None, tmp_path: Path) -> None:
    options = ["training.workers=1", "ingest.reader=thread", "ingest.batch_impressions=32", "training.log_every=4"]
    options += ["training.epochs=1"]  # in a second one of so few requests, rounding grows without bound
    config = small_config(tmp_path, *options)
    manifest, _ = prepare(config, "build", lambda line: None)
    lines: list[str] = []
    compared = compare_forms(config, "forms", lines.append)

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    trained = client.search_runs([experiment], "tags.`roo_ray.job` = 'train'")
    [run] = client.search_runs([experiment], "tags.`roo_ray.job` = 'compare'")
    assert len(trained) == 4
    assert {one.info.status for one in [*trained, run]} == {"FINISHED"}
    assert {one.data.params["training.form"] for one in trained} == set(FORMS)
    metrics = run.data.metrics
    assert metrics.keys() == compared.metrics.keys()

    # the same requests and seeds: the same model, each request trained on once in each epoch
    for name in ("ne", "auc", "gauc"):
        pair = [metrics[f"same_data/{form}_click_{name}"] for form in FORMS]
        assert pair[0] == pytest.approx(pair[1], abs=5e-4)
    held_out = sum(file.impressions for file in manifest.files if file.day == manifest.days[-1])
    for form in FORMS:
        assert metrics[f"same_data/{form}_samples_seen"] == config.training.epochs * (manifest.impressions - held_out)

    # the same time: half of the request-level form's, and so a part of the samples
    limit = metrics["same_data/request_train_seconds"] / 2
    [time_limit] = {float(p) for one in trained if (p := one.data.params["training.max_seconds"]) != "None"}
    assert time_limit == pytest.approx(limit)
    for form in FORMS:
        seen, in_all = (metrics[f"{arm}/{form}_samples_seen"] for arm in ("same_time", "same_data"))
        assert 0 < seen < in_all
        rate = seen / metrics[f"same_time/{form}_train_seconds"]
        assert rate == pytest.approx(metrics[f"same_time/{form}_samples_per_second"])
        assert metrics[f"same_time/{form}_click_ne"] > 0
        assert 0 < metrics[f"same_time/{form}_click_auc"] < 1
    ratio = metrics["same_time/request_samples_seen"] / metrics["same_time/impression_samples_seen"]
    assert metrics["same_time/samples_ratio"] == pytest.approx(ratio)
    assert run.data.tags["compared.ran_out_of_data"] == "no"
    assert not any("ran out of data" in line for line in lines)
    assert metrics["data/disk_bytes_impression_level"] > metrics["data/disk_bytes_request_level"]
    assert metrics["data/dedup_ratio_all_to_all_bytes"] > 1

    [data_set] = [item.dataset for item in run.inputs.dataset_inputs]
    assert manifest.digest().startswith(data_set.digest)
    assert load_manifest(config.requests).version == 1
    pictures = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "review")}
    assert pictures == {"ne_over_samples.png", "ne_over_time.png", "samples_over_time.png"}
    assert len(comparison_rows(compared, "click")) == 15
