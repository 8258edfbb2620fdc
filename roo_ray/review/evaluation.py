"""Two models on the same held-out requests: is the second one better, and how sure is that?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from roo_ray import session
from roo_ray.config import Config
from roo_ray.errors import ConfigError, DataError
from roo_ray.metrics.bootstrap import Difference, Scored, paired_bootstrap
from roo_ray.metrics.held_out import read_scores
from roo_ray.redact import redact_text
from roo_ray.storage import join_path, open_filesystem
from roo_ray.training.launch import evaluate
from roo_ray.training.tracking import RunHandle, RunLogger, open_run

Unit = Literal["request", "user"]


@dataclass(frozen=True)
class Comparison:
    """``differences``: task -> per metric. ``units``: requests or users that were resampled."""

    differences: dict[str, list[Difference]]
    units: int
    requests: int
    impressions: int
    run: RunHandle


def paired(first: pa.Table, second: pa.Table, task: str, unit: Unit) -> Scored:
    """The task's known impressions with both models' logits, from the tables of ``read_scores``.

    Raises DataError where the two did not score the same impressions.
    """
    for name in ("request_key", "impression_index", f"label_{task}"):
        if not first.column(name).equals(second.column(name)):
            raise DataError(
                f"the two models were not scored on the same impressions: '{name}' differs ({first.num_rows:,} and "
                f"{second.num_rows:,} rows); evaluate both on one version of one data set"
            )
    label = first.column(f"label_{task}").combine_chunks()
    known = np.asarray(label.is_valid())
    request = first.column("request_key").to_numpy()[known]
    key = request if unit == "request" else first.column("user_key").to_numpy()[known]
    return Scored(
        unit=np.unique(key, return_inverse=True)[1],
        request=np.unique(request, return_inverse=True)[1],
        labels=np.asarray(label.drop_null()).astype(np.float64),
        first=first.column(f"logit_{task}").to_numpy()[known].astype(np.float64),
        second=second.column(f"logit_{task}").to_numpy()[known].astype(np.float64),
    )


def differences_of(
    rows: Mapping[str, Scored], replicates: int, seed: int, say: Callable[[str], None]
) -> dict[str, list[Difference]]:
    """The differences of each task that has two units with known labels, or more; another one is said. Raises DataError
    where no task has."""
    found = {}
    for task, of in rows.items():
        if len(np.unique(of.unit)) < 2:
            say(f"task '{task}' has {len(of.labels):,} known labels in the held-out data: it is not compared")
        else:
            found[task] = paired_bootstrap(of, replicates, seed)
    if not found:
        raise DataError("no task has known labels of two requests (or users) that could be resampled: evaluate on more")
    return found


@contextmanager
def scratch_folder(path: str, storage: str) -> Iterator[str]:
    """The path; what is there is removed before and after the block. Raises ConfigError where ``storage`` is that
    folder or lies in it: all runs would be removed."""
    filesystem, base = open_filesystem(path)
    _, kept = open_filesystem(storage)
    if f"{kept.rstrip('/')}/".startswith(f"{base.rstrip('/')}/"):
        raise ConfigError(
            f"the folder for scores, {redact_text(path)}, would be removed with the storage in it, "
            f"{redact_text(storage)}; write storage as a path or as a URI with its options after one '?'"
        )

    def remove() -> None:
        if filesystem.get_file_info(base).type == pafs.FileType.Directory:
            filesystem.delete_dir(base)

    remove()
    try:
        yield path
    finally:
        remove()


def compare_models(
    config: Config,
    first: str,
    second: str,
    run_name: str,
    unit: Unit,
    replicates: int,
    say: Callable[[str], None],
) -> Comparison:
    """Evaluates two checkpoints on the held-out data and logs their differences, with paired bootstrap intervals of
    95 %, as an MLflow run ``compare_models/<run_name>``."""
    tables, tasks = [], []
    patience = config.tracking.series_wait_seconds
    place = join_path(config.storage, f"{run_name}-scores")  # every worker can write there
    with scratch_folder(place, config.storage) as scratch:
        for number, checkpoint in enumerate((first, second)):
            scores = join_path(scratch, str(number))
            update = {"evaluation": config.evaluation.model_copy(update={"scores": scores})}
            name = f"{run_name}-{'ab'[number]}"
            evaluate(config.model_copy(update=update), checkpoint, name, say, patience=patience if number else 0)
            table, of = read_scores(scores)
            tables.append(table)
            tasks.append(of)
    if tasks[0] != tasks[1]:
        raise DataError(f"the models have other tasks, {tasks[0]} and {tasks[1]}: they cannot be compared")
    say(f"resampling {unit}s {replicates:,} times")
    rows = {task: paired(tables[0], tables[1], task, unit) for task in tasks[0]}
    differences = differences_of(rows, replicates, config.training.seed, say)
    run = open_run(config.tracking, "compare_models", run_name, session.alive_nodes(), patience=patience)
    logger = RunLogger(run, say, config.tracking.end_wait_seconds)
    succeeded = False
    try:
        not_compared = ", ".join(task for task in rows if task not in differences)
        logger.tags({"first": first, "second": second, "not_compared": not_compared or "no task"})
        logger.params({"unit": unit, "replicates": replicates, "level": 0.95, "seed": config.training.seed}, patience)
        for task, found in differences.items():
            for d in found:
                values = {"first": d.first, "second": d.second, "difference": d.difference}
                values |= {"difference_low": d.low, "difference_high": d.high, "share_better": d.share_better}
                logger.metrics({f"compare/{task}/{d.metric}_{name}": value for name, value in values.items()})
        succeeded = True
    finally:
        logger.end(succeeded)
    units = max(int(of.unit.max(initial=-1)) + 1 for of in rows.values())
    requests = len(np.unique(tables[0].column("request_key").to_numpy()))
    return Comparison(differences, units, requests, tables[0].num_rows, run)


def difference_rows(comparison: Comparison) -> list[list[str]]:
    """Rows of text: task and metric, first, second, difference, interval, share of replicates that are better."""
    return [
        [
            f"{task}: {d.metric.upper() if d.metric != 'log_loss' else 'log loss (nats)'}",
            f"{d.first:.5f}",
            f"{d.second:.5f}",
            f"{d.difference:+.5f}",
            f"[{d.low:+.5f}, {d.high:+.5f}]",
            "yes" if d.is_significant else "no",
            f"{d.share_better:.1%}",
        ]
        for task, found in comparison.differences.items()
        for d in found
    ]
