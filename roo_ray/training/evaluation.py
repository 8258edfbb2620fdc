"""A pass over held-out data: the metrics of all its requests, over all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from roo_ray.config import Evaluation
from roo_ray.errors import TrainingDiverged
from roo_ray.ingest.device import on_device
from roo_ray.ingest.stream import RankStream, Step
from roo_ray.metrics.collection import RankingMetrics
from roo_ray.metrics.curves import curves_of
from roo_ray.metrics.held_out import HeldOutScores
from roo_ray.models.item_index import RetrievalEvaluation, index_for
from roo_ray.models.objective import logits_of, retrieval_towers
from roo_ray.schema import Schema
from roo_ray.training.agreement import Flags, agree_to_go_on
from roo_ray.training.requests_of import request_ids, requests_by_rank
from roo_ray.training.sharding import ShardedModel
from roo_ray.training.throughput import Throughput

SECONDS_BETWEEN_LINES = 5.0


class CutShort(Exception):
    """An evaluation that all ranks have left at the same step. ``stop``: because the job is to end; otherwise some
    rank was evicted."""

    def __init__(self, stop: bool) -> None:
        super().__init__("stop" if stop else "evicted")
        self.stop = stop


def steps_to_the_end(
    stream: RankStream, device: torch.device, says: Callable[[], Flags] = Flags, spoilt: Sequence[Step] = ()
) -> Iterator[Step]:
    """The steps of a pass without an update; ends on all ranks at once (a collective per step). ``says``: the flags of
    this rank, of which ``evicted`` and ``stop`` count; ``spoilt``: gets a step whose scores are not numbers. Where one
    rank says so, or has such a step, CutShort or TrainingDiverged is raised on all ranks."""
    for step in on_device(stream.epoch(0), device):
        alive, agreed = agree_to_go_on(step.lanes_alive, replace(says(), not_finite=bool(spoilt)), device)
        if agreed.not_finite:
            every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(every, request_ids(stream.settings, 0, spoilt[0]) if spoilt else [])
            raise TrainingDiverged(
                f"held-out requests have scores that are NaN, by rank: {requests_by_rank(every)}. The model has "
                "diverged (lower the learning rates, go back to a checkpoint before), or these requests have features "
                "that are not finite"
            )
        if not alive:
            return
        if agreed.evicted or agreed.stop:
            raise CutShort(agreed.stop)
        yield step


def evaluate(
    model: ShardedModel,
    schema: Schema,
    stream: RankStream,
    device: torch.device,
    say: Callable[[str], None],
    settings: Evaluation,
    rank: int,
    says: Callable[[], Flags] = Flags,
    items: str | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of the held-out data over all ranks (collective), under ``eval/``, and the tasks' ROC and calibration
    curves. Every impression's logits are written where ``settings`` say so. ``says``: see ``steps_to_the_end``, with
    what it raises; the model is then left in evaluation mode. ``items``: the exported index (a path or URI) in which
    retrieval looks, instead of the items of the pass; DataError where it is of another model."""
    metrics = RankingMetrics([label.name for label in schema.labels])
    oracle = RankingMetrics([label.name for label in schema.labels])
    scored = HeldOutScores(metrics.tasks, settings.exact_rows)
    towers = retrieval_towers(model.module)
    index = None if towers is None or items is None else index_for(towers, items, device)
    retrieval = None if towers is None else RetrievalEvaluation(towers, index)
    throughput, spoilt = Throughput(), list[Step]()
    last_line = time.perf_counter()
    model.module.eval()
    with torch.no_grad():
        for step in steps_to_the_end(stream, device, says, spoilt):
            batch = step.batch
            outputs = model.module(batch)
            logits = logits_of(model.module, outputs, len(schema.labels))
            if bool((logits.isnan() & (batch.weights > 0)).any()):
                spoilt.append(step)  # all ranks learn of it before the next step
                continue
            if retrieval is not None:
                retrieval.update(outputs, batch)
            metrics.update(logits, batch.labels, batch.weights, batch.num_impressions)
            scored.add(batch, logits)
            oracle.update_probabilities(batch.oracle, batch.labels, batch.weights, batch.num_impressions)
            throughput.add(step.requests, step.impressions, step.wait_seconds)
            if time.perf_counter() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.perf_counter()
                say(f"evaluating: rank 0 has scored {throughput.requests:,} requests")
    model.module.train()
    merged = metrics.merge()
    values = {f"eval/{name}": value for name, value in merged.compute().items()} | scored.result()
    scored.write(settings.scores, rank)
    if retrieval is not None:
        values |= {f"eval/{name}": value for name, value in retrieval.result().items()}
    for name, value in oracle.merge().compute().items():
        task, metric = name.split("/")
        if metric in ("ne", "auc") and math.isfinite(value):  # NaN without an oracle: there is no such figure
            values[f"eval/{task}/bayes_{metric}"] = value
    values |= throughput.over_ranks(device, "eval")
    skipped = torch.tensor([stream.skipped_requests], device=device)
    dist.all_reduce(skipped)
    if int(skipped):
        values["eval/skipped_requests"] = float(skipped)
        say(f"held out: {int(skipped):,} requests of shards that cannot be read were skipped (ingest.on_bad_shard)")
    task = schema.labels[0].name
    say(
        f"held out: {values['eval/requests']:,.0f} requests  {task} NE {values[f'eval/{task}/ne']:.4f}  "
        f"AUC {values[f'eval/{task}/auc']:.4f}  GAUC {values[f'eval/{task}/gauc']:.4f}"
    )
    return values, curves_of(merged)
