"""Published data sets made without Ray, and what tests look at in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from roo_ray.config import Build
from roo_ray.requests.accounts import day_accounts, total_counts, total_ledger
from roo_ray.requests.examine import check_requests
from roo_ray.requests.grouping import group_impressions
from roo_ray.requests.ledger import measure_bucket
from roo_ray.requests.manifest import Manifest, publish_manifest
from roo_ray.requests.shards import read_row_group, write_options, write_shards
from roo_ray.schema import Schema
from roo_ray.sources.compare import sort_codes
from roo_ray.sources.times import day_name, epoch_seconds, utc_days

OPTIONS = write_options(Build(row_group_requests=2))


def publish(
    folder: str | Path,
    impressions: pa.Table,
    schema: Schema,
    shards: int = 1,
    version: int = 1,
    **more: Any,
) -> Manifest:
    """A version made of an impression table: users are dealt to ``shards`` in turn."""
    requests = group_impressions(impressions, schema)
    shard_of = sort_codes(requests.column(schema.keys.user)) % shards
    day_of = utc_days(epoch_seconds(requests.column(schema.keys.time)))
    files, parts = [], []
    for shard in range(shards):
        for day in sorted(set(day_of.tolist())):
            some = requests.filter(pa.array((shard_of == shard) & (day_of == day)))
            if not some.num_rows:
                continue
            sizes = measure_bucket(some, schema, OPTIONS, "off", 0, 1)
            for file, sized in write_shards(some, schema, OPTIONS, str(folder), version, shard):
                files.append(file)
                for name, size in sized.items():
                    sizes[name]["disk_bytes"]["request"] += size
            parts.append((day_name(day), check_requests(some, schema, Build(max_empty_history_share=1)), sizes))
    logged = dict.fromkeys(schema.columns, 1000)
    accounts = day_accounts(parts, files, logged, impressions.num_rows)
    manifest = Manifest(
        version=version,
        schema_yaml=schema.to_yaml(),
        schema_digest=schema.digest,
        files=sorted(files, key=lambda file: file.path),
        accounts=accounts,
        counts=total_counts(accounts, files),
        ledger=total_ledger(accounts, schema, files, "zstd", 3),
        **more,
    )
    publish_manifest(str(folder), manifest)
    return manifest


def read_all(data_set: str | Path, manifest: Manifest) -> pa.Table:
    """All request rows of a version."""
    units = [(file.path, unit) for file in manifest.files for unit in range(len(file.units))]
    return pa.concat_tables(read_row_group(str(data_set), *unit) for unit in units)


def files_below(folder: Path) -> list[str]:
    """All files below a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
