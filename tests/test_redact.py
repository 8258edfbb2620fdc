"""Secrets are hidden by name and in URIs, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.errors import ConfigError
from roo_ray.redact import HIDDEN, is_secret, redact, redact_text
from roo_ray.terminal import print_table, run_job
from roo_ray.training.progress import make_say
from roo_ray.training.tracking import RunHandle, RunLogger, open_run, where_to_look
from tests.cluster.heads import ROOT
from tests.jobs.small import small_config

SECRETS = [
    "password",
    "db_password",
    "token",
    "auth_token",
    "secret",
    "aws_secret_access_key",
    "api_key",
    "access_key",
    "key",
]
WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=20)


@pytest.mark.parametrize("name", SECRETS)
def test_by_name(name: str) -> None:
    assert redact({"a": {name: "hunter2", "other": ["x"]}}) == {"a": {name: HIDDEN, "other": ["x"]}}


@given(WORDS, WORDS)
def test_in_uris(user: str, password: str) -> None:
    uri = f"s3://{user}:{password}@bucket/path?region=eu&secret_key={password}&scheme=https"
    text = redact_text(f"cannot open {uri}")
    assert password not in text
    assert user not in text
    assert "bucket/path?region=eu" in text
    assert "scheme=https" in text


def test_a_config_of_ours_stays_as_it_is(tmp_path: Path) -> None:
    content = small_config(tmp_path).model_dump(mode="json")
    assert redact(content) == content
    assert not is_secret("keys")
    assert not is_secret("ingest.lanes")
    assert redact({"history_tokens": 100}) == {"history_tokens": 100}


def test_parameters_and_tags_of_a_run(tmp_path: Path) -> None:
    run = open_run(Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"), "train", "x", 1)
    logger = RunLogger(run)
    logger.params({"storage": "s3://id:hunter2@bucket/runs", "ray": {"token": "hunter2", "address": "auto"}})
    logger.tags({"data_set": "s3://id:hunter2@bucket/requests"})
    logger.end(True)
    data = MlflowClient(run.uri).get_run(run.run_id).data
    assert data.params == {"storage": "s3://***@bucket/runs", "ray.token": HIDDEN, "ray.address": "auto"}
    assert data.tags["data_set"] == "s3://***@bucket/requests"


def test_servers_listen_on_loopback_unless_told_otherwise() -> None:
    session = (ROOT / "roo_ray/session.py").read_text()
    assert '_node_ip_address="127.0.0.1"' in session
    assert "include_dashboard=False" in session
    assert "--host 127.0.0.1" in (ROOT / "Makefile").read_text()


def test_what_jobs_print_carries_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    uri = "https://kai:hunter2@mlflow.example?api_key=hunter2"

    def job() -> None:
        make_say()(f"reads {uri}")
        print_table(f"Trained {uri}", ["a", "b"], [["checkpoint", uri]], f"Next: --config {uri}")
        print_table("", ["a"], [["b"]], where_to_look(RunHandle(uri, "run", "7")))
        raise ConfigError(f"nothing answers at {uri}")

    with pytest.raises(SystemExit):
        run_job(job)
    printed = "".join(capsys.readouterr())
    assert "hunter2" not in printed
    assert printed.count("mlflow.example") == 6
