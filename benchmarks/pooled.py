"""Bags pooled after the lookup against bags pooled where their table lies (``model.embeddings.pooled``), on two ranks.

    python benchmarks/pooled.py [--quick] [--check] [--json FILE] [--merge FILES]

Two processes over gloo, a thread each. A step is lookup, pooling, backward and the fused update of two tables, one
read by bags of requests and one by bags of impressions; no towers. Both ways are timed in turns, from a barrier to the
slowest rank's end. Bytes are those that the kernel counts on a rank's sockets, the mean of the ranks. Both tables are
placed table-wise, or row-wise.

Aims: from 16 ids a bag on, pooled tables send fewer bytes and are not slower.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model_cases import arguments, finish, merged, table, times_faster
from torch import Tensor, nn

from roo_ray.allocator import keep_freed_memory
from roo_ray.config import Embeddings, Training
from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.models.embeddings import EmbeddingLookup, model_inputs
from roo_ray.schema import Schema, parse_schema
from roo_ray.training.sharding import ShardedModel, shard

WORLD, DIM, ROWS = 2, 64, 100_000
REQUESTS, IMPRESSIONS = 32, 10  # of a rank's batch; impressions per request
TABLES = ("interest", "tag")
FROM_IDS = 16
_BYTES_SENT = 200  # where the kernel's tcp_info has it, a 64-bit number


def bags_schema() -> Schema:
    """A bag of a request and one of an impression, each on a table of its own."""
    return parse_schema(f"""
name: bags
keys: {{request: request_id, user: user_id, time: request_time}}
tables:
  interest: {{rows: {ROWS}, dim: {DIM}}}
  tag: {{rows: {ROWS}, dim: {DIM}}}
features:
  - {{name: interests, level: request, kind: ids, columns: interest_ids, table: interest, pooling: mean}}
  - {{name: tags, level: impression, kind: ids, columns: tag_ids, table: tag, pooling: sum}}
labels:
  - {{name: click, column: clicked}}
""")


class Bags(nn.Module):
    """The lookup, and a loss that every embedding takes part in."""

    def __init__(self, schema: Schema, pooled: tuple[str, ...]) -> None:
        super().__init__()
        self.schema = schema
        self.sparse = EmbeddingLookup(schema, torch.device("meta"), pooled=pooled)
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: RequestBatch) -> Tensor:
        """The sum over all bags."""
        inputs = model_inputs(self.schema, batch, self.sparse(batch))
        bags = torch.cat([inputs.request_ids["interests"], inputs.impression_ids["tags"]])
        return self.out(bags).sum()  # type: ignore[no-any-return]


def batch_of(ids: int, rank: int) -> RequestBatch:
    """A rank's batch, each bag of so many ids; ranks have unequal batches."""
    generator = torch.Generator().manual_seed(rank)
    requests = REQUESTS + rank
    total = requests * IMPRESSIONS

    def bags(count: int) -> Jagged:
        values = torch.randint(0, ROWS, (count * ids,), generator=generator)
        return Jagged(values, torch.full((count,), ids, dtype=torch.int64))

    return RequestBatch(
        num_impressions=torch.full((requests,), IMPRESSIONS),
        request_key=torch.arange(requests),
        impression_index=torch.arange(IMPRESSIONS).repeat(requests),
        user_key=torch.arange(requests),
        request_time=torch.zeros(requests, dtype=torch.float64),
        request_dense=torch.zeros(requests, 0),
        impression_dense=torch.zeros(total, 0),
        request_ids={"interests": bags(requests)},
        sequence_dense={},
        sequence_time={},
        impression_ids={"tags": bags(total)},
        labels=torch.zeros(total, 1),
        weights=torch.ones(total, 1),
        oracle=torch.full((total, 1), float("nan")),
    )


def make(kind: str, pooled: tuple[str, ...]) -> ShardedModel:
    """The sharded tables, all placed as ``kind``."""
    torch.manual_seed(0)
    embeddings = Embeddings(pooled=list(pooled), sharding=dict.fromkeys(TABLES, kind))  # type: ignore[arg-type]
    return shard(
        Bags(bags_schema(), pooled),
        Training(),
        torch.device("cpu"),
        batch_requests=REQUESTS,
        batch_impressions=REQUESTS * IMPRESSIONS,
        ids_per_request={},
        embeddings=embeddings,
    )


