"""Do the models learn what is there, and does request-only training reach what impression-level training reaches?

    python benchmarks/quality.py [--quick] [--check] [--json FILE] [--requests N] [--kinds hstu,dcn]
                                 [--seeds 0,1,2] [--compare-requests N] [--merge FILE...]

A whole run takes some fifteen minutes; ``--kinds`` and ``--seeds`` split it, and ``--merge`` joins what the parts
wrote.

The log is roo_ray's synthetic one (100,000 users, 50,000 items, Zipf), whose planted click model needs the share of a
candidate's topic in the user's history: history x candidate. Held out are requests that no model has seen. The share
of the gap that a model closes is (1 - NE) / (1 - Bayes NE), from the base rate's NE of 1 to the planted model's own.

Aims: each ranking model closes at least 80 % of the gap; the same model without history at most 40 %; ROO and
impression-level training end within seed noise: their mean NEs differ by no more than twice the standard error.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from model_cases import arguments, finish, merged, table

from roo_ray.config import Model, Training
from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.metrics.collection import RankingMetrics
from roo_ray.models.keyed_random import set_epoch
from roo_ray.models.objective import training_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import Schema, parse_schema
from roo_ray.source_config import SyntheticSource
from roo_ray.sources.synthetic_slice import make_slice
from roo_ray.training.sharding import shard

USERS, ITEMS, TOPICS, HISTORY, DIM = 100_000, 50_000, 20, 64, 32
RANKING = ("dcn", "hstu", "hstu_targets", "cross_attention", "two_tower")
CLOSED, WITHOUT_HISTORY = 0.8, 0.4
FORMS = ("request", "impression")
BATCH = 512  # impressions


def schema_of(history: bool) -> Schema:
    """The synthetic log's schema; without history the sequence is left out."""
    sequence = f"""
  - name: history
    level: request
    kind: sequence
    max_length: {HISTORY}
    time: history_time
    sequence: [{{column: history_item, table: item}}, {{column: history_topic, table: topic}}]"""
    return parse_schema(f"""
name: quality
keys: {{request: request_id, user: user_id, time: request_time, impression: item_id}}
tables:
  item: {{rows: {ITEMS}, dim: {DIM}}}
  topic: {{rows: {TOPICS}, dim: {DIM}}}
  country: {{rows: 32, dim: {DIM}}}
features:
  - {{name: user_profile, level: request, kind: dense, columns: [user_age, user_activity]}}
  - {{name: country, level: request, kind: ids, columns: country_id, table: country}}{sequence if history else ""}
  - {{name: item, level: impression, kind: ids, columns: item_id, table: item}}
  - {{name: item_topic, level: impression, kind: ids, columns: topic_id, table: topic}}
  - {{name: placement, level: impression, kind: dense, columns: [position, item_age_days], scale: log1p}}
labels:
  - {{name: click, column: clicked, oracle: click_probability}}
""")


def batches_of(source: SyntheticSource, task: int, history: bool) -> list[RequestBatch]:
    """The requests of a generator task as batches of about BATCH impressions."""
    rows = make_slice(source, task)
    count = len(rows.request_id)
    shown = torch.from_numpy(np.bincount(rows.row, minlength=count))
    one = torch.ones(count, dtype=torch.int64)

    def dense(*columns: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(c, np.float32) for c in columns], axis=1))

    lengths = torch.from_numpy(rows.history.lengths)
    whole = RequestBatch(
        num_impressions=shown,
        request_key=torch.from_numpy(rows.request_id),
        impression_index=torch.from_numpy(rows.position - 1),
        user_key=torch.from_numpy(rows.user),
        request_time=torch.from_numpy(rows.time_us / 1e6),
        request_dense=dense(rows.profile.age, rows.profile.activity),
        impression_dense=dense(np.log1p(rows.position), np.log1p(np.maximum(rows.item_age_days, 0))),
        request_ids={"country": Jagged(torch.from_numpy(rows.profile.country.astype(np.int64)), one)}
        | (
            {
                "history.history_item": Jagged(torch.from_numpy(rows.history.item), lengths),
                "history.history_topic": Jagged(torch.from_numpy(rows.history.topic), lengths),
            }
            if history
            else {}
        ),
        sequence_dense={"history": torch.zeros(len(rows.history.item), 0)} if history else {},
        sequence_time={"history": torch.from_numpy(rows.history.time_us / 1e6)} if history else {},
        impression_ids={
            "item": Jagged(torch.from_numpy(rows.item), torch.ones(len(rows.item), dtype=torch.int64)),
            "item_topic": Jagged(torch.from_numpy(rows.topic), torch.ones(len(rows.topic), dtype=torch.int64)),
        },
        labels=dense(rows.clicked),
        weights=torch.ones(len(rows.item), 1),
        oracle=dense(rows.probability),
    )
    return split(whole, lengths if history else None)


