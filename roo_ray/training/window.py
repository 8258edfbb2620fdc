"""What a rank measures from one line of the log to the next, and the line."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
import torch.distributed as dist

from roo_ray.config import Config
from roo_ray.metrics.collection import RankingMetrics
from roo_ray.training.order import OrderStats
from roo_ray.training.quality import Quality
from roo_ray.training.throughput import Throughput
from roo_ray.training.timing import StepTimes
from roo_ray.training.tracking import RunLogger

TOTALS = ("impressions", "seconds")
"""Of the windows, as ``train/...``; their sums since the run began are logged as ``train_lifetime/...``."""


class Window:
    """The metrics, losses, throughput, order and times of some steps."""

    def __init__(self, tasks: list[str], device: torch.device) -> None:
        self.device = device
        self.metrics, self.losses = RankingMetrics(tasks), list[tuple[int, torch.Tensor]]()
        self.throughput, self.order, self.times = Throughput(), OrderStats(), StepTimes(device)

    def over_ranks(
        self, quality: Quality, step: int, interleaved: bool
    ) -> tuple[list[tuple[int, float]], dict[str, float]]:
        """(step, loss of the global batch) of each step, and the metrics under their names (collective; at least one
        step). What was measured, up to ``step``, is added to ``quality``."""
        curve = torch.stack([loss for _, loss in self.losses]).double()  # (steps,)
        dist.all_reduce(curve)
        values = quality.add(self.metrics.merge(), step)
        values |= self.throughput.over_ranks(self.device, "train")
        values |= self.order.over_ranks(self.device, "train", interleaved)
        values |= self.times.over_ranks(self.device)
        return [(step, loss) for (step, _), loss in zip(self.losses, curve.tolist(), strict=True)], values


class WindowLog:
    """Logs the windows of a run: to MLflow, and a line each to the terminal. ``totals``: sums over the run's windows,
    which its checkpoints hold. MLflow's windows cannot be summed: where steps were taken again after a kill, they end
    elsewhere and overlap, because a checkpoint ends one whenever it is begun."""

    def __init__(self, config: Config, logger: RunLogger, say: Callable[[str], None]) -> None:
        self.config, self.logger, self.say = config, logger, say
        self.tasks = [label.name for label in config.request_schema.labels]
        self.quality = Quality(self.tasks, config.training.log_every)
        self.totals = dict.fromkeys(TOTALS, 0.0)

    def lifetime(self) -> dict[str, float]:
        """The totals under the names of their metrics."""
        return {f"train_lifetime/{name}": total for name, total in self.totals.items()}

    def log(self, window: Window, epoch: int, step: int) -> None:
        """Logs the window that ends at ``step``, over all ranks (collective); nothing where no batch of it was trained
        on."""
        if not window.losses:
            return
        losses, values = window.over_ranks(self.quality, step, self.config.ingest.interleave is not None)
        for name in self.totals:
            self.totals[name] += values[f"train/{name}"]
        values |= self.lifetime()
        for of, loss in losses:
            self.logger.metrics({"train/loss": loss}, of)
        self.logger.metrics(values, step)
        task = self.tasks[0]
        self.say(
            f"epoch {epoch + 1}/{self.config.training.epochs}  step {step}  "
            f"loss {fmean(loss for _, loss in losses):.4f}  {task} NE {values[f'train/{task}/ne']:.4f}  "
            f"{values['train/requests_per_second']:,.0f} requests/s  "
            f"{values['train/impressions_per_second']:,.0f} impressions/s  "
            f"data wait {values['train/data_wait_share']:.1%}"
        )
