"""A synthetic impression log as a logging system writes it, with a planted click model (``planted``).

One row per impression, the user's features and history repeated on each, in no order: a task of Ray Data makes
a slice of the requests and scatters their rows over several Parquet files. The content depends on the settings
alone, not on the number of CPUs. ``_synthetic.json`` is written last: without it, the log is not complete.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import ValidationError

from roo_ray.errors import BadInput, DataError, RooError
from roo_ray.schema import Strict
from roo_ray.source_config import SyntheticSource
from roo_ray.sources.planted import Floats
from roo_ray.sources.synthetic_slice import (
    bias_of,
    check_settings,
    generate_slice,
    make_slice,
    tasks_of,
)
from roo_ray.storage import open_filesystem

__all__ = ["SyntheticSummary", "generate", "generate_slice", "load_summary", "require_complete"]

SUMMARY = "_synthetic.json"
MARKER = "_generating.json"
FORMAT = 1
FILES_PER_TASK = 4
ROW_GROUP_ROWS = 100_000
LOGIT_BINS, LOGIT_REACH = 16_384, 12.0


class SyntheticSummary(Strict):
    """What a complete log holds.

    ``base_rate``: share of clicks. ``bayes_ne``: mean entropy of the true probabilities over the entropy of the
    base rate. ``bayes_auc``: AUC of the true probability, in expectation over the labels (``bayes_auc_is``).
    ``bias``: the planted model's, set so that the click rate is near 12.5 %.
    """

    format: int = FORMAT
    settings: dict[str, Any]
    requests: int
    impressions: int
    clicks: int
    base_rate: float
    mean_probability: float
    bayes_ne: float
    bayes_auc: float
    bayes_auc_is: str = f"from a histogram of {LOGIT_BINS} logit bins"
    bias: float
    files: int
    bytes: int


@dataclass(frozen=True)
class _Folder:
    """A local folder or one on an object store; files appear in it complete or not at all."""

    filesystem: pafs.FileSystem
    base: str

    @staticmethod
    def open(path: str) -> _Folder:
        return _Folder(*open_filesystem(path))

    def entries(self) -> dict[str, int]:
        """Name -> bytes of what is in the folder; empty where there is none."""
        listing = self.filesystem.get_file_info(pafs.FileSelector(self.base, allow_not_found=True))
        return {os.path.basename(info.path): int(info.size or 0) for info in listing}

    def write(self, name: str, write: Callable[[pa.NativeFile], None]) -> None:
        local = isinstance(self.filesystem, pafs.LocalFileSystem)  # elsewhere a put is atomic
        target = f"{self.base}/.{name}.{os.getpid()}.tmp" if local else f"{self.base}/{name}"
        with self.filesystem.open_output_stream(target) as stream:
            write(stream)
        if local:
            self.filesystem.move(target, f"{self.base}/{name}")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write(name, lambda stream: stream.write(json.dumps(content, indent=1).encode()))

    def read(self, name: str) -> str:
        with self.filesystem.open_input_stream(f"{self.base}/{name}") as stream:
            return bytes(stream.read()).decode()

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a task of an interrupted generation may just have moved it
            self.filesystem.delete_file(f"{self.base}/{name}")


def _is_ours(name: str) -> bool:
    data = name.startswith("part-") and name.endswith(".parquet")
    unfinished = name.startswith((".part-", "._")) and name.endswith(".tmp")
    return data or unfinished or name in (SUMMARY, MARKER)


def _settings(source: SyntheticSource) -> dict[str, Any]:
    return source.model_dump(mode="json", exclude={"path", "reuse"})


def load_summary(path: str) -> SyntheticSummary | None:
    """The summary of the complete synthetic log at a path; None where there is none."""
    folder = _Folder.open(path)
    if SUMMARY not in folder.entries():
        return None
    try:
        return SyntheticSummary.model_validate_json(folder.read(SUMMARY))
    except ValidationError:
        return None  # of another version of this generator


def require_complete(path: str) -> SyntheticSummary:
    """The summary of the synthetic log at a path. Raises DataError where it is not there or not complete."""
    if found := load_summary(path):
        return found
    if MARKER in _Folder.open(path).entries():
        raise DataError(f"the synthetic log at {path} is not complete: its generation was interrupted; run it again")
    raise DataError(f"no synthetic log at {path}: run the build again, which generates it")


def _claim(source: SyntheticSource, folder: _Folder) -> None:
    """Makes the folder ours and empty; the first thing to go is what says that a log in it is complete."""
    entries = folder.entries()
    foreign = sorted(name for name in entries if not _is_ours(name))
    if foreign or (entries and SUMMARY not in entries and MARKER not in entries):
        example = foreign[0] if foreign else sorted(entries)[0]
        raise BadInput(
            f"source.path {source.path} holds other data than a synthetic log ('{example}'), which is not "
            "overwritten; choose another path or remove it"
        )
    try:
        folder.filesystem.create_dir(folder.base, recursive=True)
        folder.write_json(MARKER, {"format": FORMAT, "settings": _settings(source)})
    except OSError as error:
        raise BadInput(f"source.path {source.path} cannot be written: {error}") from None
    for name in sorted(entries, key=lambda name: name != SUMMARY):
        if name != MARKER:
            folder.delete(name)


def _write_task(row: dict[str, Any], source: SyntheticSource) -> dict[str, Any]:
    """A Ray Data map: makes and writes a task's files; returns counts and sums."""
    task = int(row["id"])
    rows = make_slice(source, task)
    folder = _Folder.open(source.path)
    folder.filesystem.create_dir(folder.base, recursive=True)
    for part, table in enumerate(rows.tables(FILES_PER_TASK)):
        folder.write(
            f"part-{task:06d}-{part}.parquet",
            lambda stream, table=table: pq.write_table(  # type: ignore[misc]
                table, stream, compression="zstd", row_group_size=ROW_GROUP_ROWS
            ),
        )
    p = rows.probability.astype(np.float64)
    logit = np.log(p) - np.log1p(-p)
    bins = ((logit / LOGIT_REACH + 1) * (LOGIT_BINS / 2)).clip(0, LOGIT_BINS - 1).astype(np.int64)
    positives = np.bincount(bins, np.rint(p * 2**24), LOGIT_BINS)
    return {
        "requests": len(rows.user),
        "impressions": len(p),
        "clicks": int(rows.clicked.sum()),
        "probability": float(p.sum()),
        "entropy": float(entropy(p).sum()),
        # units of 2^-24, whole numbers: their sum does not depend on the order of the tasks
        "positives": positives.astype(np.int64),
        "negatives": np.bincount(bins, minlength=LOGIT_BINS) * 2**24 - positives.astype(np.int64),
    }


