"""The expected number of steps against that of the stream itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.config import Config, load_config
from roo_ray.ingest.budget import batch_bounds
from roo_ray.ingest.expected import expected_batches, expected_steps, mean_cost
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.schema import parse_schema
from tests.ingest import shard_maker
from tests.ingest.shard_maker import random_rows, write_data_set

COST = (1.0, 0.5, 0.01, 2.0, 0.1)
TWO_SEQUENCES = """
name: two
keys: {request: r, user: u, time: t, impression: i}
tables: {item: {rows: 9, dim: 8}}
features:
  - {name: long, level: request, kind: sequence, max_length: 50, sequence: [{column: a, table: item}]}
  - {name: short, level: request, kind: sequence, max_length: 4, sequence: [{column: b, table: item}]}
  - {name: item, level: impression, kind: ids, columns: i, table: item}
labels: [{name: click, column: c}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Requests of 1 to 12 impressions on three days, in row groups of 20."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "schema.yaml").write_text(shard_maker.schema().to_yaml())
    counts = np.random.default_rng(5).integers(1, 13, 1500).tolist()
    write_data_set(
        folder / "requests", random_rows(counts, 3, days=3), shard_maker.schema(), row_group=20, file_rows=100
    )
    return folder, load_manifest(str(folder / "requests"))


def config_of(folder: Path, **ingest: object) -> Config:
    content = {"name": "x", "schema": f"{folder}/schema.yaml", "requests": f"{folder}/requests"}
    holdout = {"by": "request", "fraction": 0.2} if ingest.pop("by_request", False) else {"by": "day"}
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            content | {"ingest": {"reader": "thread"} | ingest, "holdout": holdout, "training": {"workers": 1}}
        )
    )
    return load_config(folder / "config.yaml")


def true_steps(config: Config, manifest: Manifest) -> int:
    """Steps of the stream's first epoch until no lane is alive, or one is not with ``drop_last``."""
    how = StreamSettings(
        config.requests,
        manifest.version,
        config.request_schema,
        config.ingest,
        config.holdout,
        "train",
        config.training.seed,
        (0,),
        "shuffled",
        cost=COST,
    )
    stream = RankStream(how, 0, 1)
    least = config.ingest.lanes if config.ingest.drop_last else 1
    for number, step in enumerate(stream.epoch(0)):
        if step.lanes_alive < least:
            stream.close()
            return number
    raise AssertionError("an epoch ends")


@pytest.mark.parametrize(
    "ingest",
    [
        {"batch_impressions": 40, "lanes": 4},
        {"batch_impressions": 40, "lanes": 4, "window_units": 1},  # windows of a few batches: most end part-full
        {"batch_impressions": 400, "lanes": 4, "window_units": 1},  # a batch a window
        {"batch_impressions": 64, "lanes": 6, "drop_last": True},
        {"batch_impressions": 64, "lanes": 5, "by_request": True},
        {"batch_impressions": None, "batch_cost": 300.0, "lanes": 4},
        {"batch_impressions": 50, "batch_cost": 400.0, "lanes": 3},
        {"batch_impressions": 5, "lanes": 3},  # many requests are above it
    ],
    ids=str,
)
def test_steps_are_close_to_those_of_the_stream(made: tuple[Path, Manifest], ingest: dict[str, object]) -> None:
    folder, manifest = made
    config = config_of(folder, **ingest)
    true, expected = true_steps(config, manifest), expected_steps(config, manifest, COST)
    assert expected == pytest.approx(true, rel=0.08, abs=1.0)


def test_sequences_cost_by_their_shares() -> None:
    """By hand: 20 events of which a sequence keeps 12 and another one 5, cut to 4; without shares 10 and 4."""
    schema = parse_schema(TWO_SEQUENCES)
    given = np.array([[3.0]]), np.array([[20.0]])
    shares = {"long": 0.6, "short": 0.25}
    assert mean_cost(schema, COST, *given, shares) == pytest.approx(1 + 8 + 0.01 * (144 + 16) + 6 + 0.1 * 3 * 16)
    assert mean_cost(schema, COST, *given) == pytest.approx(1 + 7 + 0.01 * (100 + 16) + 6 + 0.1 * 3 * 14)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=400),
    st.integers(20, 400),
)
def test_batches_of_a_window(sizes: list[int], budget: int) -> None:
    """Never fewer than the budget allows, and near to what packing gives."""
    counts = np.array(sizes, np.int64)
    packed = len(batch_bounds([(counts, budget)], len(counts))) - 1
    (expected,) = expected_batches(np.array([float(len(counts))]), np.array([counts.mean()]), budget)
    assert expected >= np.floor(counts.sum() / budget)
    assert expected == pytest.approx(packed, rel=0.35, abs=2)
