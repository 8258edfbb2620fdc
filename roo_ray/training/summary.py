"""Rows of the tables that close a job."""

from __future__ import annotations

from collections.abc import Mapping

from roo_ray.schema import Schema


def _number(value: float | None) -> str:
    return "n/a" if value is None or value != value else f"{value:.4f}"


def quality_rows(schema: Schema, metrics: Mapping[str, float]) -> list[list[str]]:
    """Per task: NE, AUC, GAUC, calibration on held-out data, and the Bayes optimum where it is known."""
    rows = []
    for label in schema.labels:
        for name, title in (
            ("ne", "NE"),
            ("auc", "AUC"),
            ("gauc", "GAUC by request"),
            ("calibration", "calibration (predicted / observed)"),
            ("bayes_ne", "NE of the Bayes optimum"),
            ("bayes_auc", "AUC of the Bayes optimum"),
        ):
            value = metrics.get(f"eval/{label.name}/{name}")
            if value is not None and (value == value or not name.startswith("bayes")):
                rows.append([f"{label.name}: {title}", _number(value)])
    return rows
