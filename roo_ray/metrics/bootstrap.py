"""Is one model better than another? Paired bootstrap over requests or users, on the same impressions.

Impressions of a request (and requests of a user) are not independent, so whole units are resampled, the same ones for
both models: what the models share cancels in the difference. Intervals are percentiles of the replicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roo_ray.errors import DataError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Statistic = Callable[[Floats], float]

LOWER_IS_BETTER = ("ne", "log_loss")


@dataclass(frozen=True)
class Scored:
    """One task's impressions, known ones only: ``unit`` (N,) int64 in 0 .. units - 1 is what is resampled,
    ``request`` (N,) int64 in 0 .. requests - 1, ``labels`` (N,) 0/1 and the ``logits`` of both models (N,)."""

    unit: Integers
    request: Integers
    labels: Floats
    first: Floats
    second: Floats


@dataclass(frozen=True)
class Difference:
    """``first``, ``second``: the metric of each model. ``difference``: second - first, with the interval ``low`` to
    ``high``. ``share_better``: of the replicates in which the second model is better."""

    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    share_better: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves 0 out."""
        return bool(self.low > 0 or self.high < 0)


def _entropy_statistics(rows: Scored, logits: Floats, units: int) -> dict[str, Statistic]:
    """NE and log loss as functions of the units' weights (units,)."""
    x = np.clip(logits, -1e30, 1e30)
    loss = np.maximum(x, 0) - x * rows.labels + np.log1p(np.exp(-np.abs(x)))
    parts = (loss, rows.labels, np.ones_like(loss))
    sums = np.stack([np.bincount(rows.unit, part, units) for part in parts], 1)  # (units, 3)

    def log_loss(weights: Floats) -> float:
        total = weights @ sums
        return float(total[0] / total[2]) if total[2] else float("nan")

    def ne(weights: Floats) -> float:
        total = weights @ sums
        rate = total[1] / total[2] if total[2] else 0.0
        if not 0 < rate < 1:
            return float("nan")
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float(total[0] / total[2] / entropy)

    return {"ne": ne, "log_loss": log_loss}


def _auc_statistic(rows: Scored, logits: Floats) -> Statistic:
    """AUC as a function of the units' weights: exact, ties one half; one pass over the sorted rows."""
    order = np.argsort(logits, kind="stable")
    unit, positive = rows.unit[order], rows.labels[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(logits[order]) != 0]))

    def auc(weights: Floats) -> float:
        weight = weights[unit]
        positives = np.add.reduceat(weight * positive, starts)
        negatives = np.add.reduceat(weight * (1 - positive), starts)
        pairs = positives.sum() * negatives.sum()
        if not pairs:
            return float("nan")
        return float((positives * (np.cumsum(negatives) - 0.5 * negatives)).sum() / pairs)

    return auc


def _gauc_statistic(rows: Scored, logits: Floats, units: int) -> Statistic:
    """GAUC by request as a function of the units' weights."""
    requests = int(rows.request.max(initial=-1)) + 1
    unit_of_request = np.zeros(requests, np.int64)
    unit_of_request[rows.request] = rows.unit
    aucs, sizes = request_aucs(rows.request, logits, rows.labels, requests)
    sums = np.stack([np.bincount(unit_of_request, part, units) for part in (aucs * sizes, sizes)], 1)

    def gauc(weights: Floats) -> float:
        total = weights @ sums
        return float(total[0] / total[1]) if total[1] else float("nan")

    return gauc


def request_aucs(request: Integers, logits: Floats, labels: Floats, requests: int) -> tuple[Floats, Floats]:
    """((requests,) AUC of each request, (requests,) its impressions); both 0 where a class is missing.

    A request's AUC by its mean rank: sum of its positives' ranks, ties sharing theirs."""
    order = np.lexsort([logits, request])
    group, score, positive = request[order], logits[order], labels[order]
    sizes = np.bincount(group, minlength=requests)
    starts = np.cumsum(sizes) - sizes
    new_run = np.concatenate([[True], (np.diff(group) != 0) | (np.diff(score) != 0)])[: len(group)]
    runs = np.flatnonzero(new_run)
    lengths = np.diff(np.append(runs, len(group)))
    ranks = np.repeat(runs + 0.5 * (lengths + 1), lengths) - starts[group]  # mean rank from 1 within the request
    positives = np.bincount(group, positive, requests)
    pairs = positives * (sizes - positives)
    won = np.bincount(group, ranks * positive, requests) - positives * (positives + 1) / 2
    valid = pairs > 0
    return np.where(valid, won / np.where(valid, pairs, 1), 0.0), np.where(valid, sizes, 0).astype(np.float64)


def paired_bootstrap(rows: Scored, replicates: int = 1000, seed: int = 0, level: float = 0.95) -> list[Difference]:
    """NE, log loss, AUC and GAUC by request of two models and their differences, with intervals of ``level``.

    Raises DataError where there is nothing to resample.
    """
    units = int(rows.unit.max(initial=-1)) + 1
    if units < 2:
        raise DataError(f"a bootstrap resamples units, and there are {units}: evaluate on more requests")
    models = [
        _entropy_statistics(rows, logits, units)
        | {"auc": _auc_statistic(rows, logits), "gauc": _gauc_statistic(rows, logits, units)}
        for logits in (rows.first, rows.second)
    ]
    names = list(models[0])
    ones = np.ones(units)
    whole = np.array([[model[name](ones) for name in names] for model in models])  # (2, metrics)
    drawn = np.empty((replicates, len(names)))
    rng = np.random.default_rng(seed)
    for r in range(replicates):
        weights = np.bincount(rng.integers(0, units, units), minlength=units).astype(np.float64)
        first, second = ([model[name](weights) for name in names] for model in models)
        drawn[r] = np.subtract(second, first)
    found = []
    for m, name in enumerate(names):
        differences = drawn[np.isfinite(drawn[:, m]), m]
        low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2]) if len(differences) else (np.nan,) * 2
        better = differences < 0 if name in LOWER_IS_BETTER else differences > 0
        share = float(better.mean()) if len(differences) else float("nan")
        first, second = whole[:, m]
        found.append(Difference(name, first, second, second - first, float(low), float(high), share))
    return found
