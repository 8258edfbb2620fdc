"""Request-level against impression-level training: one experiment, one MLflow run that compares.

First arm: both forms train on the same requests, from the same seeds, in the same order; their losses agree, and what
differs is the time. Second arm: both get the same wall time in training steps; what differs is how many samples they
have seen by then, and how good they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow.tracking import MlflowClient

from roo_ray import session
from roo_ray.config import Config
from roo_ray.errors import ConfigError, RooError
from roo_ray.requests.manifest import load_manifest
from roo_ray.review import charts
from roo_ray.review.history import Point, cumulative
from roo_ray.review.record import PICTURES, log_dataset, never_fatal
from roo_ray.review.sample import sample_requests, training_ratios
from roo_ray.training.launch import TrainingResult, train
from roo_ray.training.tracking import RunHandle, RunLogger, open_run, patiently

Form = Literal["request", "impression"]
SECONDS, SAMPLES = "train_lifetime/seconds", "train_lifetime/impressions"
FORMS: tuple[Form, Form] = ("request", "impression")


@dataclass(frozen=True)
class Trained:
    """A form's training. ``seconds``: in training steps. ``samples``: impressions trained on."""

    result: TrainingResult
    seconds: float
    samples: float
    curve: list[Point]


@dataclass(frozen=True)
class FormsCompared:
    """``same_data``, ``same_time``: form -> its training, in each arm. ``metrics``: what the MLflow run holds."""

    same_data: dict[Form, Trained]
    same_time: dict[Form, Trained]
    metrics: dict[str, float]
    run: RunHandle


def _train(config: Config, form: Form, run_name: str, say: Callable[[str], None], first: bool = False) -> Trained:
    training = config.training.model_copy(update={"form": form})
    patience = config.tracking.series_wait_seconds
    result = train(config.model_copy(update={"training": training}), run_name, say, patience=0.0 if first else patience)
    if SAMPLES not in result.metrics:
        raise RooError(
            f"run '{run_name}' is from before runs kept the total of what they were trained on: compare under another "
            "run_name"
        )
    client = MlflowClient(result.run.uri)

    def read() -> tuple[list[Point], float]:
        curve = cumulative(client, result.run.run_id, config.request_schema.labels[0].name)
        return curve, client.get_run(result.run.run_id).data.metrics.get(SAMPLES, 0.0)

    curve, samples = patiently(read, patience, say)
    require_all(run_name, samples, result.metrics[SAMPLES])
    return Trained(result, result.metrics[SECONDS], result.metrics[SAMPLES], curve)


def require_all(run_name: str, samples: float, trained: float) -> None:
    """Raises RooError where MLflow does not hold all that a training has logged: its total of ``samples``, against
    that which the training itself has ``trained`` on."""
    if samples < trained:
        raise RooError(
            f"MLflow holds {samples:,.0f} of the {trained:,.0f} impressions that run '{run_name}' was trained on, so "
            "that nothing can be compared: send what waits (jobs/replay_tracking.py; the training has named the file), "
            "and run the comparison again; what is trained is not trained again"
        )


def out_of_data(same_data: Mapping[Form, float], same_time: Mapping[Form, float]) -> list[Form]:
    """The forms that saw all samples there are before their time was up."""
    return [form for form in FORMS if same_time[form] >= same_data[form]]


def _figures(arm: str, trained: dict[Form, Trained], tasks: list[str]) -> dict[str, float]:
    """Metrics of an arm: per form, and the ratios."""
    found = {}
    for form, of in trained.items():
        found[f"{arm}/{form}_train_seconds"] = of.seconds
        found[f"{arm}/{form}_samples_seen"] = of.samples
        found[f"{arm}/{form}_samples_per_second"] = of.samples / of.seconds
        for task in tasks:
            for name in ("ne", "auc", "gauc"):
                found[f"{arm}/{form}_{task}_{name}"] = of.result.metrics[f"eval/{task}/{name}"]
    request, impression = trained["request"], trained["impression"]
    found[f"{arm}/speed_up"] = (request.samples / request.seconds) / (impression.samples / impression.seconds)
    found[f"{arm}/samples_ratio"] = request.samples / impression.samples
    return found


