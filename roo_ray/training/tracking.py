"""MLflow: the one place that knows it. One run per job, made by the driver, written to by it and by rank 0.

The default store is SQLite in roo_ray's home, at an absolute path, so that a submitted job, which runs in a
copy of the working directory, and ``make mlflow`` find the same runs.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from roo_ray.config import Tracking
from roo_ray.errors import ClusterError, ConfigError, Stopped
from roo_ray.redact import redact, redact_text
from roo_ray.source_config import home
from roo_ray.training.outbox import Outbox
from roo_ray.training.spool import Entry, is_refusal

EXPERIMENT_KIND = "mlflow.experimentKind"  # its pages are for models, not for chats
RUN_KEY_TAG = "roo_ray.run"
COMMIT_VARIABLE = "ROO_RAY_COMMIT"
TRAINED_TAG = "data_digest"  # the first thing that a training tags its run with
logging.getLogger("mlflow").setLevel(logging.WARNING)  # its notes on creating tables
MAX_PARAM_LENGTH = 6000
SERVER_TIMEOUT_S = 10.0
RETRY_SECONDS = 2.0
Result = TypeVar("Result")
# MLflow's own retries would take up to 15 minutes a call; the outbox tries again by itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def default_uri() -> str:
    """SQLite in roo_ray's home."""
    return f"sqlite:///{home() / 'mlflow.db'}"


def tracking_uri(settings: Tracking, nodes: int) -> str:
    """The store to use: config, ``MLFLOW_TRACKING_URI``, else SQLite. Raises ClusterError for SQLite on several
    nodes: the file is on one of them only."""
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri()
    if uri.startswith("sqlite:") and nodes > 1:
        raise ClusterError(
            f"the cluster has {nodes} nodes and the MLflow store is an SQLite file, which one node alone sees; "
            "start a server (mlflow server --backend-store-uri ... --host 127.0.0.1) and set tracking.uri or "
            "MLFLOW_TRACKING_URI to its address"
        )
    return uri


@dataclass(frozen=True)
class RunHandle:
    """Names an MLflow run for another process. ``uri`` None: tracking is off. ``started``: seconds since the epoch."""

    uri: str | None
    run_id: str = ""
    experiment_id: str = ""
    started: float = 0.0


def open_run(
    settings: Tracking,
    job: str,
    run_name: str,
    nodes: int,
    *,
    reopen: bool = False,
    begun: bool = True,
    parent: RunHandle | None = None,
    patience: float = 0.0,
) -> RunHandle:
    """Makes the run of a job; with ``reopen``, goes on with the newest run of this job and name where there is one.
    ``begun`` False: the job's storage has nothing of such a run; one that has trained (``TRAINED_TAG``) was of what has
    been removed since, is left as it is, and a new one is made. MLflow shows it under ``parent``.

    Raises ConfigError where the store cannot be reached, for ``patience`` seconds.
    """
    if patience and settings.enabled:
        return patiently(
            lambda: open_run(settings, job, run_name, nodes, reopen=reopen, begun=begun, parent=parent), patience
        )
    if not settings.enabled:
        return RunHandle(None)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(settings, nodes)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    key = f"{job}/{run_name}"
    _require_server(uri)
    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            artifacts = (home() / "mlflow-artifacts").as_uri() if uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(
                settings.experiment, artifacts, {EXPERIMENT_KIND: "custom_model_development"}
            )
        else:
            experiment_id = experiment.experiment_id
        named = f"tags.`{RUN_KEY_TAG}` = '{key}'"
        found = client.search_runs([experiment_id], named, max_results=1) if reopen else []
        if found and (begun or TRAINED_TAG not in found[0].data.tags):
            info = found[0].info
            client.update_run(info.run_id, status="RUNNING")
        else:
            tags = {RUN_KEY_TAG: key, "roo_ray.job": job} | software()
            tags |= {"mlflow.parentRunId": parent.run_id} if parent is not None else {}
            info = client.create_run(experiment_id, run_name=run_name, tags=tags).info
    except MlflowException as error:
        raise ConfigError(redact_text(f"MLflow store {uri}: {error}")) from None
    return RunHandle(uri, info.run_id, experiment_id, info.start_time / 1000)


