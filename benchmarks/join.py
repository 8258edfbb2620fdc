"""The join of an impression log into requests: roo_ray against Polars, DuckDB and PySpark, on 2 cores.

    python -m benchmarks.join [--quick | --large | --skewed] [--rows N] [--engines NAME ...] [--cache FOLDER]
                              [--json FILE] [--check]

Every engine is a process of its own that joins the same log three times; the time is that of the second, warm run, for
ours without Ray's start, and memory is looked at in the third (looking takes a tenth of a core with many processes).
All outputs are compared: rows, and a digest of every value in them. ``--large``: ours alone, once, on 20 million
impressions with an object store of 2 GB. ``--skewed``: 3 million impressions, of which 1 million are one request's and
30 % of the other requests one user's; each engine once, with its memory looked at; ours with a store of 0.5 GB.
Memory: the peak over the process tree, with shared pages counted once (PSS) and as resident sizes added up (RSS); for
Ray its own processes and its object store are among them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds

from benchmarks.join_engines import ENGINES
from benchmarks.join_log import requests_of, schema, write_log
from roo_ray.requests.grouping import request_row_schema
from roo_ray.sources.compare import digest_rows
from roo_ray.sources.hashing import mix64

ROWS = {"full": 2_000_000, "quick": 200_000, "large": 20_000_000, "skewed": 3_000_000}
AGAINST_SPARK, AGAINST_BEST = 3.0, 1.5
MOST_MEMORY = 4e9  # bytes (PSS), of the large and the skewed log, with the object store's
STORE_BYTES = {"full": 1_000_000_000, "quick": 500_000_000, "large": 2_000_000_000, "skewed": 500_000_000}
ONCE = ("large", "skewed")
OURS = {"roo_ray": {}, "roo_ray, lz4 staging": {"staging_compression": "lz4"}}


class Memory(threading.Thread):
    """Samples a process tree until it is stopped: peaks of PSS and RSS, and of the bytes below a folder."""

    def __init__(self, pid: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder = psutil.Process(pid), folder
        self.pss = self.rss = self.disk = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.3):
            pss = rss = 0
            try:
                tree = [self.process, *self.process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in tree:
                try:
                    info = process.memory_full_info()
                    pss, rss = pss + info.pss, rss + info.rss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)
            self.disk = max(self.disk, folder_bytes(self.folder))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files may vanish meanwhile."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(base, name)).st_size
            except FileNotFoundError:
                continue
    return total


def digest(out: Path, log: Path) -> tuple[int, int]:
    """(requests, digest): of all values of an output, whatever the order of its rows; lists in their order."""
    names = schema(log)
    files = sorted(str(path) for path in out.rglob("*.parquet"))
    types = request_row_schema(ds.dataset(sorted(str(path) for path in log.glob("*.parquet"))).schema, names)
    requests = total = 0
    for batch in ds.dataset(files, format="parquet").to_batches(columns=names.columns, batch_size=20_000):
        table = pa.Table.from_batches([batch]).cast(pa.schema([types.field(name) for name in names.columns]))
        rows = np.zeros(table.num_rows, np.uint64)
        for name in names.columns:
            rows = mix64(rows * np.uint64(31) + digest_rows(table.column(name)))
        requests += table.num_rows
        total += int(rows.sum(dtype=np.uint64))
    return requests, total % 2**64


def run_engine(engine: str, log: Path, out: Path, runs: int, options: dict[str, Any]) -> dict[str, Any]:
    """Runs an engine as a process; its timings, peaks and output."""
    arguments = [engine, str(log), str(out), str(runs), json.dumps(options)]
    environment = os.environ | {"POLARS_MAX_THREADS": "2", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "benchmarks.join_engines", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    memory = Memory(process.pid, out)
    line = ""
    for line in process.stdout:
        if line.strip() == f"run {runs - 1}":
            memory.start()
    memory.done.set()
    memory.join()
    if process.wait():
        raise SystemExit(f"{engine} failed with exit code {process.returncode}")
    seconds = json.loads(line)["seconds"]
    files = list(out.rglob("*.parquet"))
    return {
        "seconds": seconds[min(1, runs - 1)],
        "first_run_seconds": seconds[0],
        "peak_pss_bytes": memory.pss,
        "peak_rss_bytes": memory.rss,
        "peak_disk_bytes": memory.disk,
        "output_bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
    }


def table(results: dict[str, dict[str, Any]]) -> None:
    """Prints the results."""
    base = results["roo_ray"]["seconds"]
    print(f"{'engine':24}   warm s  first s  x ours  peak PSS      RSS    output     disk  files")
    for name, row in results.items():
        sizes = [f"{row[f'peak_{key}_bytes'] / 1e9:.2f} GB" for key in ("pss", "rss", "disk")]
        print(
            f"{name:24} {row['seconds']:8.2f} {row['first_run_seconds']:8.2f} {row['seconds'] / base:7.2f} "
            f"{sizes[0]:>9} {sizes[1]:>8} {row['output_bytes'] / 1e6:6.1f} MB {sizes[2]:>8} {row['files']:6}"
        )


def main() -> int:
    """Runs the benchmark; 1 where ``--check`` finds an aim missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="200,000 impressions")
    size.add_argument("--large", action="store_true", help="20 million impressions, ours alone")
    size.add_argument("--skewed", action="store_true", help="one request of 1 million impressions, one heavy user")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "roo_ray_benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, help="so many impressions, a multiple of 10, instead of the mode's")
    parser.add_argument("--engines", nargs="+", choices=[*OURS, *ENGINES], help="only these (roo_ray is always run)")
    parser.add_argument("--check", action="store_true", help="exit 1 where an aim is missed")
    options = parser.parse_args()
    mode = next((name for name in ("quick", "large", "skewed") if getattr(options, name)), "full")
    rows = options.rows or ROWS[mode]
    log = write_log(options.cache, rows, options.skewed)
    print(f"{rows:,} impressions, {folder_bytes(log) / 1e6:.0f} MB as logged; {os.cpu_count()} cores", flush=True)
    results: dict[str, dict[str, Any]] = {}
    digests: dict[str, tuple[int, int]] = {}
    every = ["roo_ray"] if options.large else list(dict.fromkeys([*OURS, *ENGINES]))
    for name in [name for name in every if name in (options.engines or every) or name == "roo_ray"]:
        out = options.cache / f"out-{os.getpid()}"
        build = {"object_store_bytes": STORE_BYTES[mode], **OURS[name]} if name in OURS else {}
        began = time.perf_counter()
        engine = "roo_ray" if name in OURS else name
        results[name] = run_engine(engine, log, out, 1 if mode in ONCE else 3, build)
        digests[name] = digest(out, log)
        shutil.rmtree(out)
        print(f"{name}: {results[name]['seconds']:.2f} s ({time.perf_counter() - began:.0f} s in all)", flush=True)
    table(results)
    wrong = [name for name, value in digests.items() if value != digests["roo_ray"]]
    aims = {"all outputs equal": not wrong, "no request lost": digests["roo_ray"][0] == requests_of(log)}
    mine, peak = results["roo_ray"]["seconds"], results["roo_ray"]["peak_pss_bytes"]
    if mode in ONCE:
        aims[f"peak memory {peak / 1e9:.1f} GB (aim {MOST_MEMORY / 1e9:.0f} GB)"] = peak <= MOST_MEMORY
    if "pyspark" in results and mode not in ONCE:
        aims[f"{results['pyspark']['seconds'] / mine:.2f}x faster than PySpark (aim {AGAINST_SPARK})"] = (
            results["pyspark"]["seconds"] >= AGAINST_SPARK * mine
        )
    if "polars" in results and "duckdb" in results and mode not in ONCE:
        best = min(results["polars"]["seconds"], results["duckdb"]["seconds"])
        aims[f"{mine / best:.2f}x the best single-process engine (aim {AGAINST_BEST})"] = mine <= AGAINST_BEST * best
    for aim, met in aims.items():
        print(f"{'met   ' if met else 'MISSED'} {aim}")
    if options.json:
        options.json.write_text(json.dumps({"mode": mode, "results": results, "aims": aims}, indent=1))
    return 1 if options.check and not all(aims.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