def compare_forms(
    config: Config, run_name: str, say: Callable[[str], None], seconds: float | None = None
) -> FormsCompared:
    """Trains both forms in both arms (four runs named ``<run_name>-...``) and logs the comparison.

    ``seconds``: the wall time of the second arm; default: half of what the request-level form took for all the data,
    so that neither runs out of data; a form that does, by a longer time, is named by ``say`` and in the tag
    ``compared.ran_out_of_data``. Raises ConfigError where tracking is off: the comparison is an MLflow run.
    """
    if not config.tracking.enabled:
        raise ConfigError("jobs/compare.py compares what MLflow holds; set tracking.enabled=true")
    manifest = load_manifest(config.requests, config.requests_version)
    tasks = [label.name for label in config.request_schema.labels]
    config = config.model_copy(update={"serving": config.serving.model_copy(update={"log_model": False})})
    same_data = {form: _train(config, form, f"{run_name}-{form}", say, form == FORMS[0]) for form in FORMS}
    limit = seconds or same_data["request"].seconds / 2
    say(f"same wall time: {limit:.1f} s of training for both forms")
    training = config.training.model_copy(update={"max_seconds": limit})
    timed = config.model_copy(update={"training": training})
    same_time = {form: _train(timed, form, f"{run_name}-{form}-same-time", say) for form in FORMS}

    short = out_of_data(*({form: of.samples for form, of in arm.items()} for arm in (same_data, same_time)))
    if short:
        say(
            f"warning: {' and '.join(short)}-level training ran out of data before {limit:.1f} s: its samples seen are "
            "all there are; give --seconds less, or the data set more requests"
        )
    metrics = _figures("same_data", same_data, tasks) | _figures("same_time", same_time, tasks)
    ratios = training_ratios(
        sample_requests(config.requests, manifest, config.request_schema), config.request_schema, config.model
    )
    metrics |= {f"data/{name}": value for name, value in ratios.items()}
    if manifest.ledger.get("totals"):
        for level in ("impression", "request"):
            metrics[f"data/disk_bytes_{level}_level"] = float(manifest.ledger["totals"]["disk_bytes"][level])
    for task in tasks:
        pair = [same_data[form].result.metrics[f"eval/{task}/ne"] for form in FORMS]
        metrics[f"same_data/{task}_ne_difference"] = pair[0] - pair[1]

    patience = config.tracking.series_wait_seconds
    run = open_run(config.tracking, "compare", run_name, session.alive_nodes(), patience=patience)
    logger = RunLogger(run)
    succeeded = False
    try:
        logger.params(config.model_dump(mode="json", exclude={"request_schema"}), patience)
        logger.tags({"data_version": manifest.version, "data_digest": manifest.digest(), "data_set": config.requests})
        runs = {
            f"{arm}.{form}": of.result.run.run_id
            for arm, both in (("same_data", same_data), ("same_time", same_time))
            for form, of in both.items()
        }
        logger.tags({f"compared.{name}": run_id for name, run_id in runs.items()})
        logger.tags({"compared.ran_out_of_data": ", ".join(short) or "no"})
        logger.metrics(metrics)
        with never_fatal("the data set", say):
            log_dataset(run, config.requests, manifest, "train")
        with never_fatal("the pictures", say), tempfile.TemporaryDirectory() as folder:
            comparison_pictures(Path(folder), same_data, same_time, tasks[0], limit)
            logger.folder(folder, PICTURES)
        succeeded = True
    finally:
        logger.end(succeeded)
    return FormsCompared(same_data, same_time, metrics, run)


def comparison_pictures(
    folder: Path, same_data: dict[Form, Trained], same_time: dict[Form, Trained], task: str, limit: float
) -> None:
    """NE over samples and over time (first arm), samples over time (second arm)."""
    y = f"{task}: NE since the start (lower is better)"
    of = {f"{form}-level": trained.curve for form, trained in same_data.items()}
    by_samples = {name: [(p.impressions, p.lifetime_ne) for p in points] for name, points in of.items()}
    title = "Same requests, same seeds: the same NE at every sample"
    charts.lines(folder / "ne_over_samples.png", title, "impressions trained on (count)", y, by_samples)
    by_time = {name: [(p.seconds, p.lifetime_ne) for p in points] for name, points in of.items()}
    title = "Same requests, same seeds: NE against time"
    charts.lines(folder / "ne_over_time.png", title, "time in training steps (s)", y, by_time)
    timed = {f"{form}-level": trained.curve for form, trained in same_time.items()}
    seen = {name: [(0.0, 0.0), *((p.seconds, p.impressions) for p in points)] for name, points in timed.items()}
    ratio = same_time["request"].samples / same_time["impression"].samples
    title = f"Same wall time ({limit:.0f} s): {ratio:.2f}x the samples"
    x = "time in training steps (s)"
    charts.lines(folder / "samples_over_time.png", title, x, "impressions trained on (count)", seen)


def comparison_rows(compared: FormsCompared, task: str) -> list[list[str]]:
    """Rows of text: figure, request-level, impression-level, ratio or difference."""
    rows = []
    for title, arm in (("same data", compared.same_data), ("same wall time", compared.same_time)):
        one, other = arm["request"], arm["impression"]
        rows += [
            [
                f"{title}: training (s)",
                f"{one.seconds:.1f}",
                f"{other.seconds:.1f}",
                f"{other.seconds / one.seconds:.2f}x",
            ],
            [
                f"{title}: samples seen",
                f"{one.samples:,.0f}",
                f"{other.samples:,.0f}",
                f"{one.samples / other.samples:.2f}x",
            ],
            [
                f"{title}: samples/s",
                f"{one.samples / one.seconds:,.0f}",
                f"{other.samples / other.seconds:,.0f}",
                f"{one.samples / one.seconds * other.seconds / other.samples:.2f}x",
            ],
        ]
        for name in ("ne", "auc", "gauc"):
            pair = [of.result.metrics[f"eval/{task}/{name}"] for of in (one, other)]
            shown = [f"{title}: held-out {name.upper()}", f"{pair[0]:.4f}", f"{pair[1]:.4f}"]
            rows.append([*shown, f"{pair[0] - pair[1]:+.4f}"])
    disk = [compared.metrics.get(f"data/disk_bytes_{form}_level") for form in FORMS]
    if disk[0] and disk[1]:
        rows.append(
            ["data set on disk (MB)", *(f"{size / 1e6:.1f}" for size in disk if size), f"{disk[1] / disk[0]:.2f}x"]
        )
    for name, title in (("all_to_all_bytes", "all-to-all bytes"), ("flops", "FLOPs of the towers")):
        if ratio := compared.metrics.get(f"data/dedup_ratio_{name}"):
            rows.append([f"{title} (impression-level over request-level)", "", "", f"{ratio:.2f}x"])
    return rows
