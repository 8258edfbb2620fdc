"""A whole run with a managed table: more items than rows, trained on two workers, scored by the exported model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from roo_ray.metrics.held_out import read_scores
from roo_ray.serving.export import export_model, input_types
from roo_ray.serving.scorer import Scorer
from roo_ray.sources.hashing import hash_rows
from roo_ray.training.launch import train
from roo_ray.training.prepare import prepare
from tests.jobs.small import ROOT, small_config
from tests.jobs.test_product import quiet, stored_requests, worker_scores

pytestmark = pytest.mark.slow


def test_a_run_with_fewer_rows_than_items(local_ray: None, tmp_path: Path) -> None:
    schema = (ROOT / "configs/schemas/synthetic.yaml").read_text()
    managed = schema.replace("item: {rows: 5000, dim: 32}", "item: {rows: 600, dim: 32, managed: true}")
    assert managed != schema
    (tmp_path / "schema.yaml").write_text(managed)
    config = small_config(
        tmp_path,
        f"schema={tmp_path}/schema.yaml",
        f"evaluation.scores={tmp_path}/scores",
        "model.embeddings.managed.every=4",
        "training.epochs=1",
    )
    manifest, _ = prepare(config, "build", quiet)
    result = train(config, "managed", quiet)
    metrics = MlflowClient(config.tracking.uri).get_run(result.run.run_id).data.metrics
    assert metrics["ids/item/rows_used"] == 599
    assert metrics["ids/item/evicted"] > 0
    assert read_scores(f"{tmp_path}/scores")[0].num_rows > 0

    assert result.checkpoint is not None
    inputs = input_types(config.requests, manifest, config.request_schema)
    exported = Scorer.load(export_model(result.checkpoint, inputs, tmp_path / "exported"))
    requests = stored_requests(config, manifest)
    scored = exported.score(requests)
    keys = hash_rows(requests, config.request_schema.keys.request).view(np.int64)
    of = np.repeat(keys, scored.num_impressions).tolist()
    places = np.concatenate([np.arange(count) for count in scored.num_impressions]).tolist()
    chances = (1 / (1 + np.exp(-scored.logits[:, 0].astype(np.float64)))).tolist()
    expected = worker_scores(config, tmp_path)
    found = dict(zip(zip(of, places, strict=True), chances, strict=True))
    assert found.keys() == expected.keys()
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), abs=1e-6)
