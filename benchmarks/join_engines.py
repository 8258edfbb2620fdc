"""The join by each engine, on 2 cores: run as a process of its own, which prints its timings as JSON.

Each groups the impressions of a log into requests (request-level columns once, impression-level ones as lists in
order of position) and writes zstd Parquet. The first run warms up, the second counts. Only ours also checks the
rows, accounts for them, orders them by user and time, and writes partitions and a manifest.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.join_log import schema

CORES = 2


def polars_join(log: str) -> Callable[[str], None]:
    import polars as pl

    names = schema(Path(log))

    def run(out: str) -> None:
        keys = names.keys.request
        shared = [pl.col(name).first() for name in names.request_columns if name not in keys]
        own = [pl.col(name).sort_by("position") for name in names.impression_columns]
        rows = pl.scan_parquet(f"{log}/*.parquet")
        rows.group_by(keys).agg(shared + own).sink_parquet(
            f"{out}/part.parquet", compression="zstd", compression_level=3, engine="streaming"
        )

    return run


def duckdb_join(log: str) -> Callable[[str], None]:
    import duckdb

    names = schema(Path(log))
    connection = duckdb.connect()
    connection.execute(f"SET threads = {CORES}; SET preserve_insertion_order = false")

    def run(out: str) -> None:
        keys = ", ".join(names.keys.request)
        shared = [f"first({n}) AS {n}" for n in names.request_columns if n not in names.keys.request]
        own = [f"list({n} ORDER BY position) AS {n}" for n in names.impression_columns]
        query = f"SELECT {keys}, {', '.join(shared + own)} FROM read_parquet('{log}/*.parquet') GROUP BY {keys}"
        options = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 3"
        connection.execute(f"COPY ({query}) TO '{out}/part.parquet' ({options})")

    return run


def spark_join(log: str) -> Callable[[str], None]:
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as f

    names = schema(Path(log))
    builder = SparkSession.builder.master(f"local[{CORES}]").appName("join")
    settings = {
        "spark.driver.memory": "8g",
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": "16",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.parquet.compression.codec": "zstd",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    }
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")

    def run(out: str) -> None:
        rest = [n for n in names.impression_columns if n != "position"]
        shared = [f.first(n).alias(n) for n in names.request_columns if n not in names.keys.request]
        own = f.array_sort(f.collect_list(f.struct("position", *rest))).alias("_own")
        rows = session.read.parquet(log).groupBy(*names.keys.request).agg(*shared, own)
        lists = [f.col(f"_own.{n}").alias(n) for n in names.impression_columns]
        rows.select(*names.request_columns, *lists).write.mode("overwrite").parquet(out)

    return run


def roo_join(log: str, **build: Any) -> Callable[[str], None]:
    from contextlib import ExitStack

    from roo_ray import session
    from roo_ray.config import Build, Config, RaySettings
    from roo_ray.requests.join import build_requests
    from roo_ray.source_config import ImpressionSource

    stack = ExitStack()
    store = build.pop("object_store_bytes", 1_000_000_000)
    stack.enter_context(session.connect(RaySettings(local_cpus=CORES, object_store_bytes=store)))
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:8.2f} {line}", file=sys.stderr)

    def run(out: str) -> None:
        source = ImpressionSource(kind="impressions", path=[log])
        config = Config(name="join", schema=schema(Path(log)), source=source, requests=out, build=Build(**build))
        build_requests(config, say)

    run.stack = stack  # type: ignore[attr-defined]
    return run


ENGINES = {"roo_ray": roo_join, "polars": polars_join, "duckdb": duckdb_join, "pyspark": spark_join}


def main() -> None:
    """``ENGINE LOG OUT RUNS OPTIONS``: prints ``run N`` as each begins, and {"seconds": [...]}."""
    engine, log, out, runs, options = sys.argv[1:6]
    join = ENGINES[engine](log, **json.loads(options))
    seconds = []
    for number in range(int(runs)):
        shutil.rmtree(out, ignore_errors=True)
        Path(out).mkdir(parents=True)
        print(f"run {number}", flush=True)
        began = time.perf_counter()
        join(out)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds}))
    if hasattr(join, "stack"):
        join.stack.close()


if __name__ == "__main__":
    main()
