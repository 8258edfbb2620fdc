"""How fast batches reach the trainers: python benchmarks/ingest.py [--quick] [--json FILE] [--check]

Ways of feeding two ranks, over the same shards (10 impressions a request, history 100), two epochs, side by side in
one run: (a) the floor, pyarrow and collate in one loop; (b) Ray Data used naively; (c) ours in the trainer's thread;
(d) ours through Ray Data; (e) what a team without request shards has, the impressions of three shards as a log holds
them, rows of a request side by side, straight to impression-level batches by the loop of (a), which was faster than
forming requests first and exploding them (``ingest/clustered.py``), and was compared with no other way;
(e') request shards, exploded by our reader to the same batches. Then one feed with 8 ranks, and trainings of a model of
the demo's size, through Ray Data and with the thread, for the share of time that their second epoch waits for data.
Rates are of the second epoch; with several rounds, of the median round. Beside them what decoding alone takes, of
request shards and of the impression table: the bound of (c) over (e) where nothing but decoding is left of (c).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ingest_data import impression_table, schema, write_data_set, write_impressions
from ingest_ways import WAYS, Epoch, Rank, Way, decode_cpu, files_of, naive_shards, settings_of

from roo_ray import session
from roo_ray.config import Config, RaySettings
from roo_ray.ingest.feed import open_feed
from roo_ray.ingest.plan import lanes_of_rank
from roo_ray.terminal import print_table

Figures = dict[str, float]
LANES, BATCH_IMPRESSIONS = 4, 5120
# Logical CPUs: one a rank, and three that read. Two readers leave a core idle while a task ends and the next begins.
CPUS = 5


def run_way(way: Way, data_set: str, world: int, lanes: int = LANES) -> tuple[list[list[Epoch]], int]:
    """What each rank measured, per epoch; the most blocks that waited for a rank in the feed of (d)."""
    ranks = [Rank.remote() for _ in range(world)]  # type: ignore[attr-defined]
    gives: list[Any] = [None] * world
    if way == "naive":
        gives = naive_shards(data_set, world)
    elif way == "ray_data":
        owners = [lanes_of_rank(rank, world, lanes) for rank in range(world)]
        gives = [open_feed(settings_of(data_set, way, lanes, BATCH_IMPRESSIONS), owners, float(world))] * world
    measured = ray.get(
        [r.consume.remote(way, data_set, n, world, lanes, BATCH_IMPRESSIONS, gives[n]) for n, r in enumerate(ranks)]
    )
    for rank in ranks:
        ray.kill(rank)
    return measured, max(ray.get(gives[0].most_waiting.remote())) if way == "ray_data" else 0


def summary(ranks: list[list[Epoch]]) -> dict[str, float]:
    """Over the ranks: rates of the second epoch, times to the first batch, CPU and bytes per impression."""
    second = [epochs[1] for epochs in ranks]
    both = [epoch for epochs in ranks for epoch in epochs]
    seconds = max(epoch.seconds for epoch in second)
    impressions = sum(epoch.impressions for epoch in both)
    return {
        "requests": sum(e.requests for e in second),
        "impressions": sum(e.impressions for e in second),
        "impressions_per_s": sum(e.impressions for e in second) / seconds,
        "requests_per_s": sum(e.requests for e in second) / seconds,
        "first_batch_s": max(epochs[0].first for epochs in ranks),
        "first_batch_second_epoch_s": max(e.first for e in second),
        "first_epoch_impressions_per_s": sum(r[0].impressions for r in ranks) / max(r[0].seconds for r in ranks),
        "trainer_cpu_s_per_million": sum(e.cpu for e in both) / impressions * 1e6,
        "bytes_per_impression": sum(e.bytes for e in both) / impressions,
    }


def waiting(data_set: str, folder: Path, reader: str) -> dict[str, float]:
    """The second epoch of two ranks with the demo's model: its rate, and the share of the time that they wait for
    data. (The first has Ray Data's start and the first steps in it.)"""
    from roo_ray.training.launch import train

    config = Config.model_validate(
        {
            "name": f"ingest-benchmark-{reader}",
            "schema": schema(),
            "requests": data_set,
            "storage": str(folder / "runs"),
            "ingest": {"lanes": 4, "batch_impressions": 512, "reader": reader},
            "model": {"dim": 32, "layers": 2, "heads": 2, "user_dim": 32},
            "training": {"workers": 2, "epochs": 2, "log_every": 1000},
            "tracking": {"enabled": False},
        }
    )
    metrics = train(config, f"waiting-{reader}", lambda line: None).metrics
    seconds, impressions = metrics["epoch/seconds"], metrics["epoch/impressions"]
    return {
        "seconds": seconds,
        "impressions_per_s": impressions / seconds,
        "wait_share": metrics["epoch/data_wait_share"],
    }


def aims(
    median: dict[Way, dict[str, float]], waits: dict[str, dict[str, float]]
) -> list[tuple[str, float, float, bool]]:
    """(aim, measured, wanted, at most): what the issue asks for."""
    rate = {way: values["impressions_per_s"] for way, values in median.items()}
    cpu = {way: values["trainer_cpu_s_per_million"] for way, values in median.items()}
    rows = [
        ("(c) of (a)", rate["thread"] / rate["floor"], 0.9, False),
        ("(d) of (a), second epoch", rate["ray_data"] / rate["floor"], 0.7, False),
        ("(d) over (b)", rate["ray_data"] / rate["naive"], 1.5, False),
        ("trainer's CPU, (d) of (c)", cpu["ray_data"] / cpu["thread"], 0.25, True),
        ("(d) first batch of epoch 2, s", median["ray_data"]["first_batch_second_epoch_s"], 3.0, True),
        ("(c) over (e)", rate["thread"] / rate["table"], 5.0, False),
    ]
    shares = [(f"share of time waiting, {name}", of["wait_share"], 0.03, True) for name, of in waits.items()]
    return [*rows, *shares]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="200,000 by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=80, help="no further round begins after so many")
    parser.add_argument(
        "--quick", action="store_true", help="100,000 requests, one round, no 8 ranks, one short training"
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="for development")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 where an aim is missed")
    options = parser.parse_args()
    requests = options.requests or (100_000 if options.quick else 200_000)
    rounds = 1 if options.quick else options.rounds
    folder = Path(tempfile.mkdtemp(prefix="roo_ray_ingest_"))
    results: dict[Way, list[dict[str, float]]] = {way: [] for way in options.ways}
    waits: dict[str, Figures] = {}
    eight: dict[str, float] | None = None
    try:
        manifest = write_data_set(folder / "data", requests)
        trained = sum(file.impressions for file in manifest.files if file.day == manifest.days[0])
        as_rows = write_impressions(folder / "data", manifest)
        decode = {
            "request shards": decode_cpu(files_of(str(folder / "data"))[:3]),
            "impression table": decode_cpu([impression_table(str(folder / "data"))]),
        }
        with session.connect(RaySettings(local_cpus=CPUS, object_store_bytes=2_000_000_000)):
            started = time.perf_counter()
            for number in range(rounds):
                if number and time.perf_counter() - started > options.seconds:
                    break
                for way in options.ways:
                    began = time.perf_counter()
                    ranks, _ = run_way(way, str(folder / "data"), 2)
                    results[way].append(summary(ranks))
                    seen = sum(epoch.impressions for epochs in ranks for epoch in epochs)
                    wanted = 2 * (as_rows if way == "table" else trained)
                    assert seen == wanted, f"{way}: {seen} impressions of {wanted}"
                    print(f"round {number + 1}: {way} {time.perf_counter() - began:.1f} s", file=sys.stderr)
        if not options.quick:
            with session.connect(RaySettings(local_cpus=11, object_store_bytes=2_000_000_000)):
                ranks, waited = run_way("ray_data", str(folder / "data"), 8, lanes=8)
                eight = summary(ranks) | {"most_blocks_waiting": waited}
        small = folder / "small"
        write_data_set(small, 6_000 if options.quick else 16_000)
        with session.connect(RaySettings(local_cpus=4)):
            for reader in ["ray_data"] if options.quick else ["ray_data", "thread"]:
                began = time.perf_counter()
                waits[reader] = waiting(str(small), folder, reader)
                print(f"training with {reader} {time.perf_counter() - began:.1f} s", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    median = {
        way: {name: statistics.median(r[name] for r in of) for name in of[0]} for way, of in results.items() if of
    }
    rows = [[WAYS[way], *cells(values)] for way, values in median.items()]
    if eight is not None:
        rows.append([f"(d) with 8 ranks, at most {eight['most_blocks_waiting']:.0f} blocks waiting", *cells(eight)])
    header = [
        "",
        "requests/s",
        "impressions/s",
        "first batch s",
        "epoch 2 s",
        "trainer CPU s / M",
        "bytes / impression",
    ]
    print_table(f"{requests:,} requests, {trained:,} impressions, 2 ranks", header, rows)
    print_table(
        "A model of the demo's size, second epoch",
        ["reader", "impressions/s", "epoch s", "waiting for data"],
        [
            [n, f"{w['impressions_per_s']:,.0f}", f"{w['seconds']:.1f}", f"{w['wait_share']:.1%}"]
            for n, w in waits.items()
        ],
    )
    print_table(
        "Decoding Parquet alone, one thread",
        ["", "CPU s / M impressions"],
        [[name, f"{cpu:.2f}"] for name, cpu in decode.items()],
    )
    missed = 0
    if len(median) == len(WAYS):
        table = []
        for name, value, wanted, at_most in aims(median, waits):
            met = value <= wanted if at_most else value >= wanted
            missed += not met
            table.append([name, f"{value:.2f}", f"{'<=' if at_most else '>='} {wanted:g}", "met" if met else "MISSED"])
        print_table("Aims", ["", "measured", "aim", ""], table)
    if options.json:
        content = {"rounds": results, "median": median, "eight_ranks": eight, "waiting": waits, "decode": decode}
        Path(options.json).write_text(json.dumps(content, indent=1))
    return 1 if options.check and missed else 0


def cells(values: dict[str, float]) -> list[str]:
    """A row of the table."""
    return [
        f"{values['requests_per_s']:,.0f}",
        f"{values['impressions_per_s']:,.0f}",
        f"{values['first_batch_s']:.2f}",
        f"{values['first_batch_second_epoch_s']:.2f}",
        f"{values['trainer_cpu_s_per_million']:.2f}",
        f"{values['bytes_per_impression']:,.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
