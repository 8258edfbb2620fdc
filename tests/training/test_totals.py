"""What a run has been trained on, and for how long, as MLflow tells it where windows overlap after a kill (gloo)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import ray
from mlflow import MlflowClient

from roo_ray.config import load_config
from roo_ray.errors import Evicted
from roo_ray.ingest.plan import plan_inputs
from roo_ray.ingest.stream import RankStream
from roo_ray.requests.manifest import load_manifest
from roo_ray.review.forms import SAMPLES, SECONDS
from roo_ray.review.history import cumulative
from roo_ray.training import checkpoint, entry
from roo_ray.training.tracking import RunHandle, open_run
from tests.training.ranks import run_ranks
from tests.training.test_going_on import WORLD, EvictedAfter, a_worker, write_small_run

EVERY = 5
ENDS = [("evicted", 8), ("killed", 12), ("evicted", 9)]  # all in the second of epochs of six steps


class KilledAt(EvictedAfter):
    """As a worker that is gone amid a step."""

    def is_set(self) -> bool:
        if super().is_set():
            raise ConnectionError("a worker is gone")
        return False


def _run(rank: int, path: str, run: RunHandle, folder: str, ends: list[tuple[str, int]]) -> dict[str, Any]:
    """A whole run, of an attempt for each of ``ends`` (how it is cut short) and a last one: what it was trained on by
    its last report."""
    config = load_config(path)
    schema, ingest = config.request_schema, config.ingest
    manifest = load_manifest(config.requests)
    plan = plan_inputs(manifest, schema, ingest, config.holdout, "train", 0, "shuffled", (1.0,) * 5)
    reports: list[tuple[str, dict[str, Any]]] = []
    ray.train.report = lambda metrics, checkpoint, **how: reports.append((checkpoint.path, metrics))  # type: ignore[assignment]

    def attempt(end: tuple[str, int] | None) -> None:
        one = a_worker(rank, config, run, folder, plan)
        streams, stream = list[RankStream](), one.stream

        def opened(*of: Any) -> RankStream:
            streams.append(stream(*of))
            return streams[-1]

        one.stream = opened  # type: ignore[method-assign,assignment]
        found = ray.train.Checkpoint(reports[-1][0], filesystem=pafs.LocalFileSystem()) if reports else None
        if end is None:
            entry.train(one, found)
        else:
            kind, error = {"evicted": (EvictedAfter, Evicted), "killed": (KilledAt, ConnectionError)}[end[0]]
            one.evicted = kind(one, end[1])
            with pytest.raises(error):
                entry.train(one, found)
        for each in streams:
            each.close()
        one.logger.close()

    for end in [*ends, None]:
        attempt(end)
    return {"metrics": reports[-1][1], "state": checkpoint.read_state(reports[-1][0]).totals}


def _both(rank: int, world: int, path: str, runs: dict[str, RunHandle], folder: str) -> dict[str, dict[str, Any]]:
    return {
        name: _run(rank, path, run, f"{folder}/{name}", ENDS if name == "killed" else []) for name, run in runs.items()
    }


def test_overlapping_windows_count_once(tmp_path: Path) -> None:
    """A line for every five steps. MLflow has one of steps 9 and 10, of before the kill, and one of step 9 alone, of a
    checkpoint that was begun there when it was taken again."""
    write_small_run(tmp_path, log_every=EVERY, epochs=3)
    config = load_config(tmp_path / "config.yaml")
    runs = {name: open_run(config.tracking, "train", name, 1) for name in ("plain", "killed")}
    found = run_ranks(WORLD, _both, str(tmp_path / "config.yaml"), runs, str(tmp_path))[0]
    client = MlflowClient(config.tracking.uri)
    curves = {name: cumulative(client, run.run_id, "click") for name, run in runs.items()}
    plain, killed = curves["plain"], curves["killed"]
    assert {point.step for point in killed} - {point.step for point in plain} == {8, 9}
    assert {point.step for point in plain} <= {point.step for point in killed}
    expected = {point.step: point.impressions for point in plain}
    assert {point.step: point.impressions for point in killed if point.step in expected} == expected
    for points in (plain, killed):
        assert all(a.impressions < b.impressions for a, b in pairwise(points))
        assert all(a.seconds <= b.seconds for a, b in pairwise(points))
    windows = {
        name: sum(point.value for point in client.get_metric_history(run.run_id, "train/impressions"))
        for name, run in runs.items()
    }
    assert windows["killed"] > windows["plain"] == expected[max(expected)]  # they do overlap
    for name, of in found.items():
        last = curves[name][-1]
        assert (last.impressions, last.seconds) == (of["metrics"][SAMPLES], of["metrics"][SECONDS])
        assert of["state"] == {"impressions": last.impressions, "seconds": last.seconds}
    assert windows["plain"] == found["killed"]["metrics"][SAMPLES]
