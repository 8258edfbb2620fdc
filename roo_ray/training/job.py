"""What the driver hands to every worker, and what a run leaves behind. Plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from roo_ray.config import Config
from roo_ray.training.tracking import RunHandle


@dataclass(frozen=True)
class WorkerJob:
    """``mode``: train, or evaluate only. ``data_version`` / ``data_digest``: the data set's manifest.
    ``ids_per_request``: measured mean ids per request by lookup feature. ``requests_per_step``: mean B_RO of
    a step over all lanes. ``board``: a ProgressBoard. ``plan``: all that decides the order of training
    (``ingest.plan.plan_inputs``). ``checkpoint``: what an evaluation loads."""

    mode: Literal["train", "evaluate"]
    config: Config
    data_version: int
    data_digest: str
    ids_per_request: dict[str, float]
    requests_per_step: float
    run: RunHandle
    board: Any
    plan: dict[str, Any]
    checkpoint: str | None = None