def entropy(p: Floats) -> Floats:
    """Binary entropy in nats of (N,) probabilities."""
    q = np.clip(p, 1e-300, 1 - 1e-16)
    return np.asarray(-(q * np.log(q) + (1 - q) * np.log1p(-q)), np.float64)


def histogram_auc(positives: Floats, negatives: Floats) -> float:
    """AUC from weights per bin of the score; pairs within a bin count one half."""
    below = np.cumsum(negatives) - negatives
    pairs = positives.sum() * negatives.sum()
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else math.nan


def generate(source: SyntheticSource, progress: Callable[[str], None]) -> SyntheticSummary:
    """Writes the log of the settings to ``source.path`` by Ray Data tasks and returns its summary.

    Ray must be initialised. With ``reuse``, a complete log of equal settings is left as it is. A synthetic log
    of other settings, and what an interrupted generation left, is replaced. Raises BadInput where settings do
    not fit, or where the path holds anything else or is not one folder for all nodes.
    """
    import ray
    from ray.exceptions import RayError

    from roo_ray import session

    check_settings(source)
    folder = _Folder.open(source.path)
    if folder.filesystem.get_file_info(folder.base).type == pafs.FileType.File:
        raise BadInput(f"source.path {source.path} is a file; name a folder for the synthetic log")
    if source.reuse and (found := _reusable(source, folder)):
        progress(f"synthetic log at {source.path}: complete with these settings, reused")
        return found
    _claim(source, folder)
    bias = bias_of(source)
    tasks, begin, said = tasks_of(source), time.perf_counter(), 0.0
    done: list[dict[str, Any]] = []
    totals = {side: np.zeros(LOGIT_BINS) for side in ("positives", "negatives")}
    requests = impressions = clicks = 0
    progress(f"generating {source.requests:,} requests into {source.path}")
    items = ray.data.from_items([{"id": task} for task in range(tasks)], override_num_blocks=tasks)
    log = items.map(partial(_write_task, source=source), resources=session.placing().resources)
    try:
        for result in log.iter_rows():
            for side, total in totals.items():
                total += result.pop(side)
            requests += int(result["requests"])
            impressions += int(result["impressions"])
            clicks += int(result["clicks"])
            done.append(result)
            if len(done) == tasks or time.perf_counter() - said > 2:
                said = time.perf_counter()
                progress(
                    f"generated {requests:,} of {source.requests:,} requests, "
                    f"{impressions:,} impressions, {said - begin:.0f} s"
                )
    except RayError as error:
        # Ray's text is the task's traceback, then its own; the traceback's last line says what happened
        reason = str(error).split("\n\nThe above exception")[0].strip().splitlines()[-1]
        raise RooError(f"generating the synthetic log at {source.path} failed: {reason}") from None
    files = {name: size for name, size in folder.entries().items() if name.endswith(".parquet")}
    if len(files) != tasks * FILES_PER_TASK:
        raise BadInput(
            f"source.path {source.path} has {len(files)} of {tasks * FILES_PER_TASK} files: its nodes do not "
            "share it; use a shared file system or s3://... / gs://..."
        )
    rate = clicks / impressions
    # fsum: exactly rounded, so independent of the order in which tasks end
    mean_entropy = math.fsum(r["entropy"] for r in done) / impressions
    base_entropy = float(entropy(np.array([rate]))[0])
    summary = SyntheticSummary(
        settings=_settings(source),
        requests=requests,
        impressions=impressions,
        clicks=clicks,
        base_rate=rate,
        mean_probability=math.fsum(r["probability"] for r in done) / impressions,
        bayes_ne=mean_entropy / base_entropy if 0 < rate < 1 else math.nan,
        bayes_auc=histogram_auc(totals["positives"], totals["negatives"]),
        bias=bias,
        files=len(files),
        bytes=sum(files.values()),
    )
    folder.write_json(SUMMARY, summary.model_dump(mode="json"))
    folder.delete(MARKER)
    return summary


def _reusable(source: SyntheticSource, folder: _Folder) -> SyntheticSummary | None:
    found = load_summary(source.path)
    if found is None or found.format != FORMAT or found.settings != _settings(source):
        return None
    files = {name: size for name, size in folder.entries().items() if name.endswith(".parquet")}
    return found if (len(files), sum(files.values())) == (found.files, found.bytes) else None
