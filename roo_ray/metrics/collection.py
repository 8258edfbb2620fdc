"""All ranking metrics of a model's tasks in one additive state.

The same result on any number of ranks and for any cut into batches of whole requests, to float64 rounding.
Window and lifetime: update a window; when it closes, ``merge`` it over the ranks, ``add`` the merged one to a
lifetime (which is then of all ranks, everywhere, and not to be merged again), and ``reset`` the window.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from roo_ray.errors import DataError, RooError
from roo_ray.metrics import auc, calibration, gauc, normalized_entropy
from roo_ray.metrics.normalized_entropy import COUNT


class WindowAndLifetime:
    """Progressive validation: a batch is scored before it is trained on, in a window that is closed now and then and
    a lifetime since the run (or ``lifetime``'s saved state) began."""

    def __init__(self, tasks: list[str]) -> None:
        self.window, self.lifetime = RankingMetrics(tasks), RankingMetrics(tasks)

    def close(self, prefix: str) -> dict[str, float]:
        """The window's figures over all ranks under ``prefix/``, the lifetime's under ``prefix_lifetime/``
        (collective); a new window begins."""
        merged = self.window.merge()
        self.lifetime.add(merged)
        self.window.reset()
        window = {f"{prefix}/{name}": value for name, value in merged.compute().items()}
        return window | {f"{prefix}_lifetime/{name}": value for name, value in self.lifetime.compute().items()}


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

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        num_impressions: Tensor,
        split: Tensor | None = None,
    ) -> None:
        """Adds a batch: logits, labels, weights (B_NRO, K), num_impressions (B_RO,) int64. ``split`` (B_RO,): as in
        ``RequestBatch``; GAUC skips (and counts as skipped) a request that is split, as half of it has another AUC.

        A weight above 0 means that the label is known; unknown and dummy rows have weight 0 and are not looked
        at. Logits are taken as float32; an infinite one counts as 1e30 in the log loss. On an error nothing
        was added. Raises RooError, naming the task, where a known impression's logit is NaN; DataError, where
        its label is neither 0 nor 1; ValueError, where the shapes do not fit.
        """
        logits = logits.detach().to(self.device).float()
        labels = labels.to(self.device)
        known = (weights > 0).to(self.device, torch.float32)
        num_impressions = num_impressions.to(self.device)
        self._check(logits, labels, known, num_impressions)
        self.entropy += normalized_entropy.batch_state(logits, labels, known)
        whole = known
        if split is not None:
            split = split.to(self.device)
            part = torch.repeat_interleave(split > 0, num_impressions, output_size=known.shape[0])
            whole = known * ~part[:, None]
            self.grouped[gauc.SKIPPED] += (split == 1).sum()
        self.grouped += gauc.batch_state(logits, labels, whole, num_impressions)
        auc.add_to_histogram(self.histogram, logits, labels, known)
        self.reliability += calibration.batch_reliability(logits, labels, known)

    def update_probabilities(
        self, probabilities: Tensor, labels: Tensor, weights: Tensor, num_impressions: Tensor
    ) -> None:
        """``update`` for probabilities (B_NRO, K) in [0, 1] in place of logits; NaN where there is none.

        With ``RequestBatch.oracle`` the figures are those of the best possible model (Bayes NE and AUC).
        """
        absent = probabilities.isnan()
        logits = torch.logit(torch.where(absent, 0.5, probabilities).double())
        self.update(logits, labels, torch.where(absent, 0, weights), num_impressions)

    def _check(self, logits: Tensor, labels: Tensor, known: Tensor, num_impressions: Tensor) -> None:
        shape = (logits.shape[0], len(self.tasks))
        if not logits.shape == labels.shape == known.shape == shape:
            raise ValueError(
                f"metrics of the tasks {self.tasks} need logits, labels and weights of shape (B_NRO, "
                f"{shape[1]}), got {tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(known.shape)}"
            )
        seen = known > 0
        nan = (logits.isnan() & seen).sum(0)  # (K,)
        odd = ((labels != 0) & (labels != 1) & seen).sum(0)
        # one read from the device for all checks
        counts: list[int] = torch.cat([nan, odd, num_impressions.sum()[None]]).tolist()
        if counts[-1] != shape[0]:
            raise ValueError(f"num_impressions sums to {counts[-1]}, but there are {shape[0]} logits")
        for name, nans, odds in zip(self.tasks, counts[: shape[1]], counts[shape[1] : -1], strict=True):
            if nans:
                raise RooError(f"task '{name}': {nans} of {shape[0]} logits of a batch are NaN")
            if odds:
                raise DataError(
                    f"task '{name}': {odds} of {shape[0]} labels of a batch are neither 0 nor 1; "
                    "give an unknown label weight 0"
                )

    def reset(self) -> None:
        """Empties the state: a new window."""
        for part in self._states:
            part.zero_()

    def add(self, other: RankingMetrics) -> None:
        """Adds what another object (of the same tasks) has seen."""
        self.load_state_tensor(self.state_tensor() + other.state_tensor().to(self.device))

    def state_tensor(self) -> Tensor:
        """The whole state, one flat float64 tensor (a copy); states add."""
        return torch.cat([part.flatten() for part in self._states])

    def load_state_tensor(self, state: Tensor) -> None:
        """Takes a state made by ``state_tensor`` of the same tasks. Raises RooError where the size differs."""
        parts = self._states
        sizes = [part.numel() for part in parts]
        if state.shape != (sum(sizes),):
            raise RooError(
                f"a metric state of shape {tuple(state.shape)} is not one of the tasks {self.tasks}, which has "
                f"({sum(sizes)},): it was saved with other tasks or another version"
            )
        for part, values in zip(parts, state.split(sizes), strict=True):
            part.copy_(values.view_as(part))

    def merge(self, group: dist.ProcessGroup | None = None) -> RankingMetrics:
        """The metrics over all ranks of ``group`` (collective where torch.distributed runs, by one all-reduce);
        this object is not changed."""
        state = self.state_tensor()
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            if dist.get_backend(group) == "nccl":
                state = state.cuda()
            dist.all_reduce(state, group=group)
        merged = RankingMetrics(self.tasks, self.device)
        merged.load_state_tensor(state)
        return merged

    def compute(self) -> dict[str, float]:
        """``<task>/ne``, ``/log_loss`` (nats), ``/auc``, ``/gauc``, ``/calibration``, ``/base_rate``,
        ``/impressions``, ``/gauc_requests``, ``/gauc_skipped``.

        NaN where a figure is not defined: no known impression (all but the counts), labels all equal (NE, AUC,
        GAUC), no positive (calibration), no request with both classes (GAUC).
        """
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
        columns = torch.stack(list(values.values()), 1).tolist()  # (K, names)
        return {
            f"{task}/{name}": value
            for task, row in zip(self.tasks, columns, strict=True)
            for name, value in zip(values, row, strict=True)
        }
