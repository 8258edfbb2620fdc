"""MLflow: the one place that knows it. One run per job, made by the driver, written to by it and by rank 0.

The default store is SQLite in roo_ray's home, at an absolute path, so that a submitted job, which runs in a
copy of the working directory, and ``make mlflow`` find the same runs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from roo_ray.config import Tracking
from roo_ray.errors import ClusterError, ConfigError
from roo_ray.source_config import home

EXPERIMENT_KIND = "mlflow.experimentKind"  # its pages are for models, not for chats
RUN_KEY_TAG = "roo_ray.run"
logging.getLogger("mlflow").setLevel(logging.WARNING)  # its notes on creating tables
MAX_PARAM_LENGTH = 6000
SERVER_TIMEOUT_S = 10.0


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
    """Names an MLflow run for another process. ``uri`` None: tracking is off."""

    uri: str | None
    run_id: str = ""
    experiment_id: str = ""


def open_run(settings: Tracking, job: str, run_name: str, nodes: int, *, reopen: bool = False) -> RunHandle:
    """Makes the run of a job; with ``reopen``, goes on with the run of this job and name where there is one.

    Raises ConfigError where the store cannot be reached.
    """
    if not settings.enabled:
        return RunHandle(None)
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
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            tags = {RUN_KEY_TAG: key, "roo_ray.job": job} | software()
            run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
    except MlflowException as error:
        raise ConfigError(f"MLflow store {uri}: {error}") from None
    return RunHandle(uri, run_id, experiment_id)


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
            f"no MLflow server answers at {uri} ({error}); start it, correct tracking.uri or MLFLOW_TRACKING_URI, or "
            "set tracking.enabled=false"
        ) from None


def software() -> dict[str, str]:
    """What the job runs on, as tags: versions, the code's commit where it is known, the job, the machine."""
    names = ("roo-ray", "torch", "torchrec", "ray", "pyarrow", "mlflow-skinny")
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    tags = {f"version.{name.removesuffix('-skinny')}": installed[name] for name in names if name in installed}
    tags |= {"version.python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    tags["mlflow.source.name"] = os.path.basename(sys.argv[0])
    root = Path(__file__).parents[2]
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return tags


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

    Metrics go out asynchronously; ``flush`` waits for them. A step that the run has already (steps replayed
    after a restart) is not logged twice, and one that a killed process had under way is logged again.
    """

    def __init__(self, handle: RunHandle) -> None:
        self._handle = handle
        self._client = MlflowClient(handle.uri) if handle.uri else None
        self._pending: list[Any] = []
        self._last_step: dict[str, int] = {}
        self._stored: dict[str, set[int]] = {}  # by runs before this one

    def params(self, content: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Logs nested parameters, flattened; a reopened run keeps what it has. Returns those that differ now: name
        -> (as logged, now)."""
        if self._client is None:
            return {}
        known = self._client.get_run(self._handle.run_id).data.params
        flat = {name: value[:MAX_PARAM_LENGTH] for name, value in flatten(content).items()}
        new = [Param(name, value) for name, value in flat.items() if name not in known]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._handle.run_id, params=new[start : start + 100])
        return {name: (known[name], value) for name, value in flat.items() if known.get(name, value) != value}

    def tags(self, content: Mapping[str, Any]) -> None:
        """Sets tags."""
        if self._client is not None:
            tags = [RunTag(key, str(value)) for key, value in content.items()]
            self._client.log_batch(self._handle.run_id, tags=tags)

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Logs finite values at a step; returns at once."""
        if self._client is None:
            return
        now = int(time.time() * 1000)
        entries = [
            Metric(name, float(value), now, step)
            for name, value in values.items()
            if value is not None and math.isfinite(value) and not self._is_logged(name, step)
        ]
        for entry in entries:
            self._last_step[entry.key] = step
        if entries:
            self._pending.append(self._client.log_batch(self._handle.run_id, metrics=entries, synchronous=False))

    def _is_logged(self, name: str, step: int) -> bool:
        if name not in self._stored:
            assert self._client is not None
            history = self._client.get_metric_history(self._handle.run_id, name)
            self._stored[name] = {point.step for point in history}
        return step <= self._last_step.get(name, -1) or step in self._stored[name]

    def text(self, content: str, path: str) -> None:
        """Stores a text artifact."""
        if self._client is not None:
            self._client.log_text(self._handle.run_id, content, path)

    def json(self, content: Any, path: str) -> None:
        """Stores a JSON artifact."""
        self.text(json.dumps(content, indent=1, default=str), path)

    def folder(self, local: str | Path, path: str) -> None:
        """Stores a folder's files as artifacts."""
        if self._client is not None:
            self._client.log_artifacts(self._handle.run_id, str(local), path)

    def flush(self) -> None:
        """Waits until all metrics are stored."""
        pending, self._pending = self._pending, []
        for operation in pending:
            operation.wait()

    def end(self, succeeded: bool) -> None:
        """Flushes and closes the run."""
        if self._client is not None:
            self.flush()
            self._client.set_terminated(self._handle.run_id, "FINISHED" if succeeded else "FAILED")


def where_to_look(handle: RunHandle) -> str:
    """Where a person finds the run."""
    if handle.uri is None:
        return "tracking is off"
    if handle.uri.startswith("sqlite:"):
        return f"run {handle.run_id} in {handle.uri} (make mlflow, or mlflow ui --backend-store-uri {handle.uri})"
    return f"{handle.uri}/#/experiments/{handle.experiment_id}/runs/{handle.run_id}"
