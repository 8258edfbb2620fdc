"""Every picture is drawn from made figures: it opens as a PNG, is not blank, and names units on its axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import auc as area
from sklearn.metrics import roc_auc_score

from roo_ray.metrics.collection import RankingMetrics
from roo_ray.metrics.curves import curves_of
from roo_ray.review import charts
from tests.metrics.reference import random_batch

NAMES = {"column of the log", "part of the step"}  # axes of names
LEDGER: dict[str, Any] = {
    "columns": {
        name: {"level": "request", "disk_bytes": {"impression": 5_000_000 // (i + 1), "request": 400_000 // (i + 1)}}
        for i, name in enumerate(["history_item", "history_time", "user_age", "item_id"])
    },
    "totals": {"disk_bytes": {"impression": 10_400_000, "request": 830_000}},
}


@pytest.fixture(scope="module")
def curves() -> dict[str, Any]:
    logits, labels, weights, counts = random_batch(1, 400)
    metrics = RankingMetrics(["click", "like"])
    metrics.update(logits + labels, labels, weights, counts)
    return curves_of(metrics)


def test_curves_are_those_of_scikit_learn(curves: dict[str, Any]) -> None:
    logits, labels, weights, _ = random_batch(1, 400)
    for k, task in enumerate(["click", "like"]):
        seen = weights[:, k] > 0
        exact = roc_auc_score(labels[seen, k], (logits + labels)[seen, k])
        assert curves[task]["auc"] == pytest.approx(exact, abs=1e-4)
        roc = curves[task]["roc"]
        assert len(roc["false_positive_rate"]) <= 400
        assert area(roc["false_positive_rate"], roc["true_positive_rate"]) == pytest.approx(exact, abs=3e-3)
        assert sum(curves[task]["calibration"]["impressions"]) == seen.sum()


def test_one_class_has_a_calibration_and_no_roc() -> None:
    metrics = RankingMetrics(["click"])
    metrics.update(torch.randn(5, 1), torch.zeros(5, 1), torch.ones(5, 1), torch.tensor([5]))
    assert set(curves_of(metrics)["click"]) == {"calibration"}


def test_all_pictures(curves: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: dict[str, tuple[str, str]] = {}
    original = charts.picture

    def noted(path: Path, title: str, x: str, y: str, *size: Any) -> Any:
        labels[path.name] = (x, y)
        return original(path, title, x, y, *size)

    monkeypatch.setattr(charts, "picture", noted)
    rng = np.random.default_rng(0)
    charts.roc(tmp_path / "roc.png", "click", curves["click"])
    charts.calibration(tmp_path / "calibration.png", "click", curves["click"]["calibration"])
    charts.histogram(tmp_path / "lengths.png", "Lengths", "events (count)", rng.integers(0, 90, 500), cut=64)
    charts.bytes_per_column(tmp_path / "bytes.png", LEDGER)
    charts.step_times(tmp_path / "steps.png", {"forward": 3.0, "backward": 5.5, "waiting for data": 0.2})
    curve = [(float(i), 1 / (1 + i)) for i in range(30)]
    charts.lines(tmp_path / "lines.png", "NE", "step (count)", "NE (1 = base rate)", {"a": curve, "b": curve}, 0.02)
    assert len(labels) == 6
    for name, axes in labels.items():
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert 5_000 < len(content) < 150_000
        for label in axes:
            assert "(" in label or label in NAMES, f"{name} has no unit on an axis: {label}"


def test_a_day_that_was_refused_is_on_the_chart(tmp_path: Path) -> None:
    days = ["2024-01-01", "2024-01-02"]
    ne = {"new model": [0.9, 1.4], "published model": [None, 0.91]}
    for name, refused in (("all.png", None), ("refused.png", days[1])):
        charts.by_day(tmp_path / name, "click", days, ne, refused)
    every, marked = ((tmp_path / name).read_bytes() for name in ("all.png", "refused.png"))
    assert every.startswith(b"\x89PNG")
    assert every != marked  # the day is marked
    charts.by_day(tmp_path / "first.png", "click", days[:1], {"new model": [0.9], "published model": [None]})


def test_pictures_of_nothing_do_not_fail(tmp_path: Path) -> None:
    table = {"mean_prediction": [0.1], "mean_label": [0.0], "impressions": [4.0]}
    charts.calibration(tmp_path / "calibration.png", "click", table)
    charts.histogram(tmp_path / "lengths.png", "Lengths", "events (count)", np.zeros(3, np.int64))
    charts.lines(tmp_path / "lines.png", "NE", "step (count)", "NE", {"a": [(1.0, 2.0)], "b": []})
    charts.step_times(tmp_path / "steps.png", {"forward": 0.0})
    ledger = {"columns": {"a": {"disk_bytes": {"impression": 3, "request": 0}}}}
    charts.bytes_per_column(tmp_path / "b.png", ledger | {"totals": {"disk_bytes": {"impression": 3, "request": 0}}})
