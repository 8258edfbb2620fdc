"""Two models on one set of scores: which tasks can be compared, and what becomes of the scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from roo_ray.config import Config
from roo_ray.errors import ConfigError, DataError
from roo_ray.metrics.held_out import SCORES_FILE
from roo_ray.review import evaluation
from roo_ray.review.evaluation import compare_models, differences_of, paired, scratch_folder
from tests.jobs.small import small_config


def _scores(shift: float, labels: dict[str, list[float | None]]) -> pa.Table:
    rows = len(next(iter(labels.values())))
    logits = np.linspace(-1, 1, rows) + shift * np.arange(rows) % 0.7
    table = {"request_key": np.arange(rows) // 2, "user_key": np.arange(rows) // 4, "impression_index": np.arange(rows)}
    columns = {name: pa.array(values) for name, values in table.items()}
    for task, values in labels.items():
        columns |= {f"logit_{task}": pa.array(logits), f"label_{task}": pa.array(values, pa.float32())}
    return pa.table(columns)


def test_a_task_without_known_labels_is_said_and_the_others_are_compared() -> None:
    """Conversions that come later: all unknown, or known of one request alone."""
    clicks: list[float | None] = [float(i % 3 == 0) for i in range(40)]
    labels = {"buy": [None] * 40, "click": clicks, "order": [0.0, 1.0, *[None] * 38]}
    first, second = (_scores(shift, labels) for shift in (0.0, 0.3))
    rows = {task: paired(first, second, task, "request") for task in labels}
    said: list[str] = []
    found = differences_of(rows, 20, 0, said.append)
    assert list(found) == ["click"]
    assert {d.metric for d in found["click"]} == {"ne", "log_loss", "auc", "gauc"}
    assert [line.split(":")[0] for line in said] == [
        "task 'buy' has 0 known labels in the held-out data",
        "task 'order' has 2 known labels in the held-out data",
    ]
    with pytest.raises(DataError, match="no task has known labels"):
        differences_of({"buy": rows["buy"]}, 20, 0, said.append)


def test_a_comparison_removes_its_own_scores_and_nothing_else(
    bucket: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a storage whose URI ends with options."""
    config = small_config(tmp_path, "tracking.enabled=false").model_copy(update={"storage": bucket("runs")})
    remote, _ = pafs.FileSystem.from_uri(config.storage)
    with remote.open_output_stream("bucket/runs/others/epoch-0001/state.json") as stream:
        stream.write(b"{}")

    def files() -> list[str]:
        """Of all tests: the server's buckets are the process's."""
        found = remote.get_file_info(pafs.FileSelector("bucket", recursive=True))
        return [item.path for item in found if item.is_file]

    before = files()
    assert "bucket/runs/others/epoch-0001/state.json" in before
    written: list[str] = []

    def evaluate(config: Config, checkpoint: str, *args: Any, **more: Any) -> None:
        assert config.evaluation.scores is not None
        _, folder = pafs.FileSystem.from_uri(config.evaluation.scores)
        table = _scores(0.3 * (checkpoint == "new"), {"click": [float(i % 3 == 0) for i in range(40)]})
        with remote.open_output_stream(f"{folder}/part-00000.parquet") as stream:
            pq.write_table(table, stream)
        with remote.open_output_stream(f"{folder}/{SCORES_FILE}") as stream:
            stream.write(json.dumps({"ranks": 1, "rows": 40, "tasks": ["click"]}).encode())
        written.append(folder)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation.session, "alive_nodes", lambda: 1)
    compared = compare_models(config, "old", "new", "against", "request", 20, lambda line: None)
    assert written == ["bucket/runs/against-scores/0", "bucket/runs/against-scores/1"]
    assert compared.impressions == 40
    assert files() == before


@pytest.mark.parametrize("place", ["runs", "runs/", ".", "runs/../runs"])
def test_a_scratch_folder_that_holds_the_storage_is_refused(place: str, tmp_path: Path) -> None:
    kept = tmp_path / "runs/mine"
    kept.mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match="would be removed with the storage in it"),
        scratch_folder(f"{tmp_path}/{place}", f"{tmp_path}/runs"),
    ):
        pass
    assert kept.is_dir()
    with scratch_folder(f"{tmp_path}/runs-scores", f"{tmp_path}/runs"):  # of another name, though it begins alike
        pass
