"""Rows of the tables that close a job."""

from __future__ import annotations

from collections.abc import Mapping


def number(value: float | None) -> str:
    """Four decimals; n/a where there is no figure."""
    return "n/a" if value is None or value != value else f"{value:.4f}"


def quality_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """Per task: NE, AUC, GAUC, calibration on held-out data, and the Bayes optimum where it is known. Of
    retrieval, recall too."""
    rows = []
    tasks = [name.split("/")[1] for name in metrics if name.startswith("eval/") and name.endswith("/ne")]
    for task in tasks:
        for name, title in (
            ("ne", "NE"),
            ("auc", "AUC"),
            ("gauc", "GAUC by request"),
            ("gauc_user", "GAUC by user"),
            ("calibration", "calibration (predicted / observed)"),
            ("bayes_ne", "NE of the Bayes optimum"),
            ("bayes_auc", "AUC of the Bayes optimum"),
        ):
            value = metrics.get(f"eval/{task}/{name}")
            if value is not None and (value == value or not name.startswith("bayes")):
                rows.append([f"{task}: {title}", number(value)])
    recalls = [name for name in metrics if name.startswith("eval/recall_at_")]
    rows += [[f"recall at {name.rpartition('_')[2]}", number(metrics[name])] for name in recalls]
    if recalls:
        rows.append(["items looked through", f"{metrics['eval/items']:,.0f}"])
    return rows


def not_finite_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """What ``training.on_nan: skip`` has left out, where it has."""
    batches = metrics.get("epoch/not_finite_batches")
    if not batches:
        return []
    left_out = f"{batches:,.0f} batches, {metrics['epoch/not_finite_requests']:,.0f} requests"
    return [["left out, loss not finite", left_out]]