def to_stderr(line: str) -> None:
    """Prints a line beside what the job prints."""
    print(line, file=sys.stderr, flush=True)


def patiently(action: Callable[[], Result], seconds: float, say: Callable[[str], None] = to_stderr) -> Result:
    """What ``action`` returns, which asks a store: where that does not answer, it is tried again for so many seconds,
    after one line. Raises what it raises then, and at once where the store refuses."""
    from mlflow.exceptions import MlflowException

    end, said = time.monotonic() + seconds, False
    while True:
        try:
            return action()
        except (ConfigError, MlflowException) as error:
            if is_refusal(error) or time.monotonic() >= end:
                raise
            if not said:
                said = True
                say(
                    redact_text(f"MLflow does not answer ({str(error).strip()[:200]}): waiting for it, {seconds:.0f} s")
                )
        time.sleep(min(RETRY_SECONDS, seconds))


def find_run(settings: Tracking, run_id: str) -> RunHandle:
    """The run of that id. Raises ConfigError where the store cannot be reached or does not have it."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(settings, 1)
    _require_server(uri)
    try:
        info = MlflowClient(uri).get_run(run_id).info
    except MlflowException as error:
        raise ConfigError(redact_text(f"MLflow store {uri}: {error}")) from None
    return RunHandle(uri, run_id, info.experiment_id, info.start_time / 1000)


def _require_server(uri: str) -> None:
    """Raises ConfigError where no server listens at an http address; MLflow itself would try for minutes."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https") or not address.hostname:
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=SERVER_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no MLflow server answers at {redact_text(uri)} ({error}); start it, correct tracking.uri or "
            "MLFLOW_TRACKING_URI, or set tracking.enabled=false"
        ) from None


