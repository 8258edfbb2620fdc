"""Forgetting users: a new version without their requests, and the old versions that hold them purged.

Only files that hold the users are written anew; all others are named again. The new version is published by its
manifest, as every version is; the manifest also names the versions to purge, so that a purge that is interrupted
is finished by whoever writes the data set next (``versions.finish_purge``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray.config import Build
from roo_ray.errors import RooError
from roo_ray.requests.accounts import impressions_by_day, total_counts, total_ledger, without
from roo_ray.requests.assembly import aside_folder
from roo_ray.requests.examine import examine_requests
from roo_ray.requests.ledger import Sizes, measure_requests
from roo_ray.requests.manifest import AsideRows, Manifest, Origin, ShardFile, load_manifest, publish_manifest
from roo_ray.requests.report import counts_of
from roo_ray.requests.scan import Held, find_users, rows_of_users
from roo_ray.requests.shards import WriteOptions, column_bytes, read_row_group, write_options, write_shards, write_whole
from roo_ray.requests.tasks import Say, run_tasks
from roo_ray.requests.users import read_users, user_type
from roo_ray.requests.versions import (
    NextVersion,
    discard,
    finish_purge,
    live_versions,
    named_files,
    new_origin,
    only_writer,
    remove_folder,
    remove_if_empty,
    remove_strays,
    staging_folder,
)
from roo_ray.schema import Schema
from roo_ray.sources.base import open_parquet
from roo_ray.storage import open_filesystem

LISTED = 20
FILES_A_TASK = 32
AS_STORED = Build(on_leaking_history="count", on_duplicate_impression="fail")


@dataclass(frozen=True)
class ForgetPlan:
    """What every task knows. ``users``: sorted, of the user column's type."""

    data_set: str
    schema: Schema
    options: WriteOptions
    users: pa.Array
    version: NextVersion
    staging: str


@dataclass(frozen=True)
class Rewritten:
    """What the files of one shard became. ``counts`` and ``sizes`` of the requests that are gone, with the disk
    bytes that the files lost."""

    files: list[ShardFile]
    requests: int
    impressions: int
    counts: dict[str, int]
    sizes: Sizes


@dataclass(frozen=True)
class ForgetReport:
    """What was done. ``version``: the new one, None where no version held any of the users. ``not_found``: the
    first of those that no version held. Bytes: of the version's data files. ``aside_unchecked``: files of rows kept
    aside that have no user column; ``purged``: versions that can no longer be read; ``deleted``: files of them."""

    data_set: str
    version: int | None
    users_given: int
    users_found: int
    not_found: list[str] = field(default_factory=list)
    requests_removed: int = 0
    impressions_removed: int = 0
    aside_rows_removed: int = 0
    files_rewritten: int = 0
    files_kept: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    aside_unchecked: list[str] = field(default_factory=list)
    purged: list[int] = field(default_factory=list)
    deleted: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def forget_users(data_set: str, given: str, build: Build, progress: Say) -> ForgetReport:
    """Publishes a version of a data set without the requests of the users that ``given`` names (``users.read_users``)
    and purges the versions that hold them. Ray must be initialised.

    ``build``: how the rewritten files are written. Raises DataError where an id has another type than the user
    column, a file is damaged, or another writer is at work: nothing has changed then.
    """
    load_manifest(data_set)
    with only_writer(data_set) as version:
        current = load_manifest(data_set)
        schema = current.request_schema()
        users = read_users(given, schema.keys.user, user_type(data_set, current))
        plan = ForgetPlan(
            data_set=data_set,
            schema=schema,
            options=write_options(build),
            users=users,
            version=version,
            staging=staging_folder(data_set, version),
        )
        filesystem, staging = open_filesystem(plan.staging)
        published = False
        try:
            filesystem.create_dir(staging, recursive=True)
            live = live_versions(data_set)
            held = _scan(plan, live, progress)
            report = _found(plan, current, held)
            if not any(item.rows for item in held.values()):
                return report
            manifest, report = _forget(plan, current, live, held, report, progress)
            remove_strays(data_set, version, manifest)
            publish_manifest(data_set, manifest)
            published = True
        finally:
            remove_folder(filesystem, staging)
            remove_if_empty(filesystem, os.path.dirname(staging))
            if not published:
                discard(data_set, version)
        progress(f"version {manifest.version} is published; purging {len(report.purged)} older ones")
        deleted = finish_purge(data_set)
    return replace(report, deleted=len(deleted))


def resume_purge(data_set: str) -> list[str]:
    """Finishes a purge that was interrupted; returns the files it deleted."""
    load_manifest(data_set)
    with only_writer(data_set, resume=False):
        return finish_purge(data_set)


