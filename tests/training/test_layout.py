"""Whether days lie in the order of time is known from the manifest, before trainers are asked for."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from roo_ray import session
from roo_ray.cluster import preflight
from roo_ray.cluster.findings import worst
from roo_ray.config import Config
from roo_ray.errors import EXIT_BAD_INPUT, DataError
from roo_ray.requests.manifest import load_manifest
from roo_ray.training.incremental import DayResult, Published, write_published
from roo_ray.training.layout import refuse_unordered
from roo_ray.training.prepare import prepare
from tests.jobs.small import ROOT, cli_overrides, small_config

ORDERED = ("build.order=time", "build.buckets=1")


def built(folder: Path, *options: str) -> Config:
    config = small_config(folder, "tracking.enabled=false", "incremental={}", *options)
    refuse_unordered(config, "nightly")  # no data set yet
    prepare(config, "build", lambda line: None)
    return config


def test_days_in_order_of_time_pass(local_ray: None, tmp_path: Path) -> None:
    """Of several row groups and files each; days larger than twice build.bucket_bytes are written in pieces by user."""
    config = built(tmp_path / "ordered", *ORDERED, "build.file_bytes=20000")
    manifest = load_manifest(config.requests)
    assert all(sum(file.day == day for file in manifest.files) > 1 for day in manifest.days)
    assert any(len(file.units) > 1 for file in manifest.files)
    refuse_unordered(config, "nightly")
    pieces = built(tmp_path / "pieces", *ORDERED, "build.bucket_bytes=20000")
    with pytest.raises(DataError, match=r"build\.bucket_bytes half of a day's request rows in memory or more"):
        refuse_unordered(pieces, "nightly")


def test_days_in_another_order_are_refused_before_trainers_come(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = built(tmp_path)
    *before, last = load_manifest(config.requests).days
    with pytest.raises(DataError, match=r"overlap in time.*build: \{order: time, buckets: 1"):
        refuse_unordered(config, "nightly")
    shuffled = config.model_copy(update={"incremental": None})
    refuse_unordered(shuffled, "nightly")
    in_time = shuffled.model_copy(update={"ingest": config.ingest.model_copy(update={"mode": "time"})})
    with pytest.raises(DataError, match="overlap in time"):
        refuse_unordered(in_time, "any")

    def connect(*_: object, **__: object) -> None:
        raise AssertionError("nodes were asked for")

    monkeypatch.setattr(session, "connect", connect)
    arguments = [*cli_overrides(tmp_path), "run_name=nightly", "incremental={}"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(ROOT / "configs/demo.yaml"), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs/train.py"), run_name="__main__")
    assert ended.value.code == EXIT_BAD_INPUT
    assert "overlap in time" in capsys.readouterr().err

    more = {"checkpoint": "c", "run_id": "r", "data_version": 1, "data_digest": "d", "metrics": {}}
    history = [DayResult(day=day, **more) for day in (*before, last)]
    write_published(config, "nightly", Published(history=history[:-1]))
    with pytest.raises(DataError, match=f"day={last}"):
        refuse_unordered(config, "nightly")
    write_published(config, "nightly", Published(history=history))  # no day is left that would be trained on
    refuse_unordered(config, "nightly")


def test_preflight_says_so(tmp_path: Path) -> None:
    plain = small_config(tmp_path)
    days = small_config(tmp_path, "incremental={}")

    def bad() -> None:
        raise DataError("units overlap in time")

    assert preflight.check_order(plain, bad) == preflight.check_order(plain, None) == []
    (found,) = preflight.check_order(days, bad)
    assert re.match(r"fail +order +units overlap in time  ->  build", found.line())
    assert worst(preflight.check_order(days, lambda: None)) == "ok"
    (found,) = preflight.check_order(days, None)
    assert re.match(
        r"fail +order +build.order=user_time and build.buckets=None: .*  ->  build: \{order: time", found.line()
    )
    assert worst(preflight.check_order(small_config(tmp_path, "incremental={}", *ORDERED), None)) == "ok"
    assert worst(preflight.check_order(small_config(tmp_path, "ingest.mode=time"), None)) == "fail"