def split(batch: RequestBatch, lengths: torch.Tensor | None) -> list[RequestBatch]:
    """Consecutive requests of about BATCH impressions each."""
    ends = batch.num_impressions.cumsum(0)
    cuts = torch.searchsorted(ends, torch.arange(BATCH, int(ends[-1]), BATCH)).unique().tolist()
    bounds = sorted({0, batch.num_requests, *cuts})
    sizes = [b - a for a, b in pairwise(bounds)]
    shown = [int(x.sum()) for x in batch.num_impressions.split(sizes)]
    tokens = [int(x.sum()) for x in lengths.split(sizes)] if lengths is not None else []
    by_request = ("num_impressions", "request_key", "user_key", "request_time", "request_dense")
    by_impression = ("impression_index", "impression_dense", "labels", "weights", "oracle")
    parts: dict[str, Any] = {name: getattr(batch, name).split(sizes) for name in by_request}
    parts |= {name: getattr(batch, name).split(shown) for name in by_impression}

    def jagged(ids: dict[str, Jagged], rows: list[int], place: int) -> dict[str, Jagged]:
        found = {}
        for name, lists in ids.items():
            of = tokens if "." in name else rows
            found[name] = Jagged(lists.values.split(of)[place], lists.lengths.split(rows)[place])
        return found

    return [
        RequestBatch(
            **{name: values[place] for name, values in parts.items()},
            request_ids=jagged(batch.request_ids, sizes, place),
            impression_ids=jagged(batch.impression_ids, shown, place),
            sequence_dense={name: v.split(tokens)[place] for name, v in batch.sequence_dense.items()},
            sequence_time={name: v.split(tokens)[place] for name, v in batch.sequence_time.items()},
        )
        for place in range(len(sizes))
    ]


def run(
    kind: str, history: bool, form: str, seed: int, source: SyntheticSource, tasks: range, held_out: list[RequestBatch]
) -> dict[str, float]:
    """Trains one pass over the tasks and scores the held-out requests."""
    torch.manual_seed(seed)
    settings = Model(kind=kind, dim=DIM, layers=2, heads=2, user_dim=DIM, tower=[64, 32])  # type: ignore[arg-type]
    model = RankingModel(schema_of(history), settings, torch.device("meta"))
    sharded = shard(
        model,
        Training(seed=seed, embedding_lr=0.1, dense_lr=2e-3),
        torch.device("cpu"),
        batch_requests=64,
        ids_per_request={},
    )
    set_epoch(sharded.module, seed, 0)
    order = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    trained = 0
    for task in tasks:
        batches = batches_of(source, task, history)
        for place in torch.randperm(len(batches), generator=order).tolist():
            batch = batches[place] if form == "request" else batches[place].explode()
            known = batch.weights.sum(0)
            _, loss = training_loss(sharded.module, batch, torch.ones(1), known, 1)
            sharded.optimizer.zero_grad()
            loss.backward()
            sharded.optimizer.step()
            trained += batches[place].num_requests
    seconds = time.perf_counter() - begin
    metrics, oracle = RankingMetrics(["click"]), RankingMetrics(["click"])
    sharded.module.eval()
    with torch.no_grad():
        for batch in held_out:
            metrics.update(sharded.module(batch), batch.labels, batch.weights, batch.num_impressions)
            oracle.update_probabilities(batch.oracle, batch.labels, batch.weights, batch.num_impressions)
    ne, bayes = metrics.compute()["click/ne"], oracle.compute()["click/ne"]
    return {
        "ne": ne,
        "bayes_ne": bayes,
        "closed": (1 - ne) / (1 - bayes),
        "gauc": metrics.compute()["click/gauc"],
        "seconds": seconds,
        "requests_per_second": trained / seconds,
    }


