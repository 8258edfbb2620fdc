"""Configs are typed: unknown keys, wrong values and contradictions are named, one line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roo_ray.config import load_config
from roo_ray.errors import ConfigError
from roo_ray.source_config import home, resolve_path

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.request_schema.labels
    assert Path(config.requests).is_absolute()


def test_overrides_reach_sections_and_are_validated() -> None:
    config = load_config(ROOT / "configs/demo.yaml", ["training.epochs=7", "source.requests=10", "run_name=x"])
    assert (config.training.epochs, config.source.requests, config.run_name) == (7, 10, "x")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"training\.epoch: unknown key"):
        load_config(ROOT / "configs/demo.yaml", ["training.epoch=7"])
    with pytest.raises(ConfigError, match=r"training\.epochs: .*greater than 0"):
        load_config(ROOT / "configs/demo.yaml", ["training.epochs=0"])
    with pytest.raises(ConfigError, match=r"ray\.wait_for_workers_s: .*greater than or equal to 120"):
        load_config(ROOT / "configs/demo.yaml", ["ray.wait_for_workers_s=10"])
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(ROOT / "configs/demo.yaml", ["epochs"])
    with pytest.raises(ConfigError, match="dim 32 must be a multiple of heads 5"):
        load_config(ROOT / "configs/demo.yaml", ["model.heads=5"])


@pytest.mark.parametrize("name", ["it's", "a/b", "models:x", 'a"b', " "])
def test_a_model_is_registered_under_a_name_that_the_registry_takes(name: str) -> None:
    """A quote would break what MLflow is asked for when the run is already done."""
    demo = ROOT / "configs/demo.yaml"
    assert load_config(demo, ["serving.register_as=main.models.clicks v2"]).serving.register_as
    with pytest.raises(ConfigError, match=r"serving.register_as: '.*' is no name of a registered model"):
        load_config(demo, [f"serving.register_as={json.dumps(name)}"])


def test_names_of_runs_are_plain() -> None:
    """They are folders, and stand in quotes in what MLflow is asked."""
    demo = ROOT / "configs/demo.yaml"
    for name in ("ranking-1", "daily.v2_a-2024-01-01", "7x"):
        assert load_config(demo, [f"run_name={name}", f"name={name}"]).run_name == name
    for key in ("run_name", "name"):
        for name in ("it's", "a b", "a/b", "../runs", ".hidden", "-x", "", "a\n", "a?b=c"):
            with pytest.raises(
                ConfigError, match=rf"\n  {key}: '[^']*('s|\n)?' names a folder.*letters, digits, '-', '_'"
            ):
                load_config(demo, [f"{key}={json.dumps(name)}"])


def test_what_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'training.epochs=\[': '\[' is not a YAML value"):
        load_config(ROOT / "configs/demo.yaml", ["training.epochs=["])
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: \xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_more_workers_than_lanes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"workers 5 is more than ingest\.lanes 4"):
        load_config(ROOT / "configs/demo.yaml", ["training.workers=5"])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config file not found: nowhere\.yaml"):
        load_config("nowhere.yaml")
    config = tmp_path / "c.yaml"
    config.write_text("name: x\nschema: missing.yaml\nrequests: r\n")
    with pytest.raises(ConfigError, match=r"schema file not found: .*missing\.yaml"):
        load_config(config)


def test_relative_paths_are_taken_from_home() -> None:
    assert resolve_path("a/b") == str(home() / "a/b")
    assert resolve_path("s3://bucket/a") == "s3://bucket/a"
    assert resolve_path("/x/y") == "/x/y"
