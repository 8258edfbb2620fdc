"""The comparison of forms, from made trainings: its figures, its table and its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from roo_ray.errors import RooError
from roo_ray.review.forms import (
    FormsCompared,
    Trained,
    _figures,
    comparison_pictures,
    comparison_rows,
    out_of_data,
    require_all,
)
from roo_ray.review.history import Point
from roo_ray.training.launch import TrainingResult
from roo_ray.training.tracking import RunHandle


def trained(seconds: float, samples: float, ne: float) -> Trained:
    metrics = {"eval/click/ne": ne, "eval/click/auc": 0.7, "eval/click/gauc": 0.6}
    curve = [Point(i, samples * i / 10, seconds * i / 10, 1 - i / 100, 1 - i / 200) for i in range(1, 11)]
    return Trained(TrainingResult("r", "c", metrics, RunHandle(None), seconds), seconds, samples, curve)


def test_figures_table_and_pictures(tmp_path: Path) -> None:
    same_data = {"request": trained(10.0, 1000, 0.9), "impression": trained(40.0, 1000, 0.9)}
    same_time = {"request": trained(5.0, 500, 0.92), "impression": trained(5.0, 125, 0.97)}
    first, second = _figures("same_data", same_data, ["click"]), _figures("same_time", same_time, ["click"])
    assert first["same_data/speed_up"] == pytest.approx(4)
    assert first["same_data/samples_ratio"] == 1
    assert second["same_time/samples_ratio"] == 4
    assert second["same_time/impression_samples_per_second"] == 25
    assert second["same_time/request_click_ne"] == 0.92
    data = {
        "data/disk_bytes_request_level": 2e6,
        "data/disk_bytes_impression_level": 9e6,
        "data/dedup_ratio_flops": 3.0,
    }
    compared = FormsCompared(same_data, same_time, first | second | data, RunHandle(None))
    rows = comparison_rows(compared, "click")
    assert rows[0] == ["same data: training (s)", "10.0", "40.0", "4.00x"]
    assert ["same wall time: held-out NE", "0.9200", "0.9700", "-0.0500"] in rows
    assert rows[-2] == ["data set on disk (MB)", "2.0", "9.0", "4.50x"]
    assert rows[-1][-1] == "3.00x"
    comparison_pictures(tmp_path, same_data, same_time, "click", 5.0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ne_over_samples.png",
        "ne_over_time.png",
        "samples_over_time.png",
    }


def test_a_form_that_ran_out_of_data_is_named() -> None:
    every = {"request": 1000.0, "impression": 1000.0}
    assert out_of_data(every, {"request": 900.0, "impression": 100.0}) == []
    assert out_of_data(every, {"request": 1000.0, "impression": 100.0}) == ["request"]
    assert out_of_data(every, every) == ["request", "impression"]


def test_points_that_have_not_arrived_are_not_compared() -> None:
    require_all("r", 200.0, 200.0)
    for samples in (150.0, 0.0):
        with pytest.raises(RooError, match=r"nothing can be compared.*replay_tracking"):
            require_all("r", samples, 200.0)
