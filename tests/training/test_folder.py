"""A run's folder: whether weights fit a config, whether a run has begun, and what of it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from roo_ray.config import Config
from roo_ray.errors import ConfigError, DataError
from roo_ray.training.checkpoint import STATE_FILE, RunState
from roo_ray.training.folder import (
    PLAN_FILE,
    find_checkpoint,
    has_begun,
    read_json,
    refuse_another_run,
    refuse_other_weights,
    save_json,
)
from tests.jobs.small import small_config


def checkpoint_of(config: Config, folder: Path) -> str:
    folder.mkdir()
    state = RunState(
        epoch=1, step=7, schema_yaml=config.request_schema.to_yaml(), model=config.model, data_version=1,
        data_digest="d", plan={},
    )  # fmt: skip
    (folder / STATE_FILE).write_text(json.dumps(state.model_dump(mode="json")))
    return str(folder)


def with_feature(config: Config, index: int, **update: Any) -> Config:
    features = list(config.request_schema.features)
    features[index] = features[index].model_copy(update=update)
    return config.model_copy(update={"request_schema": config.request_schema.model_copy(update={"features": features})})


def test_weights_of_another_model_are_refused_with_the_difference(tmp_path: Path) -> None:
    """Layers that are not there, and heads of which the tensors know nothing, would load without a word."""
    config = small_config(tmp_path)
    weights = checkpoint_of(config, tmp_path / "c")
    refuse_other_weights(config, weights)
    refuse_other_weights(small_config(tmp_path, "model.dropout=0.2", "training.dense_lr=0.5"), weights)
    refuse_other_weights(small_config(tmp_path, "model.embeddings.pooled=[topic]"), weights)
    for option, words in (
        ("model.layers=1", "model.layers was 2 and is 1"),
        ("model.heads=4", "model.heads was 2 and is 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            refuse_other_weights(small_config(tmp_path, option), weights)
    names = [f.name for f in config.request_schema.features]
    with pytest.raises(ConfigError, match=f"feature '{names[0]}' was .* and is "):
        refuse_other_weights(with_feature(config, 0, scale="log1p"), weights)
    with pytest.raises(ConfigError, match=f"feature '{names[0]}' was .* and is gone; .*feature 'other' is new and is"):
        refuse_other_weights(with_feature(config, 0, name="other"), weights)
    table, *_ = config.request_schema.tables
    larger = {**config.request_schema.tables}
    larger[table] = larger[table].model_copy(update={"rows": larger[table].rows + 1})
    schema = config.request_schema.model_copy(update={"tables": larger})
    with pytest.raises(ConfigError, match=f"table '{table}' was "):
        refuse_other_weights(config.model_copy(update={"request_schema": schema}), weights)
    (tmp_path / "c" / STATE_FILE).unlink()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        refuse_other_weights(config, weights)


def test_files_of_a_run_are_whole_or_named(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert not has_begun(config, "a")
    assert read_json(config, "a", PLAN_FILE) is None
    save_json(config, "a", PLAN_FILE, {"seed": 1})
    assert has_begun(config, "a")
    assert read_json(config, "a", PLAN_FILE) == {"seed": 1}
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == [PLAN_FILE]
    (tmp_path / "runs" / "a" / PLAN_FILE).write_text('{"seed"')
    with pytest.raises(DataError, match=r"roo_ray_plan.json is damaged: .*move the folder of run 'a' away"):
        refuse_another_run(config, "a", {})
    with pytest.raises(ConfigError, match="neither a finished run"):
        find_checkpoint(config, "a")
