"""Day by day: each day from the published model, evaluated before training; a worse model is not published."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from roo_ray.config import Incremental
from roo_ray.errors import ConfigError, PublishRefused
from roo_ray.training.incremental import (
    DayResult,
    Published,
    check_regression,
    days_passed_over,
    days_to_train,
    read_published,
    run_days,
    write_published,
)
from roo_ray.training.prepare import prepare
from tests.jobs.small import small_config
from tests.jobs.test_main_path import quiet


def _result(day: str, new: float | None, old: float | None) -> DayResult:
    metrics = {"click/ne_new": new, "click/ne_published": old}
    return DayResult(day=day, checkpoint="c", run_id="r", data_version=1, data_digest="d", metrics=metrics)


def test_what_is_published_and_what_is_not(tmp_path: Path) -> None:
    settings = Incremental(max_ne_rise=0.02)
    first = _result("2024-01-01", 0.9, None)
    check_regression(settings, "click", first, None)
    published = Published(history=[first])
    check_regression(settings, "click", _result("2024-01-02", 0.917, 0.9), published)
    with pytest.raises(PublishRefused, match=r"2024-01-02: .*0\.9190, \+2\.11%.*model of 2024-01-01 stays published"):
        check_regression(settings, "click", _result("2024-01-02", 0.919, 0.9), published)
    with pytest.raises(PublishRefused, match="no NE"):
        check_regression(settings, "click", _result("2024-01-02", None, 0.9), published)

    config = small_config(tmp_path)
    assert read_published(config, "s") is None
    write_published(config, "s", published)
    assert read_published(config, "s") == published
    assert [path.name for path in (tmp_path / "runs" / "s").iterdir()] == ["published.json"]

    days = ["2024-01-01", "2024-01-02", "2024-01-03"]
    assert days_to_train(settings, days, None) == days
    assert days_to_train(settings, days, published) == days[1:]
    late = Published(history=[first, _result("2024-01-03", 0.9, 0.9)])  # the second day was not built in time
    assert days_passed_over(days, late) == ["2024-01-02"]
    assert days_passed_over(days, published) == days_passed_over(days, None) == []
    with pytest.raises(ConfigError, match="2025-01-01"):
        days_to_train(Incremental(days=["2025-01-01"]), days, None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_days_are_trained_in_turn_and_a_regression_stops_publishing(local_ray: None, tmp_path: Path) -> None:
    options = (
        "build.order=time",
        "build.buckets=1",
        "build.file_bytes=1",
        "ingest.reader=thread",
        "training.epochs=1",
        "source.days=3",
    )
    config = small_config(tmp_path, *options, "incremental={max_ne_rise: 10}")
    manifest, _ = prepare(config, "build", quiet)
    first, second, third = manifest.days
    two = config.model_copy(update={"incremental": Incremental(days=[first, second], max_ne_rise=10)})
    done, published, parent = run_days(two, "daily", quiet)
    assert [one.day for one in done] == [first, second]
    assert published is not None
    assert parent is not None
    assert done[0].metrics.keys() == {"click/ne_new", "click/auc_new"}
    assert done[1].metrics["click/ne_before"] is not None
    assert done[1].metrics["click/ne_published"] != done[1].metrics["click/ne_new"]
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert {run.info.run_name for run in nested} == {f"daily-{first}", f"daily-{second}"}
    assert [point.step for point in client.get_metric_history(parent.run_id, "day/click/ne_new")] == [1, 2]

    assert run_days(two, "daily", quiet) == ([], published, None)  # the days are published: nothing to do
    strict = config.model_copy(update={"incremental": Incremental(max_ne_rise=0)})
    worse = strict.training.model_copy(update={"embedding_lr": 1.0, "dense_lr": 0.1})
    with pytest.raises(PublishRefused, match=f"model of {second} stays published"):
        run_days(strict.model_copy(update={"training": worse}), "daily", quiet)
    assert read_published(config, "daily") == published
    assert client.get_run(parent.run_id).info.status == "FAILED"
    assert third not in {one.day for one in published.history}
