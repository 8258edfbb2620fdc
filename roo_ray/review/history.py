"""Curves of a run, from the metrics it has logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlflow.tracking import MlflowClient

# The parts of a step by the metric that holds their milliseconds, where the worker logs the split.
STEP_PARTS = "step/"
NO_PARTS = {"step/total_ms", "step/host_to_device_ms"}  # the sum; beside the step before
FORMS = ("request", "impression")


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
    """The windows of a training run, in order of steps."""
    window = _by_step(client, run_id, f"train/{task}/ne")
    lifetime = _by_step(client, run_id, f"train_lifetime/{task}/ne")
    impressions = _by_step(client, run_id, "train/impressions")
    seconds = _by_step(client, run_id, "train/seconds")
    points = []
    seen = passed = 0.0
    for step in sorted(impressions):
        seen, passed = seen + impressions[step], passed + seconds.get(step, 0.0)
        if step in window and step in lifetime:
            points.append(Point(step, seen, passed, window[step], lifetime[step]))
    return points


def baseline_run(client: MlflowClient, run: Any) -> tuple[str, str] | None:
    """(its form, its id) of the newest finished training on the same data in the other form, where there is one."""
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
    found = client.search_runs([run.info.experiment_id], query, max_results=1, order_by=order)
    return (f"{other}-level ({found[0].info.run_name})", found[0].info.run_id) if found else None


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
    steps = max(seconds, default=0)
    if not steps:
        return {}
    waited = sum(share.get(step, 0.0) * value for step, value in seconds.items())
    rest = sum(seconds.values()) - waited
    return {"waiting for data": 1000 * waited / steps, "computing and communicating": 1000 * rest / steps}
