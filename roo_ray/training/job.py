"""What the driver hands to every worker, and what a run leaves behind. Plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from roo_ray.config import Config
from roo_ray.requests.lengths import MeanIds
from roo_ray.training.tracking import RunHandle

BEFORE_FILE = "roo_ray_before.json"
"""Beside a run's checkpoints: the metrics of the model that its training started from, on the new day."""


@dataclass(frozen=True)
class WorkerJob:
    """``mode``: train, or evaluate only. ``data_version`` / ``data_digest``: the data set's manifest.
    ``ids``: measured mean ids per request of each id feature. ``requests_per_step``, ``impressions_per_step``: mean
    B_RO and B_NRO of a step over all lanes. ``board``: a ProgressBoard. ``plan``: all that decides the order of
    training (``ingest.plan.plan_inputs``). ``checkpoint``: what an evaluation loads, or whose weights training starts
    from. ``day``: the one that is trained on, where that is a run of its own: its data is evaluated before.
    ``items``: the exported index that an evaluation of retrieval looks in. ``sign``: a file in the run's folder that
    the driver has written, which all ranks are to see."""

    mode: Literal["train", "evaluate"]
    config: Config
    data_version: int
    data_digest: str
    ids: MeanIds
    requests_per_step: float
    impressions_per_step: float
    run: RunHandle
    board: Any
    plan: dict[str, Any]
    checkpoint: str | None = None
    day: str | None = None
    items: str | None = None
    sign: str | None = None
