"""Secrets are hidden by name and in URIs, and nothing else is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.errors import EXIT_FAILURE, ConfigError
from roo_ray.redact import HIDDEN, is_secret, redact, redact_text
from roo_ray.storage import join_path
from roo_ray.terminal import print_table, run_job
from roo_ray.training.folder import with_credentials
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
REPORTS = ["report.json", "report.txt"]
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


@pytest.mark.parametrize(
    "text",
    [
        "s3://id:hun/ter2@bucket/x is not there",
        "postgresql://mlflow:hunter2@ter2@db/x",
        "password=hunter2 host=db",
        "{'aws_secret_access_key': 'hunter2 hunter2'}",
        'he said {"db_password": "hunter2"}',
        "Authorization: Bearer hunter2.hunter2",
        "https://server/x?token=hunter2'",
        "auth token=hunter2",
    ],
)
def test_in_messages(text: str) -> None:
    shown = redact_text(text)
    assert HIDDEN in shown
    assert "ter2" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1 of kai@here",
        "history_tokens=100, keys: {request: id}, tokens: 5",
        "s3://bucket/a@b",
        "column 'item_key': 5 values",
        "sqlite:////home/kai/mlflow.db",
        "a password is needed",
        '{"secret": null, "password": {"a": 1}, "token": 3}',
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


@given(
    st.dictionaries(st.sampled_from([*SECRETS, "uri", "a"]), st.one_of(WORDS, st.integers(), st.none(), st.just([1])))
)
def test_json_stays_json(content: dict[str, object]) -> None:
    found = json.loads(redact_text(json.dumps(content | {"uri": "s3://id:hunter2@bucket"}, indent=1)))
    assert found.keys() == content.keys() | {"uri"}
    assert found["uri"] == "s3://***@bucket"
    assert found.get("db_password") in (None, HIDDEN, [1]) or isinstance(found["db_password"], int)


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
    logger.tags({"data_set": "s3://id:hunter2@bucket/requests", "problem": "password=hunter2"})
    logger.json({"source": "s3://id:hunter2@bucket/log", "rows": [1, None]}, "report.json")
    logger.text("error: nothing at https://x?token=hunter2", "report.txt")
    logger.end(True)
    data = MlflowClient(run.uri).get_run(run.run_id).data
    assert data.params == {"storage": "s3://***@bucket/runs", "ray.token": HIDDEN, "ray.address": "auto"}
    assert data.tags["data_set"] == "s3://***@bucket/requests"
    assert data.tags["problem"] == "password=***"
    stored = [download_artifacts(run_id=run.run_id, artifact_path=name, tracking_uri=run.uri) for name in REPORTS]
    texts = [Path(path).read_text() for path in stored]
    assert json.loads(texts[0]) == {"source": "s3://***@bucket/log", "rows": [1, None]}
    assert texts[1] == "error: nothing at https://x?token=***"


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


@pytest.mark.parametrize(
    "storage",
    [
        "s3://id:hunter2@bucket/runs?region=eu",
        "s3://bucket/runs?secret_key=hunter2&region=eu",
        "s3://bucket/runs",
        "/home/kai/runs",
    ],
)
def test_a_path_in_a_file_has_no_credentials_and_gets_them_back(storage: str) -> None:
    path = join_path(storage, "run", "epoch-0001")
    stored = redact_text(path)
    assert "hunter2" not in stored
    assert with_credentials(stored, storage) == path
    assert with_credentials("s3://elsewhere/x", storage) == "s3://elsewhere/x"


FAILS = """
import logging, threading
from roo_ray.terminal import run_job
URI = "s3://key:hunter2@bucket?secret_key=hunter2"
def fetch():
    raise OSError(f"cannot read {URI}")
def main():
    log = logging.getLogger("lib")
    log.addHandler(logging.StreamHandler())
    log.error("retrying %s", URI)
    thread = threading.Thread(target=fetch, name="reader")
    thread.start()
    thread.join()
    try:
        fetch()
    except OSError:
        log.exception("fetch")
    try:
        fetch()
    except OSError as error:
        raise KeyError(f"no data: password=hunter2 in {URI}") from error
run_job(main)
"""


def test_tracebacks_and_log_records_carry_no_credentials() -> None:
    """An error that is a bug ends with 1 and its traceback, with its cause; also one in a thread, also a library's."""
    done = subprocess.run([sys.executable, "-c", FAILS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_FAILURE
    printed = done.stdout + done.stderr
    assert "hunter2" not in printed
    assert printed.count("cannot read s3://***@bucket?secret_key=***") == 3
    assert "retrying s3://***@bucket" in printed
    assert "in reader:" in printed
    assert "KeyError: 'no data: password=***" in printed
    assert printed.count("Traceback (most recent call last)") == 4
