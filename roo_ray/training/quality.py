"""How good the model is in training, each batch scored before it is trained on: lately, and since the run began."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from roo_ray.metrics.collection import RankingMetrics


class Quality:
    """Metrics over all ranks, the same on every one: of the whole run, and of its last steps, the window.

    At a step that ``every`` divides, the window is the last ``every`` steps, whatever epochs they are of. Elsewhere,
    where an epoch ends or a checkpoint is due, it is the steps since such a step and the ``every`` before that: an
    epoch's last few steps alone would make the curve jump. Only the first windows of a run are shorter.
    """

    def __init__(self, tasks: list[str], every: int) -> None:
        self.tasks, self.every = tasks, every
        self.lifetime = RankingMetrics(tasks)
        self._before, self._since = RankingMetrics(tasks), RankingMetrics(tasks)  # a step that ``every`` divides

    def add(self, merged: RankingMetrics, step: int) -> dict[str, float]:
        """Adds what was measured, over all ranks, up to ``step``; the metrics under their names."""
        self.lifetime.add(merged)
        self._since.add(merged)
        window = RankingMetrics(self.tasks)
        window.add(self._since)
        if step % self.every:
            window.add(self._before)
        else:
            self._before, self._since = self._since, RankingMetrics(self.tasks)
        values = {f"train/{name}": value for name, value in window.compute().items()}
        return values | {f"train_lifetime/{name}": value for name, value in self.lifetime.compute().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it."""
        window = torch.stack([self._before.state_tensor(), self._since.state_tensor()])
        return {"lifetime": self.lifetime.state_tensor().cpu(), "window": window.cpu()}

    def go_on(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes on from those of ``tensors`` that are there."""
        if "lifetime" in tensors:
            self.lifetime.load_state_tensor(tensors["lifetime"])
        if "window" in tensors:
            for part, state in zip((self._before, self._since), tensors["window"], strict=True):
                part.load_state_tensor(state)
