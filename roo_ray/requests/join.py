"""The request joiner: a source of any size becomes a published version of a request data set, on Ray Data.

Stages of independent tasks (see ``stages``), then the accounting, then the manifest, which publishes. A build
that fails leaves nothing: readers see the version before it, or no data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from roo_ray.config import Config
from roo_ray.errors import ConfigError, DataError, RooError
from roo_ray.requests.accounts import add_counts, day_accounts, total_counts, total_ledger
from roo_ray.requests.assembly import Assembly, assemble, deal
from roo_ray.requests.checks import check_types
from roo_ray.requests.exchange import Survey, add_surveys, plan_exchange
from roo_ray.requests.manifest import AsideRows, Manifest, Origin, publish_manifest
from roo_ray.requests.plan import BuildPlan, Joined
from roo_ray.requests.rebuild import (
    exchange_record,
    merge_accounts,
    merge_exchange,
    merge_files,
    parent_of,
    require_days,
    same_shards,
)
from roo_ray.requests.report import (
    FAIL,
    CheckFailed,
    Finding,
    accounted,
    counts_of,
    merge_findings,
    report_json,
    require_passed,
)
from roo_ray.requests.settling import Settled, settle_days, settled_finding
from roo_ray.requests.stages import (
    Gathered,
    Scattered,
    ShardTask,
    count,
    gather,
    readable_failure,
    scatter,
    scatter_tasks,
)
from roo_ray.requests.staging import Runs, pieces_of
from roo_ray.requests.tasks import Say, run_tasks
from roo_ray.requests.two_days import TwoDays, find_two_days, two_days
from roo_ray.requests.uniqueness import ranges_for, refuse_repeated_keys, repeated_hashes, stage_kept_hashes
from roo_ray.requests.versions import (
    discard,
    is_local,
    new_origin,
    only_writer,
    remove_folder,
    remove_if_empty,
    remove_orphans,
    remove_strays,
    staging_folder,
)
from roo_ray.sources import open_source
from roo_ray.sources.base import JoinedSource, KeyedSource, ReadUnit
from roo_ray.sources.times import day_name
from roo_ray.storage import open_filesystem, without_secrets

MOST_BUCKETS = 4096
COUNTED_HERE = 4_000_000
KEPT_FILES = 16  # of other days, whose keys one task reads


def build_requests(config: Config, progress: Say) -> Manifest:
    """Builds the next version of the data set at ``config.requests`` from ``config.source`` and publishes it; with
    ``build.days`` only these days of it, and the others are those of the version before (``rebuild``).

    Ray must be initialised. ``progress`` gets a line now and then. Raises ConfigError where the config has no
    source, DataError where the data breaks a rule or another build is at work (nothing is published then, and
    nothing of this build stays), RooError where the machine fails.
    """
    if config.source is None:
        raise ConfigError("the config has no 'source' section: there is nothing to build requests from")
    paths = getattr(config.source, "path", [])
    _refuse_own_input(config, [paths] if isinstance(paths, str) else paths)
    source = open_source(config.source, config.request_schema)
    units = source.units()
    _refuse_own_input(config, [unit.root for unit in units])
    check_types(source.row_schema, config.request_schema, units[0].kind)
    with only_writer(config.requests) as version:
        parent = parent_of(config.requests, config.request_schema, config.build.days, version.number)
        plan = BuildPlan(
            source=source,
            schema=config.request_schema,
            build=config.build,
            kind=units[0].kind,
            staging=staging_folder(config.requests, version),
            data_set=config.requests,
            version=version.number,
            token=version.token,
            days=tuple(np.array(config.build.days, "datetime64[D]").astype(np.int64).tolist()),
        )
        filesystem, staging = open_filesystem(plan.staging)
        published = False
        try:
            orphans = _remove_orphans(config, progress)
            filesystem.create_dir(staging, recursive=True)
            manifest = _run(plan, units, parent, progress)
            manifest.counts.update(orphans)
            remove_strays(config.requests, version, manifest)
            publish_manifest(config.requests, manifest)
            published = True
        finally:
            remove_folder(filesystem, staging)
            remove_if_empty(filesystem, os.path.dirname(staging))
            if not published:
                discard(config.requests, version)
    return manifest


def _remove_orphans(config: Config, progress: Say) -> dict[str, int]:
    """Removes what killed builds have left on an object store; its count, for the manifest."""
    removed = 0 if is_local(config.requests) else remove_orphans(config.requests, config.build.orphan_hours * 3600)
    if not removed:
        return {}
    progress(f"removed {removed:,} files that killed builds have left")
    return {"orphan_files_removed": removed}


def _refuse_own_input(config: Config, roots: Iterable[str]) -> None:
    if config.requests in set(roots):
        raise ConfigError(f"source.path and requests are the same folder, {config.requests}; they must differ")


def _run(plan: BuildPlan, units: Sequence[ReadUnit], parent: Manifest | None, progress: Say) -> Manifest:
    rows = sum(unit.rows for unit in units)
    inputs_named = len({unit.path for unit in units})
    counts = {"units_read": len(units)}
    progress(f"reading {rows:,} rows from {inputs_named:,} files ({len(units):,} tasks)")
    aside: dict[str, AsideRows] = {}
    inputs: Sequence[ReadUnit | Joined] = units
    if isinstance(plan.source, JoinedSource):
        assemblies = _assemble_logs(plan, units, progress)
        inputs = [assembly.joined for assembly in assemblies if assembly.joined]
        surveys = [unit.survey for unit in inputs if isinstance(unit, Joined)]
        counts, aside = add_counts([counts, *(assembly.counts for assembly in assemblies)]), _aside(assemblies)
        counts |= {f"aside.{reason}": kept.rows for reason, kept in aside.items()}
        counts |= {f"rows_read.{log}": number for log, number in add_counts(a.read for a in assemblies).items()}
        if not inputs:
            raise RooError("the logs join to no request at all; nothing is published")
    else:
        surveys, astride = _count(plan, units, progress)
        plan = replace(plan, two_days=astride)
    survey = add_surveys(surveys)
    exchange = plan_exchange(survey, plan.build, plan.kind == "impressions")
    wanted = survey.total_rows
    if parent is not None:
        by_day = _rows_by_day(survey)
        require_days(plan.build.days, by_day, parent)
        exchange = same_shards(exchange, by_day, plan.build.days, parent)
        wanted = sum(by_day.get(day, 0) for day in plan.build.days)
        counts["rows_outside_days"] = survey.total_rows - wanted
        progress(f"{survey.total_rows - wanted:,} {plan.kind} are of other days than build.days and stay out")
    of_other_days = parent.requests if parent is not None else 0
    plan = replace(plan, exchange=exchange, requests_expected=survey.requests + of_other_days)

    progress(f"dealing {wanted:,} {plan.kind} to {len(exchange.shards):,} shards of {len(exchange.days)} days")
    tasks = [(some, number) for number, some in enumerate(scatter_tasks(inputs, plan.kind))]
    scattered = run_tasks(plan, "dealing", scatter, tasks, progress)
    settled = settle_days(plan, scattered, progress)
    outside = sum(part.rows_outside for part in settled)
    read = sum(result.impressions for result in scattered) - outside
    progress(f"grouping, checking and writing {read:,} impressions ({len(exchange.shards):,} tasks)")
    shard_tasks = _shard_tasks(plan, scattered, settled)
    gathered = run_tasks(plan, "writing", gather, [(task,) for task in shard_tasks], progress)
    findings = merge_findings([*(result.findings for result in gathered), settled_finding(plan, gathered, settled)])
    require_passed(findings)
    findings.append(_verify(plan, gathered, findings, parent, progress))

    files = [file for result in gathered for file in result.files]
    written = counts_of(findings) | {
        "impressions_read": read,
        "requests": sum(file.requests for file in files),
        "impressions": sum(file.impressions for file in files),
    }
    stations = {"listed": (survey.total_rows if inputs is not units else rows) - counts.get("rows_outside_days", 0)}
    stations |= {"counted": wanted, "dealt": sum(part.rows for part in scattered) - outside}
    stations |= {"grouped": sum(part.rows for part in gathered)}
    _account(plan, written, stations)
    if settled_requests := sum(part.requests for part in settled):
        counts["requests_of_two_days"] = settled_requests
    counts |= {"rows_read": rows, "impressions_read": read, **plan.source.counts()}

    pairs = zip(shard_tasks, gathered, strict=True)
    parts = [(day_name(task.shard.day), counts_of(part.findings), part.sizes) for task, part in pairs]
    accounts = day_accounts(parts, files, plan.source.disk_bytes(), survey.total_rows)
    record = exchange_record(exchange)
    if parent is not None:
        files = merge_files(plan.build.days, files, parent)
        accounts = merge_accounts(plan.build.days, accounts, parent)
        record = merge_exchange(plan.build.days, record, parent)
        again = sum(file.path in {old.path for old in parent.files} for file in files)
        progress(f"{again:,} files are those of version {parent.version}, {len(files) - again:,} are new")
    counts |= total_counts(accounts, files)
    progress(f"{counts['requests']:,} requests with {counts['impressions']:,} impressions, all accounted for")
    return Manifest(
        version=plan.version,
        origin=_origin(plan, units, parent),
        schema_yaml=plan.schema.to_yaml(),
        schema_digest=plan.schema.digest,
        files=sorted(files, key=lambda file: (file.day, file.shard, file.path)),
        aside=aside,
        counts=counts,
        ledger=total_ledger(accounts, plan.schema, files, plan.source.codec, plan.build.compression_level),
        report=report_json([accounted(plan.kind, wanted, written), *findings]),
        accounts=accounts,
        exchange=record,
    )


def _rows_by_day(survey: Survey) -> dict[str, int]:
    days, inverse = np.unique(survey.days, return_inverse=True)
    rows = np.bincount(inverse, survey.rows, len(days)).astype(np.int64)
    return {day_name(day): number for day, number in zip(days.tolist(), rows.tolist(), strict=True)}


def _origin(plan: BuildPlan, units: Sequence[ReadUnit], parent: Manifest | None) -> Origin:
    roots = sorted({without_secrets(unit.root) for unit in units})
    files = len({unit.path for unit in units})
    return new_origin(
        Origin(
            kind="full" if parent is None else "days",
            parent=None if parent is None else parent.version,
            source=f"{type(plan.source).__name__}: {files:,} files of {', '.join(roots)}",
            days=list(plan.build.days),
        )
    )


# ---- stages --------------------------------------------------------------------------------------


def _count(plan: BuildPlan, units: Sequence[ReadUnit], progress: Say) -> tuple[list[Survey], TwoDays]:
    """The surveys of all units, and the requests that have several days; of a small input by the driver itself, which
    is faster than starting tasks."""
    rows = sum(unit.rows for unit in units)
    ranges = ranges_for(rows)
    if not isinstance(plan.source, KeyedSource) or rows > COUNTED_HERE:
        counted = run_tasks(plan, "counting", count, [(unit, ranges) for unit in units], progress)
    else:
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                counted = list(pool.map(lambda unit: count(plan, unit, ranges), units))
        except Exception as error:
            raise readable_failure(error, "counting") from None
    pieces = pieces_of([runs for _, runs in counted if runs is not None], ranges)
    if ranges == 1:
        found = [find_two_days(plan, pieces[0], plan.days)]
    else:
        tasks = [(some, plan.days) for some in pieces if some]
        found = run_tasks(plan, "comparing days", find_two_days, tasks, progress)
    return [survey for survey, _ in counted], two_days(found, plan.schema)


def _assemble_logs(plan: BuildPlan, units: Sequence[ReadUnit], progress: Say) -> list[Assembly]:
    """Deals the logs of a joined source to buckets and joins each bucket. Raises RooError unless every row that
    was listed reached a bucket's join."""
    size = sum(unit.bytes for unit in units)
    buckets = max(1, min(MOST_BUCKETS, -(-size // plan.build.bucket_bytes)))
    dealt = run_tasks(plan, "reading", deal, [(unit, buckets) for unit in units], progress)
    runs: dict[str, list[Runs]] = {}
    for unit, run in zip(units, dealt, strict=True):
        runs.setdefault(unit.log, []).append(run)
    pieces = {log: pieces_of(some, buckets) for log, some in runs.items()}
    progress(f"joining the logs ({buckets} tasks)")
    tasks = [(bucket, {log: some[bucket] for log, some in pieces.items()}) for bucket in range(buckets)]
    assemblies = run_tasks(plan, "joining", assemble, tasks, progress)
    read = add_counts(assembly.read for assembly in assemblies)
    for log in runs:
        listed = sum(unit.rows for unit in units if unit.log == log)
        if listed != read.get(log, 0):
            raise RooError(
                f"rows were lost or doubled: {listed:,} rows of log '{log}' listed, {read.get(log, 0):,} joined; "
                "nothing is published. If the source's files changed during the build, run it again"
            )
    return assemblies


def _aside(assemblies: Sequence[Assembly]) -> dict[str, AsideRows]:
    kept: dict[str, AsideRows] = {}
    for assembly in assemblies:
        for reason, (rows, path) in assembly.aside.items():
            before = kept.get(reason, AsideRows(rows=0))
            kept[reason] = AsideRows(rows=before.rows + rows, files=[*before.files, *([path] if path else [])])
    return dict(sorted(kept.items()))


def _shard_tasks(plan: BuildPlan, scattered: Sequence[Scattered], settled: Sequence[Settled]) -> list[ShardTask]:
    assert plan.exchange is not None
    buckets_of_all = plan.exchange.buckets + plan.two_days.buckets
    parts: list[Scattered | Settled] = [*scattered, *settled]
    copies = pieces_of([part.copies_runs for part in parts], buckets_of_all)
    own = [part.impression_runs for part in parts if part.impression_runs is not None]
    impressions = pieces_of(own, buckets_of_all) if own else None
    tasks = []
    for index, shard in enumerate(plan.exchange.shards):
        # shards of an earlier version may have lost all their rows
        buckets = [bucket for bucket in range(shard.first, shard.last) if copies[bucket]]
        mine = [impressions[bucket] for bucket in buckets] if impressions else None
        if buckets:
            tasks.append(ShardTask(shard, index, [copies[bucket] for bucket in buckets], mine))
    return tasks


def _verify(
    plan: BuildPlan, gathered: Sequence[Gathered], findings: Sequence[Finding], parent: Manifest | None, progress: Say
) -> Finding:
    """The finding that no request key is in more than one bucket, nor in a day that ``parent`` keeps. Raises
    CheckFailed, with all ``findings``, where one is."""
    ranges = plan.key_ranges
    files_of = [part.files for part in gathered]
    runs = {index: part.keys for index, part in enumerate(gathered) if part.keys}
    if parent is not None and plan.build.check_other_days:
        kept = [file for file in parent.files if file.day not in set(plan.build.days)]
        parts = [kept[at : at + KEPT_FILES] for at in range(0, len(kept), KEPT_FILES)]
        keys_of = plan.schema.keys.request
        # staged under numbers that no shard has
        first = max([len(plan.exchange.shards) if plan.exchange else 0, len(gathered)])
        tasks = [(plan.data_set, keys_of, first + at, some, ranges) for at, some in enumerate(parts)]
        others = run_tasks(plan, "reading keys of other days", stage_kept_hashes, tasks, progress)
        runs |= {len(files_of) + at: run for at, run in enumerate(others)}
        files_of += parts
    staged = {run.name: (index, run) for index, run in runs.items()}
    pieces = pieces_of([keys for _, keys in staged.values()], ranges)
    if ranges == 1:
        found = [repeated_hashes(plan, pieces[0])]
    else:
        found = run_tasks(plan, "comparing keys", repeated_hashes, [(some,) for some in pieces], progress)
    repeated = [
        (value, [staged[some[at].name][0] for at in at_pieces])
        for some, values in zip(pieces, found, strict=True)
        for value, at_pieces in values
    ]
    requests = sum(file.requests for part in gathered for file in part.files)
    keys = ", ".join(plan.schema.keys.request)
    unique = Finding("request key of two users or days", keys, requests, "requests", 0, FAIL)
    try:
        refused_by_rule = parent is None and plan.kind == "impressions" and plan.build.on_request_conflict == FAIL
        refuse_repeated_keys(plan.data_set, plan.schema, repeated, files_of, refused_by_rule)
    except DataError as error:
        failed = replace(unique, found=1, problem=str(error))
        raise CheckFailed(str(error), [failed, *findings]) from None
    return unique


# ---- accounting ----------------------------------------------------------------------------------


def _account(plan: BuildPlan, counts: dict[str, int], stations: dict[str, int]) -> None:
    """Raises RooError unless every row that the footers list was counted, dealt, regrouped and written."""
    if plan.kind == "requests":
        stations["written"] = counts["requests"]
    accounted_for = counts["impressions"] + counts.get("dropped_impressions", 0)
    if len(set(stations.values())) > 1 or counts["impressions_read"] != accounted_for:
        found = ", ".join(f"{number:,} {station}" for station, number in stations.items())
        raise RooError(
            f"rows were lost or doubled: {found} {plan.kind}; {counts['impressions_read']:,} impressions "
            f"read, {accounted_for:,} written or dropped by rule; nothing is published. If the source's files "
            "changed during the build, run it again"
        )
