"""The command that makes an impression table trainable as it is, run for real."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from roo_ray.config import Holdout, load_config
from roo_ray.errors import EXIT_BAD_INPUT
from roo_ray.ingest.stream import RankStream, StreamSettings
from tests.conftest import ROOT
from tests.ingest.test_clustered import SCHEMA, impressions, write
from tests.ingest.test_stream import take_epoch

JOB = ROOT / "jobs" / "index_impressions.py"


def configured(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """The job's arguments for a table of these rows."""
    write(folder / "log/a.parquet", rows)
    (folder / "schema.yaml").write_text(SCHEMA.to_yaml())
    (folder / "mine.yaml").write_text(
        f"name: mine\nschema: schema.yaml\nsource: {{kind: impressions, path: {folder}/log}}\n"
        f"requests: {folder}/index\nholdout: {{by: request, fraction: 0.2}}\n"
        "ingest: {lanes: 2, reader: thread}\nbuild: {row_group_requests: 8}\n"
    )
    return ["--config", str(folder / "mine.yaml")]


def test_a_clustered_table_is_indexed_and_every_request_of_it_is_streamed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [1 + (7 * i) % 5 for i in range(60)]
    arguments = configured(tmp_path, impressions(sizes))
    before = (tmp_path / "log/a.parquet").read_bytes()
    monkeypatch.setattr(sys, "argv", [str(JOB), *arguments])
    runpy.run_path(str(JOB))["main"]()
    printed = capsys.readouterr().out
    assert f"{len(sizes)}" in printed
    assert f"{sum(sizes)}" in printed
    assert (tmp_path / "log/a.parquet").read_bytes() == before
    config = load_config(arguments[1], [])
    keys, trained = [], 0
    for side in ("train", "evaluation"):
        mode = "shuffled" if side == "train" else "sequential"
        how = StreamSettings(
            config.requests, 1, config.request_schema, config.ingest, config.holdout, side, 3, (0,), mode
        )
        for (step,) in take_epoch([RankStream(how, 0, 1)], 0):
            keys += step.batch.request_key.tolist()
            trained += step.impressions
    assert len(keys) == len(set(keys)) == len(sizes)
    assert trained == sum(sizes)
    assert config.holdout == Holdout(by="request", fraction=0.2)


def test_a_table_that_is_not_clustered_is_one_message_with_the_fraction_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = impressions([3] * 10)
    monkeypatch.setattr(sys, "argv", [str(JOB), *configured(tmp_path, [*rows[1:], rows[0]])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOB), run_name="__main__")
    assert ended.value.code == EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert "1 of 10 requests (10.0%) lie in several places" in printed
    assert "python jobs/build_requests.py --config FILE" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "index").exists()