def store_problem(uri: str) -> str | None:
    """Why a store does not answer here, without credentials; None where it does. Asks for an experiment."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        _require_server(uri)
        MlflowClient(uri).search_experiments(max_results=1)
    except (ConfigError, MlflowException, OSError) as error:
        return redact_text(" ".join(str(error).split())[:300])
    return None


def software() -> dict[str, str]:
    """What the job runs on, as tags: versions, the code's commit where it is known, the job, the machine."""
    names = ("roo-ray", "torch", "torchrec", "ray", "pyarrow", "mlflow-skinny")
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    tags = {f"version.{name.removesuffix('-skinny')}": installed[name] for name in names if name in installed}
    tags |= {"version.python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    tags["mlflow.source.name"] = os.path.basename(sys.argv[0])
    commit = source_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def source_commit() -> str:
    """The commit of the code that runs: where it is installed ``ROO_RAY_COMMIT``, which the images set (they have no
    git), in a checkout what git says; empty where it is not known, as of a submitted working directory."""
    code = Path(__file__).parents[2]
    if code.name in ("site-packages", "dist-packages"):
        return os.environ.get(COMMIT_VARIABLE, "").strip()
    command = ["git", "-C", str(code), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mapping -> ``a.b: text``."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = str(value)
    return flat


class RunLogger:
    """Writes to one run. Methods do nothing where tracking is off.

    All but ``params`` return at once: a thread sends (``outbox``), and a server that is down or slow stops nothing.
    A step that the run has already (steps replayed after a restart) is not logged twice, and one that a killed
    process had under way is logged again. ``say``: gets a line when the server stops answering.
    """

    def __init__(self, handle: RunHandle, say: Callable[[str], None] | None = None, end_wait: float = 30.0) -> None:
        self.run = handle

        def show(line: str) -> None:
            (say or to_stderr)(redact_text(line))

        self._say = show
        self._end_wait = end_wait
        self._outbox = Outbox(handle.uri, handle.run_id, self._say) if handle.uri else None
        self._last_step: dict[str, int] = {}
        if self._outbox is not None:
            atexit.register(self.close)

    def params(self, content: Mapping[str, Any], patience: float = 0.0) -> dict[str, tuple[str, str]]:
        """Logs nested parameters, flattened, and waits for it; a reopened run keeps what it has. Returns those that
        differ now: name -> (as logged, now). Raises what the client does where the store does not answer, for
        ``patience`` seconds."""
        if self._outbox is None:
            return {}
        if patience:
            return patiently(lambda: self.params(content), patience, self._say)
        from mlflow.entities import Param

        client = self._outbox.sender.client
        known = client.get_run(self.run.run_id).data.params
        flat = {name: value[:MAX_PARAM_LENGTH] for name, value in flatten(redact(content)).items()}
        new = [Param(name, value) for name, value in flat.items() if name not in known]
        for start in range(0, len(new), 100):
            client.log_batch(self.run.run_id, params=new[start : start + 100])
        return {name: (known[name], value) for name, value in flat.items() if known.get(name, value) != value}

    def tags(self, content: Mapping[str, Any]) -> None:
        """Sets tags."""
        self._put({"kind": "tags", "tags": {key: redact_text(str(value)) for key, value in content.items()}})

    def metrics(self, values: Mapping[str, float | None], step: int = 0, *, again: bool = False) -> None:
        """Logs finite values at a step; returns at once. ``again``: also where the run has another value of that step,
        which MLflow keeps beside this one, the one that counts."""
        now = int(time.time() * 1000)
        entries: list[Entry] = [
            {"kind": "metric", "name": name, "value": float(value), "time": now, "step": step}
            | ({"again": True} if again else {})
            for name, value in values.items()
            if value is not None and math.isfinite(value) and (again or step > self._last_step.get(name, -1))
        ]
        for entry in entries:
            self._last_step[entry["name"]] = step
        self._put(*entries)

    def text(self, content: str, path: str) -> None:
        """Stores a text artifact, without credentials in it."""
        self._put({"kind": "text", "text": redact_text(content), "path": path})

    def json(self, content: Any, path: str) -> None:
        """Stores a JSON artifact, without credentials in it."""
        self.text(json.dumps(content, indent=1, default=str), path)

    def folder(self, local: str | Path, path: str) -> None:
        """Stores a folder's files as artifacts. A copy waits to be sent, and the folder may go at once; where the disk
        does not take a copy, this waits as ``flush`` does. Raises FileNotFoundError where there is no such folder."""
        if self._outbox is not None and not self._outbox.put_folder(Path(local), path):
            self.flush()

    def _put(self, *entries: Entry) -> None:
        outbox = self._outbox  # another thread may close it
        if outbox is not None and entries:
            outbox.put(list(entries))

    def flush(self, seconds: float | None = None) -> bool:
        """Waits until all is stored, at most ``end_wait`` seconds (or so many); whether it is."""
        return self._outbox is None or self._outbox.flush(self._end_wait if seconds is None else seconds)

    def keep(self) -> None:
        """Keeps what is not stored yet in a file, should this process be killed; at once."""
        if self._outbox is not None:
            self._outbox.keep()

    def recover(self) -> int:
        """Takes over what killed processes have kept of this run; how many entries."""
        return self._outbox.recover() if self._outbox is not None else 0

    def close(self) -> None:
        """Waits as ``flush`` does, and ends the sending; says where what could not be sent is kept."""
        if self._outbox is None:
            return
        atexit.unregister(self.close)
        outbox, self._outbox = self._outbox, None
        left = outbox.close(self._end_wait)
        if left is not None:
            self._say(
                f"MLflow did not take all of run {self.run.run_id}; the rest is in {left}. When the server is "
                f"back: python jobs/replay_tracking.py {left}"
            )

    def end(self, succeeded: bool) -> None:
        """Closes the run as FINISHED or FAILED, or as KILLED where it is called because of Stopped or an interrupt, and
        waits for it as ``close`` does."""
        stopped = isinstance(sys.exc_info()[1], (Stopped, KeyboardInterrupt))
        status = "FINISHED" if succeeded else "KILLED" if stopped else "FAILED"
        self._put({"kind": "status", "status": status})
        self.close()


def where_to_look(handle: RunHandle) -> str:
    """Where a person finds the run; without credentials that are in the URI."""
    if handle.uri is None:
        return "tracking is off"
    uri = redact_text(handle.uri)
    if uri.startswith("sqlite:"):
        return f"run {handle.run_id} in {uri} (make mlflow, or mlflow ui --backend-store-uri {uri})"
    return f"{uri}/#/experiments/{handle.experiment_id}/runs/{handle.run_id}"
