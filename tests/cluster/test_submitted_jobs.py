"""The jobs that test_submitted_job.py leaves out, each submitted for real to one cluster, with a config from a URI:
what they write, and the exit codes of bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.tracking import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from roo_ray.errors import EXIT_BAD_INPUT, EXIT_OK
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import load_schema
from tests.cluster.heads import ROOT, ray_head
from tests.cluster.test_submitted_job import job_client, until
from tests.mlflow_server import Server

DONE = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
SIZES = {
    "source": {"requests": 600, "users": 120, "days": 3, "history_length": 16, "requests_per_task": 300},
    "build": {"row_group_requests": 50},
    "ingest": {"lanes": 2, "batch_impressions": 64, "window_units": 2, "reader": "thread"},
    "training": {"workers": 1, "epochs": 1, "log_every": 5},
    "tracking": {"end_wait_seconds": 2},
}


class Submitter:
    """Submits jobs as `ray job submit --working-dir .` does. ``config``: a URI, and ``options`` with it, for a job's
    command line. ``home``: roo_ray's on the node, in which relative paths of the config lie."""

    def __init__(self, client: JobSubmissionClient, folder: Path, tracking: str) -> None:
        self.client, self.home = client, folder / "home"
        config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
        for section, sizes in SIZES.items():
            config[section] = config.get(section, {}) | sizes
        config["schema"] = "schema.yaml"
        config["tracking"]["uri"] = tracking
        shutil.copy(ROOT / "configs/schemas/synthetic.yaml", folder / "schema.yaml")
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.config = (folder / "config.yaml").as_uri()
        self.options = ("--config", self.config)

    def start(self, job: str, *arguments: str) -> str:
        """The submission's id."""
        entrypoint = shlex.join([sys.executable, f"jobs/{job}", *arguments])
        return str(self.client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(ROOT)}))

    def end(self, submission: str, seconds: float = 400) -> tuple[int | None, str]:
        """(exit code, log) of a job that has ended."""
        until(f"{submission} ends", lambda: self.client.get_job_status(submission) in DONE, seconds)
        return self.client.get_job_info(submission).driver_exit_code, self.client.get_job_logs(submission)

    def success(self, submission: str) -> str:
        """The log of a job that must succeed."""
        code, log = self.end(submission)
        assert code == EXIT_OK, log[-3000:]
        return log

    def run(self, job: str, *arguments: str) -> str:
        """Starts a job that must succeed; its log."""
        return self.success(self.start(job, *arguments))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, mlflow_server: Server) -> Iterator[Submitter]:
    folder = tmp_path_factory.mktemp("submitted")
    with ray_head(4, {"ROO_RAY_HOME": str(folder / "home")}) as head:
        client = until("the job server answers", lambda: job_client(head))
        yield Submitter(client, folder, mlflow_server.uri)


@pytest.fixture(scope="module")
def demo(jobs: Submitter) -> str:
    """The log of the demo, whose impression table, request data set and run the other jobs use."""
    return jobs.run("demo.py", *jobs.options, "run_name=shown")


@pytest.fixture(scope="module")
def comparing(jobs: Submitter, demo: str) -> str:
    """The submission of the comparison, four trainings that run while other tests do."""
    return jobs.start("compare.py", *jobs.options, "--seconds", "0.5", "run_name=compared")


