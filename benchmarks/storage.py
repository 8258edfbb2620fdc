"""Bytes on disk: an impression log as logged, sorted by request, and as request shards, all in zstd level 3.

python benchmarks/storage.py [--quick] [--json FILE] [--check] [--ebnerd FOLDER]

Two logs: a synthetic one of 2 million impressions (10 a request, histories of 100 events, rows in no order), and
EB-NeRD's real requests exploded to the impression log that they came from, a file a day. "As logged" are the bytes of
the log's own Parquet files, the rows of each file in random order; "sorted" those of the same rows with
each request's rows together; "grouped" those of the shards that the build publishes. ``--check`` exits with 1 where
an aim is missed: grouped at least 5 times smaller than logged, and 10 times on the request-level columns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_ray import session
from roo_ray.config import Build, Config, RaySettings
from roo_ray.requests.examine import examine
from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.join import build_requests
from roo_ray.requests.ledger import files_table, ledger_table
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema, load_schema
from roo_ray.source_config import EbnerdSource, ImpressionSource, SyntheticSource
from roo_ray.sources import open_source
from roo_ray.sources.base import read
from roo_ray.sources.synthetic import generate
from roo_ray.sources.times import day_name, epoch_seconds, utc_days
from roo_ray.terminal import human_bytes, print_table

ROOT = Path(__file__).parents[1]
EBNERD = ROOT.parent / "shared" / "data" / "ebnerd"
AIM_TOTAL, AIM_REQUEST_COLUMNS = 5.0, 10.0
LEVEL = 3
ROW_GROUP_ROWS = 100_000
ITEMS = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the synthetic log")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--check", action="store_true", help="exit with 1 where an aim is missed")
    parser.add_argument(
        "--ebnerd", metavar="FOLDER", default=str(EBNERD), help="the folder of EB-NeRD (default: %(default)s)"
    )
    parser.add_argument("--folder", metavar="FOLDER", help="where the logs go (default: a temporary folder, removed)")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="roo_ray_storage_"))
    figures = {}
    try:
        with session.connect(RaySettings()):
            figures["synthetic"] = account("synthetic", synthetic_log(folder, 20_000 if options.quick else 200_000))
            if (Path(options.ebnerd) / "behaviors.parquet").is_file():
                figures["EB-NeRD"] = account("EB-NeRD", ebnerd_log(folder, str(Path(options.ebnerd).absolute())))
            else:
                print(f"\nEB-NeRD is skipped: no behaviors.parquet in {options.ebnerd} (name its folder with --ebnerd)")
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    aims = report(figures)
    if options.json:
        Path(options.json).write_text(json.dumps({"figures": figures, "aims": aims}, indent=1))
    if options.check and not all(aim["met"] for aim in aims):
        sys.exit(1)


# ---- logs ----------------------------------------------------------------------------------------


def synthetic_log(folder: Path, requests: int) -> Config:
    """A config whose source is the log in zstd level 3."""
    source = SyntheticSource(
        kind="synthetic",
        path=str(folder / "synthetic-generated"),
        requests=requests,
        users=requests // 10,
        items=ITEMS,
        history_length=200,  # the longest: the mean is near 100
        days=7,
        requests_per_task=10_000,
    )
    generate(source, say)
    log = folder / "synthetic-log"
    log.mkdir(exist_ok=True)
    for path in sorted(Path(source.path).glob("*.parquet")):
        write_log(pq.read_table(path), log / path.name)
        path.unlink()
    shutil.rmtree(source.path)
    schema = load_schema(ROOT / "configs/schemas/synthetic.yaml").model_dump(mode="json")
    schema["tables"]["item"]["rows"] = ITEMS
    return config("synthetic", Schema.model_validate(schema), log)


def ebnerd_log(folder: Path, files: str) -> Config:
    """EB-NeRD's requests exploded to one file a day, rows of a day in random order."""
    schema = load_schema(ROOT / "configs/schemas/ebnerd.yaml")
    source = open_source(EbnerdSource(kind="ebnerd", path=files), schema)
    rows = pa.concat_tables([read(source, unit) for unit in source.units()])
    requests, _ = examine(rows, schema, "requests", Build())
    impressions = explode_requests(requests, schema)
    days = utc_days(epoch_seconds(impressions.column(schema.keys.time), schema.keys.time))
    draw = np.random.default_rng(0)
    log = folder / "ebnerd-log"
    log.mkdir(exist_ok=True)
    for day in np.unique(days):
        rows_of_day = draw.permutation(np.flatnonzero(days == day))
        write_log(impressions.take(pa.array(rows_of_day)), log / f"{day_name(int(day))}.parquet")
    return config("ebnerd", schema, log)


def write_log(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", compression_level=LEVEL, row_group_size=ROW_GROUP_ROWS)


def config(name: str, schema: Schema, log: Path) -> Config:
    return Config(
        name=name,
        schema=schema,
        source=ImpressionSource(kind="impressions", path=[str(log)]),
        requests=str(log.parent / f"{name}-requests"),
        build=Build(compression_level=LEVEL, ledger="full"),
    )


def say(line: str) -> None:
    print(f"  {line}", flush=True)


# ---- figures -------------------------------------------------------------------------------------


def account(name: str, settings: Config) -> dict[str, Any]:
    """Builds the log and prints its ledger; the figures of it."""
    print(f"\n{name}", flush=True)
    begin = time.perf_counter()
    manifest: Manifest = build_requests(settings, say)
    seconds = time.perf_counter() - begin
    ledger = manifest.ledger
    print_table(f"{name}: bytes of each column", *ledger_table(ledger), ledger["how"])
    print_table(f"{name}: files", *files_table(ledger))
    user_side = [column["disk_bytes"] for column in ledger["columns"].values() if column["level"] == "request"]
    return {
        "requests": manifest.requests,
        "impressions": manifest.impressions,
        "history_events_per_request": manifest.tokens / manifest.requests,
        "build_seconds": seconds,
        "disk_bytes": ledger["totals"]["disk_bytes"],
        "disk_bytes_request_columns": {side: sum(d[side] for d in user_side) for side in user_side[0]},
        "elements": ledger["totals"]["elements"],
        "ledger": ledger,
    }


def report(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows, aims = [], []
    for name, found in figures.items():
        for what, key, aim in (
            ("all columns", "disk_bytes", AIM_TOTAL),
            ("request-level columns", "disk_bytes_request_columns", AIM_REQUEST_COLUMNS),
        ):
            disk = found[key]
            ratio = disk["impression"] / disk["request"]
            aims.append({"log": name, "what": what, "ratio": ratio, "aim": aim, "met": ratio >= aim})
            rows.append(
                [
                    f"{name}: {what}",
                    *(human_bytes(disk[side]) for side in ("impression", "sorted", "request")),
                    f"{ratio:.2f}x",
                    f"{disk['sorted'] / disk['request']:.2f}x",
                    f"{aim:.0f}x: {'met' if ratio >= aim else 'MISSED'}",
                ]
            )
    header = ["log", "logged", "sorted", "grouped", "logged / grouped", "sorted / grouped", "aim"]
    sizes = ", ".join(
        f"{name} {found['impressions']:,} impressions, {found['impressions'] / found['requests']:.1f} a request, "
        f"{found['history_events_per_request']:.0f} history events"
        for name, found in figures.items()
    )
    print_table("Storage, all zstd level 3", header, rows, sizes)
    return aims


if __name__ == "__main__":
    main()
