"""What the benchmarks of models share: a schema, random batches of a shape, side-by-side timing, a report."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roo_ray.allocator import use_huge_pages
from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.schema import Schema, parse_schema

warnings.filterwarnings("ignore")  # TorchRec's own, on every construction
logging.disable(logging.WARNING)
use_huge_pages()  # as trainers do when roo_ray.training is imported, before TorchRec is

ITEMS, TOPICS, COUNTRIES = 100_000, 100, 64
SECONDS_A_TURN = 0.5


def schema_of(history: int, dim: int) -> Schema:
    """A feed: a history of ``history`` events (none: 0) of items and topics, candidates on the same tables."""
    sequence = f"""
  - name: history
    level: request
    kind: sequence
    max_length: {history}
    time: history_time
    sequence: [{{column: history_item, table: item}}, {{column: history_topic, table: topic}}]"""
    return parse_schema(f"""
name: benchmark
keys: {{request: request_id, user: user_id, time: request_time}}
tables:
  item: {{rows: {ITEMS}, dim: {dim}}}
  topic: {{rows: {TOPICS}, dim: {dim}}}
  country: {{rows: {COUNTRIES}, dim: {dim}}}
features:
  - {{name: profile, level: request, kind: dense, columns: [age, activity]}}
  - {{name: country, level: request, kind: ids, columns: country_id, table: country}}{sequence if history else ""}
  - {{name: item, level: impression, kind: ids, columns: item_id, table: item}}
  - {{name: topic, level: impression, kind: ids, columns: topic_id, table: topic}}
  - {{name: placement, level: impression, kind: dense, columns: [position, item_age]}}
labels:
  - {{name: click, column: clicked}}
""")


def random_batch(schema: Schema, requests: int, impressions: int, history: int, seed: int) -> RequestBatch:
    """``requests`` of ``impressions`` each; history lengths uniform in [history / 4, history]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=generator)

    def single(high: int, count: int) -> Jagged:
        return Jagged(draw(high, count), torch.ones(count, dtype=torch.int64))

    total = requests * impressions
    lengths = torch.randint(history // 4, history + 1, (requests,), generator=generator) if history else None
    time = torch.full((requests,), 1.7e9, dtype=torch.float64)
    batch = RequestBatch(
        num_impressions=torch.full((requests,), impressions),
        request_key=torch.arange(requests),
        impression_index=torch.arange(impressions).repeat(requests),
        user_key=torch.arange(requests),
        request_time=time,
        request_dense=torch.rand(requests, 2, generator=generator),
        impression_dense=torch.rand(total, 2, generator=generator),
        request_ids={"country": single(COUNTRIES, requests)},
        sequence_dense={},
        sequence_time={},
        impression_ids={"item": single(ITEMS, total), "topic": single(TOPICS, total)},
        labels=(torch.rand(total, 1, generator=generator) < 0.1).float(),
        weights=torch.ones(total, 1),
        oracle=torch.full((total, 1), float("nan")),
    )
    if lengths is None:
        return batch
    tokens = int(lengths.sum())
    ages = 60.0 * (torch.repeat_interleave(lengths, lengths) - _places(lengths)).double()
    return replace(
        batch,
        request_ids=batch.request_ids
        | {
            "history.history_item": Jagged(draw(ITEMS, tokens), lengths),
            "history.history_topic": Jagged(draw(TOPICS, tokens), lengths),
        },
        sequence_dense={"history": torch.zeros(tokens, 0)},
        sequence_time={"history": torch.repeat_interleave(time, lengths) - ages},
    )


def _places(lengths: Tensor) -> Tensor:
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.arange(int(lengths.sum())) - starts


def side_by_side(ways: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each way in each round, taken in turns, the order reversed in every other round, after one round
    that is not counted. A turn is repeated for SECONDS_A_TURN: a training takes many steps of one form, and a short
    one right after a long one of the other finds its memory in no cache.

    On CPU the process's own CPU seconds, of one thread: what else the machine does is then hardly a part of them.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:
            times, taken = 0, 0.0
            _wait_for(device)
            begin = clock()
            while taken < SECONDS_A_TURN:
                way()
                _wait_for(device)
                times, taken = times + 1, clock() - begin
            if turn:
                seconds[name].append(taken / times)
    return seconds


def _wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def times_faster(seconds: dict[str, list[float]], baseline: str, way: str) -> float:
    """Median over the rounds of how many times faster ``way`` was than ``baseline`` in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[baseline], seconds[way], strict=True))


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that a node keeps would keep the node: neither were ever freed

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(self._storages.values())


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases, smaller")
    parser.add_argument("--check", action="store_true", help="exit with 1 where an aim is missed")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing: report on the rows of these JSON files")
    return parser


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """What benchmarks of attention take besides: the model's size, and the peak that its speed is a share of."""
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--peak-tflops", type=float, help="the device's peak for the products' type, for the MFU")


def merged(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of earlier ``--json`` files."""
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def finish(rows: list[dict[str, Any]], missed: list[str], options: argparse.Namespace) -> None:
    """Writes the JSON, says which aims were missed, and exits."""
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "missed": missed}, indent=1))
    for line in missed:
        print(f"missed: {line}")
    if not missed:
        print("all aims met")
    sys.exit(1 if missed and options.check else 0)
