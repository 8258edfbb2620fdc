"""ROC and calibration curves of a merged metric state as plain JSON: what pictures are drawn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roo_ray.metrics.auc import histogram_auc, roc_curve
from roo_ray.metrics.calibration import reliability_table
from roo_ray.metrics.collection import RankingMetrics

CURVES_FILE = "review/curves.json"
_POINTS = 400


def _thinned(first: Tensor, second: Tensor) -> tuple[list[float], list[float]]:
    """At most ``_POINTS`` points of a monotone curve, evenly along its length, ends included."""
    length = torch.cat([first.new_zeros(1), (first.diff().abs() + second.diff().abs()).cumsum(0)])
    wanted = torch.linspace(0, float(length[-1]), _POINTS, dtype=length.dtype)
    at = torch.unique(torch.searchsorted(length, wanted).clamp_max(len(length) - 1))
    return first[at].tolist(), second[at].tolist()


def curves_of(metrics: RankingMetrics) -> dict[str, Any]:
    """Task -> ``auc``, ``roc`` (false and true positive rates) and ``calibration`` (bins: mean prediction, mean label,
    impressions). A task without both classes has no ``roc``. Call it on metrics merged over ranks."""
    aucs = histogram_auc(metrics.histogram)
    found: dict[str, Any] = {}
    for k, task in enumerate(metrics.tasks):
        table = reliability_table(metrics.reliability, k)
        found[task] = {
            "calibration": {
                "mean_prediction": table.mean_prediction.tolist(),
                "mean_label": table.mean_label.tolist(),
                "impressions": table.impressions.tolist(),
            }
        }
        if bool(torch.isfinite(aucs[k])):
            false, true = _thinned(*(rates.cpu().double() for rates in roc_curve(metrics.histogram, k)))
            found[task] |= {"auc": float(aucs[k]), "roc": {"false_positive_rate": false, "true_positive_rate": true}}
    return found