def step(model: ShardedModel, batch: RequestBatch) -> Tensor:
    """Lookup, backward, update."""
    loss: Tensor = model.module(batch)
    model.optimizer.zero_grad()
    loss.backward()
    return loss.detach()


def bytes_sent() -> int:
    """By this process so far, over all its open TCP connections."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
        except FileNotFoundError:  # of listing the folder itself
            continue
        with socket.socket(fileno=os.dup(int(name))) as found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT + 8)
                total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
    return total


def compare(kind: str, ids: int, rank: int, rounds: int, repeat: int) -> dict[str, Any]:
    """One row of the table."""
    batch = batch_of(ids, rank)
    models = {"after": make(kind, ()), "pooled": make(kind, TABLES)}
    losses = [step(model, batch) for model in models.values()]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-2)
    sent = {}
    for name, model in models.items():
        before = bytes_sent()
        for _ in range(repeat):
            step(model, batch)
        dist.barrier()
        sent[name] = (bytes_sent() - before) / repeat
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds):
        for name, model in list(models.items())[:: -1 if turn % 2 else 1]:
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(repeat):
                step(model, batch)
            dist.barrier()
            seconds[name].append((time.perf_counter() - begin) / repeat)
    both = torch.tensor([sent["after"], sent["pooled"]])
    dist.all_reduce(both)
    return {
        "kind": kind,
        "ids": ids,
        "after_ms": 1e3 * statistics.median(seconds["after"]),
        "pooled_ms": 1e3 * statistics.median(seconds["pooled"]),
        "speedup": times_faster(seconds, "after", "pooled"),
        "after_kb": float(both[0]) / WORLD / 1e3,
        "pooled_kb": float(both[1]) / WORLD / 1e3,
    }


def run(rank: int, folder: str, lengths: list[int], rounds: int, repeat: int) -> None:
    """What a rank does; rank 0 keeps the rows."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    rows = []
    for kind in ("table_wise", "row_wise"):
        for ids in lengths:
            rows.append(compare(kind, ids, rank, rounds, repeat))
            if rank == 0:
                print(f"{kind}, {ids} ids: {rows[-1]['speedup']:.2f}x", file=sys.stderr, flush=True)
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def missed_aims(row: dict[str, Any]) -> list[str]:
    """The aims that a row misses."""
    if row["ids"] < FROM_IDS:
        return []
    where, missed = f"{row['kind']}, {row['ids']} ids a bag", []
    if row["pooled_kb"] >= row["after_kb"]:
        missed.append(f"{where}: pooled sends {row['pooled_kb']:,.0f} kB, pooled after {row['after_kb']:,.0f} kB")
    if row["speedup"] < 1:
        missed.append(f"{where}: {row['speedup']:.2f}x, slower than pooling after the lookup")
    return missed


def main() -> None:
    """Runs the cases."""
    options = arguments("Pooled tables against pooling after the lookup").parse_args()
    lengths, rounds, repeat = ([1, 16], 3, 5) if options.quick else ([1, 4, 16, 64], 15, 10)
    if options.merge:
        rows = list({(r["kind"], r["ids"]): r for r in merged(options.merge)}.values())
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run, args=(folder, lengths, rounds, repeat), nprocs=WORLD)
            rows = torch.load(f"{folder}/rows.pt")
    header = ["placed", "ids a bag", "after the lookup, ms", "pooled, ms", "speed-up"]
    header += ["after the lookup, kB sent", "pooled, kB sent", "fewer bytes"]
    cells = [
        [
            r["kind"],
            r["ids"],
            f"{r['after_ms']:.1f}",
            f"{r['pooled_ms']:.1f}",
            f"{r['speedup']:.2f}x",
            f"{r['after_kb']:,.0f}",
            f"{r['pooled_kb']:,.0f}",
            f"{r['after_kb'] / r['pooled_kb']:.2f}x",
        ]
        for r in rows
    ]
    print(table(header, cells))
    finish(rows, [line for row in rows for line in missed_aims(row)], options)


if __name__ == "__main__":
    main()