def missed_aims(rows: list[dict[str, Any]]) -> list[str]:
    """The aims that the rows miss."""
    missed = []
    for row in (row for row in rows if row["part"] == "ranking"):
        if row["history"] and row["closed"] < CLOSED:
            missed.append(f"{row['kind']} closes {row['closed']:.1%} of the gap, aim {CLOSED:.0%}")
        if not row["history"] and row["closed"] > WITHOUT_HISTORY:
            missed.append(
                f"{row['kind']} without history closes {row['closed']:.1%} of the gap, at most {WITHOUT_HISTORY:.0%}"
            )
    for found in compare(rows):
        if found["apart"] > 2 * found["noise"] / math.sqrt(found["seeds"]) + 1e-4:
            missed.append(
                f"{found['kind']}: ROO and impression-level NE are {found['apart']:.5f} apart, beyond seed noise "
                f"({found['noise']:.5f})"
            )
    return missed


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind the NE of both forms over seeds: means, how far apart they are, and the larger standard deviation.
    Seeds that both forms have count; fewer than two say nothing."""
    found = []
    rows = [row for row in rows if row["part"] == "compare"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = {
            form: {row["seed"]: row["ne"] for row in rows if row["kind"] == kind and row["form"] == form}
            for form in FORMS
        }
        seeds = sorted(of[FORMS[0]].keys() & of[FORMS[1]].keys())
        if len(seeds) < 2:
            continue
        values = {form: [of[form][seed] for seed in seeds] for form in FORMS}
        means = {form: statistics.mean(each) for form, each in values.items()}
        found.append(
            {
                "kind": kind,
                "seeds": len(seeds),
                "values": values,
                "means": means,
                "apart": abs(means[FORMS[0]] - means[FORMS[1]]),
                "noise": max(statistics.stdev(each) for each in values.values()),
            }
        )
    return found


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the tables."""
    header = ["kind", "history", "form", "seed", "requests", "NE", "Bayes NE", "of the gap", "GAUC", "s"]
    cells = [
        [
            *(row["kind"], "yes" if row["history"] else "no", row["form"], row["seed"], f"{row['requests']:,}"),
            *(f"{row['ne']:.4f}", f"{row['bayes_ne']:.4f}", f"{row['closed']:.1%}", f"{row['gauc']:.4f}"),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    print(table(header, cells))
    for found in compare(rows):
        cells = [
            [form, " ".join(f"{v:.4f}" for v in found["values"][form]), f"{found['means'][form]:.4f}"] for form in FORMS
        ]
        print(table([f"{found['kind']}: form", "NE by seed", "mean"], cells))
        print(f"means apart by {found['apart']:.5f}; standard deviation over seeds {found['noise']:.5f}")


def main() -> None:
    """Trains and compares."""
    parser = arguments("Quality of the models on a planted log")
    parser.add_argument("--kinds", default=",".join(RANKING), help="'' for none")
    parser.add_argument("--requests", type=int, default=60_000, help="trained on, one pass")
    parser.add_argument("--seeds", default="0,1,2", help="of the comparison of ROO and impression-level; '' for none")
    parser.add_argument("--compare-requests", type=int, default=10_000, help="trained on there")
    parser.add_argument("--compare-kind", default="hstu")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.compare_requests, options.seeds = 20_000, 5_000, "0,1"
    rows = merged(options.merge) if options.merge else measure_all(options)
    report(rows)
    finish(rows, missed_aims(rows), options)


def measure_all(options: Any) -> list[dict[str, Any]]:
    """Trains all that is asked for, on one rank."""
    torch.set_num_threads(1)  # two would wait for each other on tensors of this size
    slice_size = 5_000
    source = SyntheticSource(
        kind="synthetic",
        path="unused",
        requests=options.requests + 2 * slice_size,
        users=USERS,
        items=ITEMS,
        topics=TOPICS,
        history_length=HISTORY,
        requests_per_task=slice_size,
    )
    first = 2  # the first two slices are held out
    held_out = {h: [b for task in range(first) for b in batches_of(source, task, h)] for h in (True, False)}
    everything = range(first, first + options.requests // slice_size)
    part = range(first, first + max(1, options.compare_requests // slice_size))
    rows: list[dict[str, Any]] = []

    def add(part: str, kind: str, history: bool, form: str, seed: int, tasks: range) -> None:
        row: dict[str, Any] = {"part": part, "kind": kind, "history": history, "form": form, "seed": seed}
        row["requests"] = len(tasks) * slice_size
        row |= run(kind, history, form, seed, source, tasks, held_out[history])
        rows.append(row)
        words = f"{kind}, {'' if history else 'without history, '}{form} form, seed {seed}: {row['closed']:.1%}"
        print(words, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for kind in filter(None, options.kinds.split(",")):
            add("ranking", kind, True, "request", 0, everything)
            add("ranking", kind, False, "request", 0, everything)
        for seed in map(int, filter(None, options.seeds.split(","))):
            for form in FORMS:
                add("compare", options.compare_kind, True, form, seed, part)
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
