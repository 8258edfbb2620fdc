"""Day by day: each day from the published model, evaluated before training; a worse model is not published."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from roo_ray.config import Config, Holdout, Incremental
from roo_ray.errors import ConfigError, PublishRefused, Stopped
from roo_ray.training.incremental import (
    DayResult,
    Published,
    check_regression,
    config_of_day,
    days_passed_over,
    days_to_train,
    read_published,
    run_days,
    write_published,
)
from roo_ray.training.launch import evaluate
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
    """The first day; the second one, stopped in its midst and gone on with; a third one that is refused, removed and
    trained anew. What is published, and nothing else, is registered."""
    options = (
        "build.order=time",
        "build.buckets=1",
        "build.file_bytes=1",
        "ingest.reader=thread",
        "ingest.batch_impressions=16",  # enough steps in a day for a stop to come amid them
        "training.epochs=1",
        "training.log_every=1",
        "source.days=3",
        "serving.register_as=daily",
    )
    config = small_config(tmp_path, *options, "incremental={max_ne_rise: 10}")
    manifest, _ = prepare(config, "build", quiet)
    first, second, third = manifest.days
    done, published, _ = run_days(days(config, first), "daily", quiet)
    assert [one.metrics.keys() for one in done] == [{"click/ne_new", "click/auc_new"}]
    assert published is not None

    stopped: list[str] = []

    def stop(line: str) -> None:
        if not stopped and re.search(r"epoch 1/1  step \d+", line):
            stopped.append(line)
            os.kill(os.getpid(), signal.SIGTERM)

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id

    def named(job: str) -> list[Run]:
        return client.search_runs([experiment], f"tags.`roo_ray.run` = '{job}'", order_by=["attributes.start_time"])

    with pytest.raises(Stopped):
        run_days(days(config, first, second), "daily", stop)
    assert [run.info.status for run in named("incremental/daily")] == ["KILLED"]
    assert read_published(config, "daily") == published
    lines: list[str] = []
    done, published, parent = run_days(days(config, first, second), "daily", lines.append)
    assert any("(within an epoch)" in line for line in lines)  # it went on with the day
    [result] = done
    assert result.day == second
    assert published is not None
    assert parent is not None
    [day_run] = named(f"train/daily-{second}")
    losses = [point.step for point in client.get_metric_history(day_run.info.run_id, "train/loss")]
    assert sorted(losses) == list(range(1, max(losses) + 1))

    # it began with the first day's model: its figures are those of that checkpoint
    of_day = config_of_day(days(config, second), "daily", second)
    held_out = evaluate(of_day, published.history[0].checkpoint, "check-held-out", quiet)
    everything = of_day.model_copy(update={"holdout": Holdout(by="all", only_days=[second])})
    whole = evaluate(everything, published.history[0].checkpoint, "check-day", quiet)
    for metric in ("ne", "auc"):
        name = f"eval/click/{metric}"
        assert result.metrics[f"click/{metric}_published"] == pytest.approx(held_out.metrics[name], rel=1e-5)
        assert result.metrics[f"click/{metric}_before"] == pytest.approx(whole.metrics[name], rel=1e-5)

    assert run_days(days(config, first, second), "daily", quiet) == ([], published, None)  # nothing to do
    versions = client.search_model_versions("name = 'daily'")
    assert {version.run_id for version in versions} == {one.run_id for one in published.history}
    assert len(versions) == 2

    worse = config.training.model_copy(update={"embedding_lr": 1.0, "dense_lr": 0.3})
    strict = config.model_copy(update={"incremental": Incremental(max_ne_rise=0), "training": worse})
    for _ in range(2):  # the second time the day is trained already
        with pytest.raises(PublishRefused, match=f"model of {second} stays published"):
            run_days(strict, "daily", quiet)
    assert read_published(config, "daily") == published
    assert len(client.search_model_versions("name = 'daily'")) == 2  # a refused model is no version
    assert client.get_run(parent.run_id).info.status == "FAILED"
    assert "charts/ne_by_day.png" in {item.path for item in client.list_artifacts(parent.run_id, "charts")}

    shutil.rmtree(tmp_path / "runs" / f"daily-{third}")
    done, published, _ = run_days(config, "daily", quiet)
    assert [one.day for one in done] == [third]
    refused, anew = named(f"train/daily-{third}")
    assert done[0].run_id == anew.info.run_id
    assert refused.data.metrics["eval/click/ne"] > anew.data.metrics["eval/click/ne"]
    by_day = client.get_metric_history(parent.run_id, "day/click/ne_new")
    assert [point.step for point in by_day] == [1, 2, 3, 3]
    assert client.get_run(parent.run_id).data.metrics["day/click/ne_new"] == done[0].metrics["click/ne_new"]
    assert (
        client.search_model_versions("name = 'daily'", order_by=["version_number DESC"])[0].run_id == anew.info.run_id
    )
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert {run.info.run_name for run in nested} == {f"daily-{day}" for day in (first, second, third)}


def days(config: Config, *of: str) -> Config:
    """The config for these days."""
    assert config.incremental is not None
    return config.model_copy(update={"incremental": config.incremental.model_copy(update={"days": list(of)})})
