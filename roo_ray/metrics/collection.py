"""All ranking metrics of a model's tasks in one additive state.

The same result on any number of ranks and for any cut into batches of whole requests, to float64 rounding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from roo_ray.metrics import auc, calibration, gauc, normalized_entropy
from roo_ray.metrics.normalized_entropy import COUNT


class RankingMetrics:
    """NE, log loss, AUC, GAUC by request and calibration of K tasks. States live on ``device``."""

    def __init__(self, tasks: list[str], device: torch.device | str = "cpu") -> None:
        self.tasks = tasks
        self.device = torch.device(device)
        count = len(tasks)
        self.entropy = normalized_entropy.empty_state(count).to(self.device)  # (4, K)
        self.grouped = gauc.empty_state(count).to(self.device)  # (4, K)
        self.histogram = auc.empty_histogram(count).to(self.device)  # (2, K, bins)
        self.reliability = calibration.empty_reliability(count).to(self.device)  # (3, K, bins)

    @property
    def _states(self) -> list[Tensor]:
        return [self.entropy, self.grouped, self.histogram, self.reliability]

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor, num_impressions: Tensor) -> None:
        """Adds a batch: logits, labels, weights (B_NRO, K), num_impressions (B_RO,) int64.

        A weight above 0 means that the label is known; dummy rows have weight 0 and are not seen.
        Raises FloatingPointError, naming the task, where a known impression's logit is NaN.
        """
        logits = logits.detach().to(self.device).float()
        labels = labels.to(self.device)
        known = (weights > 0).to(self.device, torch.float32)
        num_impressions = num_impressions.to(self.device)
        wrong = (logits.isnan() & (known > 0)).sum(0)  # (K,)
        if wrong.any():
            task = int(wrong.argmax())
            raise FloatingPointError(
                f"task '{self.tasks[task]}': {int(wrong[task])} of {len(logits)} logits of a batch are NaN"
            )
        self.entropy += normalized_entropy.batch_state(logits, labels, known)
        self.grouped += gauc.batch_state(logits, labels, known, num_impressions)
        auc.add_to_histogram(self.histogram, logits, labels, known)
        self.reliability += calibration.batch_reliability(logits, labels, known)

    def state(self) -> Tensor:
        """The whole state, one flat float64 tensor; states add."""
        return torch.cat([part.flatten() for part in self._states])

    def load_state(self, state: Tensor) -> None:
        """Takes a state made by ``state`` (of the same tasks)."""
        start = 0
        for part in self._states:
            part.copy_(state[start : start + part.numel()].view_as(part))
            start += part.numel()

    def merge(self) -> RankingMetrics:
        """The metrics over all ranks (collective where torch.distributed runs); this object is not changed."""
        state = self.state()
        if dist.is_initialized() and dist.get_world_size() > 1:
            if dist.get_backend() == "nccl":
                state = state.cuda()
            dist.all_reduce(state)
        merged = RankingMetrics(self.tasks, self.device)
        merged.load_state(state.to(self.device))
        return merged

    def compute(self) -> dict[str, float]:
        """``<task>/ne``, ``/log_loss``, ``/auc``, ``/gauc``, ``/calibration``, ``/base_rate``,
        ``/impressions``, ``/gauc_requests``, ``/gauc_skipped``; NaN where a figure is not defined."""
        values = {
            "ne": normalized_entropy.normalized_entropy(self.entropy),
            "log_loss": normalized_entropy.log_loss(self.entropy),
            "auc": auc.histogram_auc(self.histogram),
            "gauc": gauc.gauc(self.grouped),
            "calibration": calibration.calibration(self.entropy),
            "base_rate": normalized_entropy.base_rate(self.entropy),
            "impressions": self.entropy[COUNT],
            "gauc_requests": self.grouped[gauc.REQUESTS],
            "gauc_skipped": self.grouped[gauc.SKIPPED],
        }
        return {f"{task}/{name}": float(v[k]) for k, task in enumerate(self.tasks) for name, v in values.items()}