# ---- finding -------------------------------------------------------------------------------------


def _scan(plan: ForgetPlan, live: dict[int, Manifest], progress: Say) -> dict[str, Held]:
    """Every file of every version that can be read -> what it holds of the users."""
    paths = sorted({path for manifest in live.values() for path in named_files(manifest)})
    progress(f"looking for {len(plan.users):,} users in {len(paths):,} files of {len(live)} versions")
    groups = [paths[at : at + FILES_A_TASK] for at in range(0, len(paths), FILES_A_TASK)]
    found = run_tasks(plan, "looking", scan_files, [(group,) for group in groups], progress)
    return {item.path: item for part in found for item in part}


def scan_files(plan: ForgetPlan, paths: Sequence[str]) -> list[Held]:
    """What some files hold of the users."""
    return [find_users(plan.data_set, path, plan.schema.keys.user, plan.users) for path in paths]


def _found(plan: ForgetPlan, current: Manifest, held: dict[str, Held]) -> ForgetReport:
    seen = np.zeros(len(plan.users), np.bool_)
    for item in held.values():
        seen[item.users] = True
    missing = plan.users.filter(pa.array(~seen))
    size = sum(file.bytes for file in current.files)
    return ForgetReport(
        data_set=plan.data_set,
        version=None,
        users_given=len(plan.users),
        users_found=int(seen.sum()),
        not_found=[str(value) for value in missing.slice(0, LISTED).to_pylist()],
        files_kept=len(current.files),
        bytes_before=size,
        bytes_after=size,
        aside_unchecked=[path for rows in current.aside.values() for path in rows.files if not held[path].checked],
    )


# ---- rewriting -----------------------------------------------------------------------------------


def _forget(
    plan: ForgetPlan,
    current: Manifest,
    live: dict[int, Manifest],
    held: dict[str, Held],
    report: ForgetReport,
    progress: Say,
) -> tuple[Manifest, ForgetReport]:
    shards: dict[tuple[str, int], list[ShardFile]] = {}
    for file in current.files:
        if held[file.path].rows:
            shards.setdefault((file.day, file.shard), []).append(file)
    progress(f"rewriting {sum(map(len, shards.values())):,} of {len(current.files):,} files")
    results = run_tasks(plan, "rewriting", rewrite_files, [(files,) for files in shards.values()], progress)
    expected = sum(held[file.path].rows for files in shards.values() for file in files)
    if (gone := sum(result.requests for result in results)) != expected:
        raise RooError(f"{expected:,} requests of the users were found and {gone:,} removed; nothing is published")
    touched = {file.path for files in shards.values() for file in files}
    files = [file for file in current.files if file.path not in touched]
    kept = len(files)
    files = sorted([*files, *(file for result in results for file in result.files)], key=lambda file: file.path)
    aside, aside_gone = _aside(plan, current, held, progress)
    origin = Origin(
        kind="forget",
        parent=current.version,
        source=current.origin.source,
        purges=[number for number, item in live.items() if any(held[path].rows for path in named_files(item))],
    )
    changes: dict[str, Any] = {
        "version": plan.version.number,
        "origin": new_origin(origin),
        "files": files,
        "aside": aside,
    }
    accounts = _accounts(plan, current, files, list(shards), results, aside)
    manifest = current.model_copy(update=changes | accounts)
    theirs = {user for file in current.files for user in held[file.path].users.tolist()}
    manifest = manifest.model_copy(update={"report": carried_report(current, manifest, len(theirs))})
    return manifest, replace(
        report,
        version=manifest.version,
        requests_removed=current.requests - manifest.requests,
        impressions_removed=current.impressions - manifest.impressions,
        aside_rows_removed=aside_gone,
        files_rewritten=len(touched),
        files_kept=kept,
        bytes_after=sum(file.bytes for file in files),
        purged=manifest.origin.purges,
    )


def carried_report(before: Manifest, after: Manifest, users: int) -> dict[str, Any]:
    """The validation report of a version that is ``before`` without so many users: its own requests and impressions
    and those that are gone, and the checks of the version that was checked (``of_version``), each marked as
    ``carried_over``, for they looked at its rows. Without the offenders that those show, which may be rows of those
    who are forgotten."""
    if not before.report:
        return {}
    own = {
        "version": after.version,
        "requests": after.requests,
        "impressions": after.impressions,
        "users_removed": users,
        "requests_removed": before.requests - after.requests,
        "impressions_removed": before.impressions - after.impressions,
    }
    checks = [check | {"first": "", "message": "", "carried_over": True} for check in before.report["checks"]]
    return {"of_version": before.version, **before.report, **own, "checks": checks}


