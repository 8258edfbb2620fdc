"""The tables that close a job."""

from __future__ import annotations

import math

from roo_ray.training.summary import quality_rows


def test_rows_are_of_what_was_measured() -> None:
    ranking = {
        "eval/click/ne": 0.81234,
        "eval/click/auc": math.nan,
        "eval/click/bayes_auc": math.nan,
        "train/loss": 1.0,
    }
    assert quality_rows(ranking) == [["click: NE", "0.8123"], ["click: AUC", "n/a"]]
    retrieval = {"eval/recall_at_10": 0.25, "eval/items": 1234.0}
    assert quality_rows(retrieval) == [["recall at 10", "0.2500"], ["items looked through", "1,234"]]
    assert quality_rows({}) == []
