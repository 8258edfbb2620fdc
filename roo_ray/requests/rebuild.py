"""Late data: some days of a data set built again from a source, all others carried over from the version before.

The days that are built again are dealt to the same user shards as before, and builds are deterministic, so that
a shard which the late rows do not touch comes out with the same bytes: its old file is named again. The rest of
the data set is named again anyway. One manifest moves readers from the old version to the new.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

import numpy as np

from roo_ray.errors import DataError
from roo_ray.requests.accounts import Accounts, impressions_by_day
from roo_ray.requests.exchange import DAY_BITS, Exchange, Shard
from roo_ray.requests.manifest import Manifest, ShardFile, load_manifest, manifest_versions
from roo_ray.schema import Schema
from roo_ray.sources.times import day_name

CODE_BITS = 64 - DAY_BITS  # of a bucket's start within its day
GROWTH = 2.0

Record = dict[str, list[tuple[int, int]]]


def parent_of(data_set: str, schema: Schema, days: Sequence[str], next_version: int) -> Manifest | None:
    """The version whose other days a build of ``days`` carries over; None where all days are built.

    Raises DataError where there is no such version, or it has another schema.
    """
    if not days:
        return None
    if manifest_versions(data_set)[-1:] != [next_version - 1] or next_version == 1:
        raise DataError(f"build.days is set and {data_set} has no version yet; build it whole first (build.days=[])")
    parent = load_manifest(data_set, next_version - 1)
    again = f"build {data_set} whole (build.days=[])"
    if parent.schema_digest != schema.digest:
        raise DataError(
            f"build.days: version {parent.version} of {data_set} has another schema ({parent.schema_digest}, now "
            f"{schema.digest}), and a version has one schema; {again}"
        )
    if parent.files and not parent.accounts:
        raise DataError(f"build.days: version {parent.version} was built without accounts by day; {again}")
    return parent


def missing_days(data_set: str, through: datetime.date) -> list[str]:
    """The UTC days after the newest one of a data set, up to ``through`` itself; none where it has that one.

    Raises DataError where the data set has no version yet: nothing says which day would be its first.
    """
    versions = manifest_versions(data_set)
    days = load_manifest(data_set, versions[-1]).days if versions else []
    if not days:
        raise DataError(f"{data_set} has no day yet, after which others could be missing; build it whole first")
    newest = datetime.date.fromisoformat(days[-1])
    return [(newest + datetime.timedelta(n)).isoformat() for n in range(1, (through - newest).days + 1)]


# ---- the same shards -----------------------------------------------------------------------------


def exchange_record(exchange: Exchange) -> Record:
    """Day -> (shard number, start of a bucket within the day's codes), in order: what a manifest keeps."""
    starts = (exchange.starts & np.uint64((1 << CODE_BITS) - 1)).tolist()
    record: Record = {}
    for shard in exchange.shards:
        of_day = record.setdefault(day_name(shard.day), [])
        of_day += [(shard.number, start) for start in starts[shard.first : shard.last]]
    return record


def same_shards(planned: Exchange, rows: Mapping[str, int], days: Sequence[str], parent: Manifest) -> Exchange:
    """The planned exchange for the given days alone, with the parent's shards and buckets for each day that it has,
    unless the day has grown so much (``rows`` by day, against the parent's impressions) that they would become too
    large."""
    fresh = exchange_record(planned)
    before = impressions_by_day(parent.files)
    starts: list[int] = []
    shards: list[Shard] = []
    chosen = [day for day in planned.days.tolist() if day_name(day) in set(days)]
    for rank, day in enumerate(chosen):
        name = day_name(day)
        kept = parent.exchange.get(name, [])
        grown = rows.get(name, 0) > GROWTH * before.get(name, 0)
        buckets = fresh[name] if grown or not kept else kept
        for number in sorted({shard for shard, _ in buckets}):
            own = [start for shard, start in buckets if shard == number]
            shards.append(Shard(day, number, len(starts), len(starts) + len(own)))
            starts += [(rank << CODE_BITS) | start for start in own]
    return Exchange(np.array(chosen, np.int64), np.array(starts, np.uint64), shards)


# ---- the new version -----------------------------------------------------------------------------


def require_days(days: Sequence[str], rows: Mapping[str, int], parent: Manifest) -> None:
    """Raises DataError where a day that is to be built again has requests in the parent and none in the source
    (``rows`` by day), and where the source has none of any of the days."""
    lacking = sorted(set(days) & set(parent.days) - set(rows))
    if not set(days) & set(rows) and not lacking:
        raise DataError(f"build.days: the source has no request of {', '.join(days)}; nothing is published")
    if lacking:
        raise DataError(
            f"build.days: the source has no request of {', '.join(lacking)}, which version {parent.version} has; "
            "nothing is published. A day is built from all its rows, not from the late ones alone: check source.path"
        )


def merge_files(days: Sequence[str], built: Sequence[ShardFile], parent: Manifest) -> list[ShardFile]:
    """The files of the new version: the parent's for other days, and for the given ones the parent's again wherever
    the bytes are the same."""
    same = {(file.day, file.shard, file.digest): file for file in parent.files if file.digest}
    kept = [file for file in parent.files if file.day not in set(days)]
    again = [same.get((file.day, file.shard, file.digest), file) for file in built]
    return sorted([*kept, *again], key=lambda file: (file.day, file.shard, file.path))


def merge_accounts(days: Sequence[str], built: Accounts, parent: Manifest) -> Accounts:
    """The accounts of the new version, day by day."""
    kept = {day: account for day, account in parent.accounts.items() if day not in set(days)}
    return dict(sorted((kept | built).items()))


def merge_exchange(days: Sequence[str], built: Record, parent: Manifest) -> Record:
    """The shards of the new version, day by day."""
    kept = {day: buckets for day, buckets in parent.exchange.items() if day not in set(days)}
    return dict(sorted((kept | built).items()))