def rewrite_files(plan: ForgetPlan, files: Sequence[ShardFile]) -> Rewritten:
    """Writes the requests of some files of one shard anew, without the users; memory is that of the files."""
    kept, gone = [], []
    for file in files:
        for unit in range(len(file.units)):
            requests = read_row_group(plan.data_set, file.path, unit)
            theirs = rows_of_users(requests.column(plan.schema.keys.user), plan.users)
            kept.append(requests.filter(pa.array(~theirs)))
            gone.append(requests.filter(pa.array(theirs)))
    removed = pa.concat_tables(gone).combine_chunks()
    sizes = measure_requests(removed, plan.schema)
    for kinds in sizes.values():
        kinds["disk_bytes"] = {"impression": 0, "request": 0}
    for file in files:
        with open_parquet(plan.data_set, f"{open_filesystem(plan.data_set)[1]}/{file.path}") as parquet:
            for name, size in column_bytes(parquet.metadata).items():
                sizes[name]["disk_bytes"]["request"] += size
    written = []
    remaining = pa.concat_tables(kept).combine_chunks()
    del kept, gone
    if remaining.num_rows:
        version, shard = plan.version, files[0].shard
        for shard_file, bytes_of in write_shards(
            remaining, plan.schema, plan.options, plan.data_set, version.number, shard, version.token
        ):
            written.append(shard_file)
            for name, size in bytes_of.items():
                sizes[name]["disk_bytes"]["request"] -= size
    before = sum(file.impressions for file in files)
    return Rewritten(
        files=written,
        requests=removed.num_rows,
        impressions=before - sum(file.impressions for file in written),
        counts=counts_of(examine_requests(removed, plan.schema, AS_STORED)[1]),
        sizes=sizes,
    )


def _accounts(
    plan: ForgetPlan,
    current: Manifest,
    files: Sequence[ShardFile],
    shards: Sequence[tuple[str, int]],
    results: Sequence[Rewritten],
    aside: dict[str, AsideRows],
) -> dict[str, Any]:
    """Accounts, counts and ledger of what is left."""
    before, after = impressions_by_day(current.files), impressions_by_day(files)
    accounts = dict(current.accounts)
    for (day, _), result in zip(shards, results, strict=True):
        if day in accounts:
            at_most = before[day]
            before[day] -= result.impressions
            accounts[day] = without(accounts[day], result.counts, result.sizes, at_most, before[day])
    accounts = {day: account for day, account in accounts.items() if after.get(day)}
    counts = current.counts | total_counts(accounts, files)
    counts |= {f"aside.{reason}": kept.rows for reason, kept in aside.items()}
    ledger = total_ledger(accounts, plan.schema, files, "", plan.options.compression_level)
    if ledger:
        ledger["how"] = str(current.ledger.get("how", ""))
    return {"accounts": accounts, "counts": counts, "ledger": ledger}


# ---- rows kept aside -----------------------------------------------------------------------------


def _aside(
    plan: ForgetPlan, current: Manifest, held: dict[str, Held], progress: Say
) -> tuple[dict[str, AsideRows], int]:
    """(the rows kept aside without those of the users, how many those were)."""
    paths = [path for rows in current.aside.values() for path in rows.files if held[path].rows]
    replaced = dict(
        zip(paths, run_tasks(plan, "rewriting", rewrite_aside, [(p,) for p in paths], progress), strict=True)
    )
    aside = {}
    for reason, rows in current.aside.items():
        files = [replaced.get(path, path) for path in rows.files]
        gone = sum(held[path].rows for path in rows.files)
        if rows.rows > gone:
            aside[reason] = AsideRows(rows=rows.rows - gone, files=[path for path in files if path])
    return aside, sum(held[path].rows for path in paths)


def rewrite_aside(plan: ForgetPlan, path: str) -> str:
    """Writes a file of rows kept aside anew, without the users; returns its path, empty where no row is left."""
    filesystem, base = open_filesystem(plan.data_set)
    with open_parquet(plan.data_set, f"{base}/{path}") as file:
        table = file.read()
    left = table.filter(pa.array(~rows_of_users(table.column(plan.schema.keys.user), plan.users)))
    if not left.num_rows:
        return ""
    name = os.path.basename(os.path.dirname(path))
    target = f"{aside_folder(plan.version.number, plan.version.token)}/{name}/{os.path.basename(path)}"
    stream = pa.BufferOutputStream()
    pq.write_table(left, stream, compression="zstd", compression_level=plan.options.compression_level)
    write_whole(filesystem, f"{base}/{target}", stream.getvalue())
    return target
