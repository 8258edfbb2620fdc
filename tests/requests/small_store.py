"""A build on one CPU with a small object store, in a process and a Ray of its own: python -m
tests.requests.small_store FOLDER ROWS STORE_BYTES; the last line says how large the log is in memory."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.join_log import schema, write_log
from roo_ray import session
from roo_ray.config import Build, Config, RaySettings
from roo_ray.requests.join import build_requests
from roo_ray.source_config import ImpressionSource
from roo_ray.sources import open_source


def main(folder: str, rows: str, store_bytes: str) -> None:
    """Writes the log, builds FOLDER/requests from it."""
    source = ImpressionSource(kind="impressions", path=[str(write_log(Path(folder), int(rows)))])
    build = Build(bucket_bytes=32_000_000)
    config = Config(name="test", schema=schema(), source=source, requests=f"{folder}/requests", build=build)
    with session.connect(RaySettings(local_cpus=1, object_store_bytes=int(store_bytes))):
        build_requests(config, print)
    print(sum(unit.bytes for unit in open_source(source, schema()).units()))


if __name__ == "__main__":
    main(*sys.argv[1:])
