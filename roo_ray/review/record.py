"""What the driver adds to a finished run for its reviewer: pictures, dedup ratios, the data set, the model.

Nothing here fails a run: what cannot be made is said in one line, and the run goes on.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow.artifacts
from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.entities import DatasetInput, InputTag
from mlflow.tracking import MlflowClient

from roo_ray.config import Config
from roo_ray.metrics.curves import CURVES_FILE
from roo_ray.requests.manifest import Manifest
from roo_ray.review import charts
from roo_ray.review.history import baseline_run, cumulative, step_milliseconds
from roo_ray.review.sample import sample_requests, training_ratios
from roo_ray.serving.publish import publish_model, register_model
from roo_ray.storage import without_secrets
from roo_ray.training.tracking import RunHandle, RunLogger, store_problem

PICTURES = "review"
Say = Callable[[str], None]


class RequestDataSource(DatasetSource):  # type: ignore[misc]
    """Where a request data set lies: its path and version."""

    def __init__(self, path: str, version: int) -> None:
        self.path, self.version = path, version

    @staticmethod
    def _get_source_type() -> str:
        return "roo_ray_requests"

    def load(self) -> str:
        """The path; roo_ray's jobs read it."""
        return self.path

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False

    @classmethod
    def _resolve(cls, raw_source: Any) -> RequestDataSource:
        raise NotImplementedError("a request data set's source is not guessed from a path")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"path": self.path, "version": self.version}

    @classmethod
    def from_dict(cls, source_dict: dict[str, Any]) -> RequestDataSource:
        """What ``to_dict`` gave."""
        return cls(source_dict["path"], source_dict["version"])


class RequestDataset(Dataset):  # type: ignore[misc]
    """A version of a request data set in MLflow's dataset tracking; its digest is the manifest's."""

    def __init__(self, path: str, manifest: Manifest, columns: dict[str, str]) -> None:
        self.manifest, self.columns = manifest, columns
        path = without_secrets(path)
        super().__init__(RequestDataSource(path, manifest.version), f"{Path(path).name} v{manifest.version}", "")

    def _compute_digest(self) -> str:
        return self.manifest.digest()[:8]

    @property
    def profile(self) -> dict[str, Any]:
        """Counts of the version."""
        manifest = self.manifest
        counts = {"requests": manifest.requests, "impressions": manifest.impressions}
        return counts | {"history_events": manifest.tokens, "days": manifest.days, "files": len(manifest.files)}

    def to_dict(self) -> dict[str, str]:
        """What MLflow stores of a data set."""
        base: dict[str, str] = super().to_dict()
        return base | {"schema": json.dumps({"columns": self.columns}), "profile": json.dumps(self.profile)}