def test_every_job_is_submitted_by_a_test() -> None:
    texts = [path.read_text() for path in (Path(__file__), Path(__file__).with_name("test_submitted_job.py"))]
    submitted = {name for text in texts for name in re.findall(r'"(?:jobs/)?(\w+\.py)"', text)}
    assert {path.name for path in (ROOT / "jobs").glob("*.py")} <= submitted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_and_what_works_on_its_data(jobs: Submitter, demo: str, comparing: str, tmp_path: Path) -> None:
    assert "The demo in" in demo
    log, data = jobs.home / "demo/impressions", jobs.home / "demo/requests"
    manifest = load_manifest(str(data))
    assert manifest.requests == 600

    out = tmp_path / "schema.yaml"
    table, profile = log.as_uri(), (tmp_path / "profile.json").as_uri()
    arguments = ["--request-key", "request_id", "--model", jobs.config, "--out", out.as_uri(), "--json", profile]
    assert "Predicted savings" in jobs.run("profile_impressions.py", table, *arguments)
    assert load_schema(str(out)).keys.request == ["request_id"]
    assert json.loads((tmp_path / "profile.json").read_text())["sample"]["requests"] == 600

    table = str(tmp_path / "exploded")
    jobs.run("explode_requests.py", *jobs.options, "--out", table)
    assert pads.dataset(table).count_rows() == manifest.impressions
    # as the exploded table has a request's rows together, it can be indexed
    source = ["source={kind: impressions, path: " + table + "}", f"requests={tmp_path}/index"]
    jobs.run("index_impressions.py", *jobs.options, *source)
    assert load_manifest(f"{tmp_path}/index").requests == 600

    costs = {"fixed_s": 0.01, "per_megaflop_s": 0.001}
    prices = {"trainer_hour": 1.0, "worker_memory": 1e9}
    for name, content in (("costs", costs), ("prices", prices)):
        (tmp_path / name).write_text(yaml.safe_dump(content))
    files = ["--costs", (tmp_path / "costs").as_uri(), "--prices", (tmp_path / "prices").as_uri()]
    assert "cheapest" in jobs.run("size_cluster.py", *jobs.options, *files, "--workers", "1,2")

    shutil.copytree(data, tmp_path / "fewer")
    user = pads.dataset(sorted(data.rglob("*.parquet"))[0]).head(1)["user_id"][0].as_py()
    report = tmp_path / "report.json"
    where = [f"requests={tmp_path}/fewer", "--users", str(user), "--report", report.as_uri()]
    jobs.run("forget_users.py", *jobs.options, *where)
    removed = json.loads(report.read_text())["requests_removed"]
    assert removed > 0
    assert load_manifest(f"{tmp_path}/fewer").requests == 600 - removed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bad_input_ends_with_its_own_exit_code(jobs: Submitter, comparing: str, tmp_path: Path) -> None:
    table = str(jobs.home / "demo/impressions")
    wrong = {
        "there is no column 'session'": ["profile_impressions.py", table, "--request-key", "session"],
        "give either --config FILE or --requests PATH": ["explode_requests.py", "--out", str(tmp_path / "out")],
        "only a source of kind impressions can be indexed": ["index_impressions.py", *jobs.options],
        "item vectors are of kind retrieval alone": [
            *("export_items.py", *jobs.options, "--checkpoint", "shown", "--out", str(tmp_path / "items.parquet")),
        ],
        "'never' is no finished run": ["review.py", *jobs.options, "run_name=never"],
    }
    started = {message: jobs.start(*arguments) for message, arguments in wrong.items()}
    for message, submission in started.items():
        code, log = jobs.end(submission)
        assert (code, message in log) == (EXIT_BAD_INPUT, True), log[-3000:]
        assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_comparison_of_forms(jobs: Submitter, comparing: str) -> None:
    log = jobs.success(comparing)
    assert "Request-level against impression-level: 'compared'" in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_server_goes(jobs: Submitter, comparing: str, mlflow_server: Server, tmp_path: Path) -> None:
    jobs.success(comparing)  # which wants the server
    run = ("run_name=late", "model.kind=retrieval")
    training = jobs.start("train.py", *jobs.options, *run, "training.epochs=4")
    until("it trains", lambda: "step 5 " in jobs.client.get_job_logs(training))
    mlflow_server.stop()
    try:
        code, log = jobs.end(training)
    finally:
        mlflow_server.start()
    assert code == EXIT_OK, log[-3000:]
    left = re.search(r"python jobs/replay_tracking\.py (\S+\.jsonl)", log)
    assert left, log[-3000:]
    replayed = jobs.run("replay_tracking.py", left[1])
    assert re.search(r"\d+ entries stored", replayed)
    assert not Path(left[1]).exists()
    jobs.run("review.py", *jobs.options, *run)
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("roo_ray").experiment_id
    [late] = client.search_runs([experiment], "tags.`roo_ray.run` = 'train/late'")
    assert late.info.status == "FINISHED"
    assert "review" in {item.path for item in client.list_artifacts(late.info.run_id)}

    items = tmp_path / "items.parquet"
    jobs.run("export_items.py", *jobs.options, "--checkpoint", "late", "--out", str(items))
    assert pq.read_table(items).column_names == ["item", "row", "vector"]
