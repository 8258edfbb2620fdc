"""Curves of a run, from the metrics it has logged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlflow.tracking import MlflowClient

# The parts of a step by the metric that holds their milliseconds, where the worker logs the split.
STEP_PARTS = "step/"
NO_PARTS = {"step/total_ms", "step/host_to_device_ms"}  # the sum; beside the step before
FORMS = ("request", "impression")
LOOKED_AT = 200  # newest runs
_TRAINING = ("seed", "embedding_lr", "dense_lr", "autocast", "max_seconds")
_INGEST = ("mode", "lanes", "window_units", "batch_impressions", "batch_cost")
SAME = {*(f"training.{name}" for name in _TRAINING), *(f"ingest.{name}" for name in _INGEST)}
"""Parameters, beside the model's, in which two runs must be equal for their curves to be laid over each other."""


@dataclass(frozen=True)
class Point:
    """A window's end: ``step``; samples (``impressions``) and ``seconds`` in training since the run began;
    the window's and the lifetime's NE."""

    step: int
    impressions: float
    seconds: float
    window_ne: float
    lifetime_ne: float


def _by_step(client: MlflowClient, run_id: str, name: str) -> dict[int, float]:
    return {point.step: point.value for point in client.get_metric_history(run_id, name)}


def cumulative(client: MlflowClient, run_id: str, task: str) -> list[Point]:
    """The windows of a training run, in order of steps; empty for a run that has not logged totals.

    A part that was trained on again after a kill has lines of before it, too, whose times are of another attempt: none
    counts for more than a later line does.
    """
    window = _by_step(client, run_id, f"train/{task}/ne")
    lifetime = _by_step(client, run_id, f"train_lifetime/{task}/ne")
    impressions = _by_step(client, run_id, "train_lifetime/impressions")
    seconds = _by_step(client, run_id, "train_lifetime/seconds")
    points = []
    seen = passed = math.inf
    for step in sorted(window.keys() & lifetime.keys() & impressions.keys() & seconds.keys(), reverse=True):
        seen, passed = min(seen, impressions[step]), min(passed, seconds[step])
        points.append(Point(step, seen, passed, window[step], lifetime[step]))
    return points[::-1]


def baseline_run(client: MlflowClient, run: Any) -> tuple[str, str] | None:
    """(its form, its id) of the newest finished training in the other form where there is one: on the same data, of the
    same model, seed, rates and budgets (``SAME``)."""
    form = run.data.params.get("training.form")
    digest = run.data.tags.get("data_digest")
    if form not in FORMS or digest is None:
        return None
    other = FORMS[1 - FORMS.index(form)]
    query = (
        f"tags.data_digest = '{digest}' and tags.`roo_ray.job` = 'train' and params.`training.form` = '{other}' "
        "and attributes.status = 'FINISHED'"
    )
    order = ["attributes.start_time DESC"]
    mine = _compared(run)
    for found in client.search_runs([run.info.experiment_id], query, max_results=LOOKED_AT, order_by=order):
        if _compared(found) == mine:
            return f"{other}-level ({found.info.run_name})", found.info.run_id
    return None


def _compared(run: Any) -> dict[str, str]:
    return {name: value for name, value in run.data.params.items() if name.startswith("model.") or name in SAME}


def step_milliseconds(client: MlflowClient, run: Any) -> dict[str, float]:
    """Part of a step -> mean milliseconds: those logged as ``step/<part>_ms``, else the wait for data (or the
    rest) from the totals. Empty where nothing is known."""
    means = {}
    for name in run.data.metrics:
        if name.startswith(STEP_PARTS) and name.endswith("_ms") and name not in NO_PARTS:
            values = list(_by_step(client, run.info.run_id, name).values())
            means[name.removeprefix(STEP_PARTS).removesuffix("_ms").replace("_", " ")] = sum(values) / len(values)
    if means:
        return means
    share = _by_step(client, run.info.run_id, "train/data_wait_share")
    seconds = _by_step(client, run.info.run_id, "train/seconds")
    total = _by_step(client, run.info.run_id, "train_lifetime/seconds")
    if not total or not seconds:
        return {}
    steps = max(total)
    waited = sum(share.get(step, 0.0) * value for step, value in seconds.items()) / sum(seconds.values())
    parts = {"waiting for data": waited, "computing and communicating": 1 - waited}
    return {name: 1000 * part * total[steps] / steps for name, part in parts.items()}