@contextmanager
def never_fatal(what: str, say: Say, failed: list[str] | None = None) -> Iterator[None]:
    """A failure in the block is said, and added to ``failed``, not raised: a trained model is worth more than its
    pictures."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"{what} could not be logged: {reason}")
        if failed is not None:
            failed.append(what)


def log_dataset(run: RunHandle, data_set: str, manifest: Manifest, context: str) -> None:
    """The data set version as an input of the run."""
    schema = manifest.request_schema()
    levels = dict.fromkeys(schema.request_columns, "request") | dict.fromkeys(schema.impression_columns, "impression")
    dataset = RequestDataset(data_set, manifest, levels)
    entity = dataset._to_mlflow_entity()
    MlflowClient(run.uri).log_inputs(run.run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])


def evaluation_pictures(run: RunHandle, folder: Path, say: Say) -> None:
    """ROC and calibration of each task, from the curves that the workers logged. A task without them is said."""
    with tempfile.TemporaryDirectory() as scratch:
        uri = f"runs:/{run.run_id}/{CURVES_FILE}"
        path = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch, tracking_uri=run.uri)
        curves = json.loads(Path(path).read_text())
    for task, of in curves.items():
        if not of["calibration"]["impressions"]:  # conversions that come later
            say(f"task '{task}' has no known label in the held-out data, and so neither ROC nor calibration picture")
            continue
        charts.calibration(folder / f"calibration_{task}.png", task, of["calibration"])
        if "roc" in of:
            charts.roc(folder / f"roc_{task}.png", task, of)


def data_pictures(config: Config, manifest: Manifest, run: RunHandle, folder: Path) -> None:
    """Histograms of the requests and bytes per column; logs the dedup ratios that follow from them."""
    schema = config.request_schema
    sample = sample_requests(config.requests, manifest, schema)
    title = "Impressions per request"
    charts.histogram(
        folder / "impressions_per_request.png", title, "impressions of a request (count)", sample.impressions
    )
    for feature in schema.sequences:
        name, longest = feature.name, feature.max_length
        path, x = folder / f"length_of_{name}.png", f"events in '{name}' (count)"
        charts.histogram(path, f"Length of '{name}' per request", x, sample.events[name], longest)
    if manifest.ledger.get("columns"):
        charts.bytes_per_column(folder / "bytes_per_column.png", manifest.ledger)
    logger = RunLogger(run)
    ratios = training_ratios(sample, schema, config.model)
    logger.metrics({f"data/{name}": value for name, value in ratios.items()})
    logger.close()


def curve_pictures(run: RunHandle, folder: Path) -> None:
    """NE over steps (beside the other form's run on the same data, where there is one) and the step's times."""
    client = MlflowClient(run.uri)
    mine = client.get_run(run.run_id)
    form = mine.data.params.get("training.form", "request")
    other = baseline_run(client, mine)
    runs = {f"{form}-level": run.run_id} | ({other[0]: other[1]} if other else {})
    for name in sorted(mine.data.metrics):
        if name.startswith("train_lifetime/") and name.endswith("/ne"):
            task = name.split("/")[1]
            curves = {form: cumulative(client, of, task) for form, of in runs.items()}
            by_step = {form: [(p.step, p.window_ne) for p in points] for form, points in curves.items() if points}
            title = f"{task}: NE in training, each batch scored before it is trained on"
            best = mine.data.metrics.get(f"eval/{task}/bayes_ne")
            y = "NE (1 = base rate; lower is better)"
            charts.lines(folder / f"ne_over_steps_{task}.png", title, "training step (count)", y, by_step, best)
            by_time = {form: [(p.seconds, p.window_ne) for p in points] for form, points in curves.items() if points}
            charts.lines(folder / f"ne_over_time_{task}.png", title, "time in training steps (s)", y, by_time, best)
    times = step_milliseconds(client, mine)
    if times:
        charts.step_times(folder / "step_time.png", times)


def review_training(
    config: Config, manifest: Manifest, checkpoint: str, run: RunHandle, say: Say, *, register: bool = True
) -> bool:
    """Completes a training run: model, data set, pictures, ratios; whether all is there. What cannot be made now is
    said, with the command that completes it. ``register``: under ``serving.register_as``."""
    if run.uri is None:
        return True
    failed: list[str] = []
    if (problem := store_problem(run.uri)) is not None:
        say(f"MLflow does not answer ({problem}): the model, the data set and the pictures are not logged")
        failed.append("all of it")
    else:
        with never_fatal("the model", say, failed):
            uri = publish_model(config, manifest, checkpoint, run)
            if uri:
                version = register_model(config, checkpoint, run) if register else None
                name = f", registered as '{config.serving.register_as}' version {version}" if version else ""
                say(f"logged the model as {uri}{name}")
        with never_fatal("the data set", say, failed):
            log_dataset(run, config.requests, manifest, "train")
        failed += _pictures(config, manifest, run, say, training=True)
    if failed:
        say(
            f"what is missing of MLflow run {run.run_id} is completed, when its server answers, by: python "
            f"jobs/review.py --config CONFIG run_name={config.run_name}"
        )
    return not failed


def review_evaluation(config: Config, manifest: Manifest, run: RunHandle, say: Say) -> None:
    """Completes an evaluation run: data set and pictures."""
    if run.uri is None:
        return
    if (problem := store_problem(run.uri)) is not None:
        say(
            f"MLflow does not answer ({problem}): the data set and the pictures are not logged; evaluate again for them"
        )
        return
    with never_fatal("the data set", say):
        log_dataset(run, config.requests, manifest, "evaluation")
    _pictures(config, manifest, run, say, training=False)


def _pictures(config: Config, manifest: Manifest, run: RunHandle, say: Say, training: bool) -> list[str]:
    """Logs the pictures; those that could not be."""
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with never_fatal("the evaluation's pictures", say, failed):
            evaluation_pictures(run, folder, say)
        if training:
            with never_fatal("the data's pictures", say, failed):
                data_pictures(config, manifest, run, folder)
            with never_fatal("the training's pictures", say, failed):
                curve_pictures(run, folder)
        with never_fatal("the pictures", say, failed):
            logger = RunLogger(run, say)
            logger.folder(folder, PICTURES)
            logger.close()  # says where what is not sent waits
    return failed
