"""The request joiner: a source of any size becomes a published version of a request data set, on Ray Data.

Two stages of independent tasks (see ``stages``), then the accounting, then the manifest, which publishes. A
build that fails leaves nothing: readers see the version before it, or no data set.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import ray

from roo_ray.config import Config
from roo_ray.errors import BadInput, ConfigError, DataError, RooError
from roo_ray.requests.checks import check_types
from roo_ray.requests.ledger import build_ledger
from roo_ray.requests.manifest import Manifest, manifest_versions, publish_manifest
from roo_ray.requests.report import accounted, counts_of, merge_findings, report_json, require_passed
from roo_ray.requests.shards import DATA, version_folder
from roo_ray.requests.stages import BuildPlan, Gathered, Scattered, gather, readable_failure, scatter
from roo_ray.sources import open_source
from roo_ray.sources.base import ReadUnit
from roo_ray.storage import open_filesystem

STAGING = "_staging"
BUCKET_BYTES = 128_000_000
LEAST_BUCKETS, MOST_BUCKETS = 4, 4096
SECONDS_BETWEEN_WORDS = 3.0
ABORT = "ABORT"

Say = Callable[[str], None]
Result = TypeVar("Result")


def build_requests(config: Config, progress: Say) -> Manifest:
    """Builds the next version of the data set at ``config.requests`` from ``config.source`` and publishes it.

    Ray must be initialised. ``progress`` gets a line now and then. Raises ConfigError where the config has no
    source, DataError where the data breaks a rule or another build is at work (nothing is published then, and
    nothing of this build stays), RooError where the machine fails.
    """
    if config.source is None:
        raise ConfigError("the config has no 'source' section: there is nothing to build requests from")
    paths = config.source.path if isinstance(config.source.path, list) else [config.source.path]
    if config.requests in paths:
        raise ConfigError(f"source.path and requests are the same folder, {config.requests}; they must differ")
    source = open_source(config.source, config.request_schema)
    units = source.units()
    check_types(source.row_schema, config.request_schema, units[0].kind)
    with _only_writer(config.requests) as version:
        plan = BuildPlan(
            source=source,
            schema=config.request_schema,
            build=config.build,
            kind=units[0].kind,
            buckets=config.build.buckets or _default_buckets(units),
            staging=_join(config.requests, STAGING, uuid.uuid4().hex[:12]),
            data_set=config.requests,
            version=version,
            token="" if _is_local(config.requests) else uuid.uuid4().hex[:8],
        )
        filesystem, staging = open_filesystem(plan.staging)
        data = f"{open_filesystem(config.requests)[1]}/{version_folder(version, plan.token)}"
        published = False
        try:
            filesystem.create_dir(staging, recursive=True)
            manifest = _run(plan, units, progress)
            _remove_strays(filesystem, data, manifest)
            publish_manifest(config.requests, manifest)
            published = True
        finally:
            _remove(filesystem, staging)
            _remove_if_empty(filesystem, os.path.dirname(staging))
            if not published:
                _remove(filesystem, data)
                _remove_if_empty(filesystem, os.path.dirname(data))
    return manifest


def _run(plan: BuildPlan, units: Sequence[ReadUnit], progress: Say) -> Manifest:
    rows = sum(unit.rows for unit in units)
    files = len({unit.path for unit in units})
    progress(f"reading {rows:,} {plan.kind} from {files:,} files into {plan.buckets} buckets ({len(units):,} tasks)")
    scattered = _map(plan, "reading", [(scatter, (plan, unit)) for unit in units], Scattered, progress)
    read = sum(result.impressions for result in scattered)
    progress(f"grouping, checking and writing {read:,} impressions ({plan.buckets} tasks)")
    tasks = [(gather, (plan, bucket, len(units))) for bucket in range(plan.buckets)]
    gathered = _map(plan, "writing", tasks, Gathered, progress)

    shards = sorted((file for result in gathered for file in result.files), key=lambda file: file.path)
    counts = {"units_read": len(units), "rows_read": sum(result.rows for result in scattered)}
    counts |= {"impressions_read": read, **plan.source.counts()}
    findings = merge_findings(result.findings for result in gathered)
    require_passed(findings)
    counts |= counts_of(findings)
    counts["requests"] = sum(file.requests for file in shards)
    counts["impressions"] = sum(file.impressions for file in shards)
    _account(plan, counts, rows, sum(result.rows for result in gathered))
    progress(f"{counts['requests']:,} requests with {counts['impressions']:,} impressions, all accounted for")
    return Manifest(
        version=plan.version,
        schema_yaml=plan.schema.to_yaml(),
        schema_digest=plan.schema.digest,
        files=shards,
        counts=counts,
        ledger=build_ledger(
            plan.schema,
            [result.sizes for result in gathered],
            shards,
            logged=plan.source.disk_bytes(),
            codec=plan.source.codec,
            level=plan.build.compression_level,
        ),
        report=report_json([accounted(plan.kind, rows, counts), *findings]),
    )


def _kept_and_dropped(counts: dict[str, int]) -> int:
    return counts["impressions"] + counts.get("dropped_impressions", 0)


def _account(plan: BuildPlan, counts: dict[str, int], listed: int, gathered: int) -> None:
    """Raises RooError unless every row that the footers list was read, regrouped and written."""
    stations = {"listed in footers": listed, "read": counts["rows_read"], "grouped": gathered}
    if plan.kind == "requests":
        stations["written"] = counts["requests"]
    if len(set(stations.values())) > 1 or _kept_and_dropped(counts) != counts["impressions_read"]:
        found = ", ".join(f"{number:,} {station}" for station, number in stations.items())
        raise RooError(
            f"rows were lost or doubled: {found} {plan.kind}; {counts['impressions_read']:,} impressions read, "
            f"{_kept_and_dropped(counts):,} written or dropped by rule; nothing is published. If the source's "
            "files changed during the build, run it again"
        )


# ---- tasks ---------------------------------------------------------------------------------------


def _run_task(batch: pa.Table, plan: BuildPlan, what: str) -> pa.Table:
    """Runs a task in a Ray Data worker; errors come back as values, so that one clear line reaches the user."""
    number = batch.column("number")[0].as_py()
    filesystem, staging = open_filesystem(plan.staging)
    outcome: tuple[str, Any]
    try:
        if filesystem.get_file_info(f"{staging}/{ABORT}").type != pafs.FileType.NotFound:
            outcome = ("skipped", None)
        else:
            function, arguments = pickle.loads(batch.column("task")[0].as_py())
            outcome = ("done", function(plan, *arguments))
    except Exception as error:
        readable = readable_failure(error, f"{what} (task {number})")
        kind = "refused" if isinstance(readable, BadInput) else "failed"
        trace = "" if isinstance(error, RooError) else f"\n{traceback.format_exc()}"
        outcome = (kind, str(readable) if kind == "refused" else f"{readable}{trace}")
    return pa.table({"number": [number], "outcome": [pickle.dumps(outcome)]})


def _map(
    plan: BuildPlan,
    what: str,
    tasks: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
    kind: type[Result],
    progress: Say,
) -> list[Result]:
    """The results of all tasks, in order. After a failure no further task begins, those at work end, and the
    failure of the first task in order is raised."""
    # the plan travels once, with the function, not with each task
    items = [
        {"number": number, "task": pickle.dumps((function, arguments[1:]))}
        for number, (function, arguments) in enumerate(tasks)
    ]
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _run_task, batch_size=None, batch_format="pyarrow", fn_kwargs={"plan": plan, "what": what}
    )
    results: dict[int, Result] = {}
    failures: dict[int, RooError] = {}
    said = time.monotonic()
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for number, packed in zip(batch.column("number").to_pylist(), batch.column("outcome"), strict=True):
            state, value = pickle.loads(packed.as_py())
            if state == "done":
                assert isinstance(value, kind)
                results[number] = value
            elif state != "skipped":
                failures[number] = DataError(value) if state == "refused" else RooError(value)
                filesystem, staging = open_filesystem(plan.staging)
                filesystem.open_output_stream(f"{staging}/{ABORT}").close()
        if time.monotonic() - said > SECONDS_BETWEEN_WORDS:
            said = time.monotonic()
            progress(f"{what}: {len(results):,} of {len(tasks):,} tasks done")
    if failures:
        raise failures[min(failures)]
    if len(results) != len(tasks):
        raise RooError(f"{what}: {len(tasks) - len(results)} of {len(tasks)} tasks gave no result; run it again")
    return [results[number] for number in range(len(tasks))]


def _default_buckets(units: Sequence[ReadUnit]) -> int:
    size = sum(unit.bytes for unit in units)
    return max(LEAST_BUCKETS, min(MOST_BUCKETS, -(-size // BUCKET_BYTES)))


# ---- versions and clean-up -----------------------------------------------------------------------


def _join(path: str, *parts: str) -> str:
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


def _data_versions(filesystem: pafs.FileSystem, base: str) -> list[int]:
    listing = filesystem.get_file_info(pafs.FileSelector(f"{base}/{DATA}", allow_not_found=True))
    names = [os.path.basename(item.path) for item in listing if item.type == pafs.FileType.Directory]
    return [int(name[1:]) for name in names if name[:1] == "v" and name[1:].isdigit()]


def _is_local(data_set: str) -> bool:
    return isinstance(open_filesystem(data_set)[0], pafs.LocalFileSystem)


@contextmanager
def _only_writer(data_set: str) -> Iterator[int]:
    """The number of the version to build, as its only writer.

    Locally a lock on the data set's folder, which the system drops with the process, keeps a second build out;
    what a killed build left is removed. On an object store, where there is no lock, each build
    writes to a folder of its own, and the manifest's publication decides.
    """
    filesystem, base = open_filesystem(data_set)
    newest = max(manifest_versions(data_set), default=0)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield newest + 1
        return
    os.makedirs(base, exist_ok=True)
    folder = os.open(base, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another build is writing {data_set}; wait for it or stop it") from None
        newest = max(manifest_versions(data_set), default=0)
        _remove(filesystem, f"{base}/{STAGING}")
        for version in _data_versions(filesystem, base):
            if version > newest:
                _remove(filesystem, f"{base}/{version_folder(version)}")
        yield newest + 1
    finally:
        os.close(folder)


def _remove(filesystem: pafs.FileSystem, folder: str) -> None:
    if filesystem.get_file_info(folder).type == pafs.FileType.Directory:
        filesystem.delete_dir(folder)


def _remove_if_empty(filesystem: pafs.FileSystem, folder: str) -> None:
    info = filesystem.get_file_info(folder)
    if info.type == pafs.FileType.Directory and not filesystem.get_file_info(pafs.FileSelector(folder)):
        filesystem.delete_dir(folder)


def _remove_strays(filesystem: pafs.FileSystem, data: str, manifest: Manifest) -> None:
    """Removes what a task that was killed and run again has left half-written."""
    named = {file.path.rsplit("/", 2)[-2] + "/" + file.path.rsplit("/", 1)[-1] for file in manifest.files}
    for item in filesystem.get_file_info(pafs.FileSelector(data, recursive=True)):
        inside = "/".join(item.path.split("/")[-2:])
        if item.type == pafs.FileType.File and inside not in named:
            filesystem.delete_file(item.path)
