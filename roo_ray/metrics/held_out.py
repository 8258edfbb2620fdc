"""Exact metrics of held-out data over all ranks: AUC from all scores, GAUC by user; and the scores themselves.

Both need rows that lie on several ranks together. AUC: every rank takes a range of scores, so that equal scores
meet on one rank and a positive's rank among all negatives is the negatives of lower ranges plus those below it in its
own. GAUC by user: every rank takes the users whose key falls to it. Pairs are counted in int64, so that the results
are the same on any number of ranks (GAUC's weighted sum to float64 rounding).
"""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from roo_ray.errors import DataError
from roo_ray.ingest.batch import RequestBatch
from roo_ray.metrics import auc, gauc
from roo_ray.metrics.exchange import exchange_rows, summed, wire_device, world_size
from roo_ray.storage import open_filesystem

SCORES_FILE = "scores.json"


def exact_auc_over_ranks(scores: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> float:
    """AUC of the (N,) float32 scores and 0/1 labels of all ranks, ties counting one half (collective). NaN where a
    class is missing."""
    ranks = world_size(group)
    bins = auc.bin_of(scores)  # monotone: a bin's scores, and so equal scores, stay together
    counts = summed(torch.bincount(bins, minlength=auc.BINS), group)
    before = counts.cumsum(0) - counts
    owner = (before * ranks // counts.sum().clamp_min(1)).clamp_max(ranks - 1)  # (BINS,) rank, rising
    scores, labels = exchange_rows([scores, labels > 0], owner[bins], group)
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    positives = torch.zeros_like(counts).index_add_(0, inverse, labels.long())
    negatives = counts - positives
    everywhere = torch.zeros(ranks, dtype=torch.int64)
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    everywhere[rank] = negatives.sum()
    below = summed(everywhere, group)[:rank].sum()  # negatives in the ranges of lower ranks
    twice_won = (positives * (2 * (below + negatives.cumsum(0)) - negatives)).sum()
    won, positive, negative = summed(torch.stack([twice_won, positives.sum(), negatives.sum()]), group).tolist()
    return won / (2 * positive * negative) if positive * negative else math.nan


def gauc_by_user_state(
    logits: Tensor, labels: Tensor, known: Tensor, users: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The GAUC state (4, K) with users as groups, of all ranks' rows: logits, labels, known (N, K), users (N,) int64
    keys (collective)."""
    owner = torch.remainder(users, world_size(group))
    logits, labels, known, users = exchange_rows([logits, labels, known, users], owner, group)
    unique, inverse = torch.unique(users, return_inverse=True)
    return summed(gauc.grouped_state(logits, labels, known, inverse, len(unique)), group)


class HeldOutScores:
    """Collects the scored held-out impressions of a rank, on the host: 24 + 6 K bytes each.

    ``limit``: impressions a rank at most; where any rank has more, ``result`` is empty on all (the streaming figures
    stand, and ``eval/exact`` is 0).
    """

    def __init__(self, tasks: list[str], limit: int) -> None:
        self.tasks, self.limit = tasks, limit
        self.rows = 0
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, batch: RequestBatch, logits: Tensor) -> None:
        """Adds a batch of whole requests and its logits (B_NRO, K); dummies are left out."""
        real = (batch.weights > 0).any(1)
        if not batch.total_impressions or not bool(real.any()):
            return
        self.rows += int(real.sum())
        if self.rows > self.limit:
            self._parts = []
            return
        of_request = batch.request_of_impression()
        columns = (
            batch.request_key[of_request],
            batch.user_key[of_request],
            batch.impression_index,
            logits.detach().float(),
            batch.labels > 0,
            batch.weights > 0,
        )
        self._parts.append(tuple(column[real].cpu() for column in columns))

    def columns(self) -> list[Tensor]:
        """request_key, user_key, impression_index (N,) int64; logits (N, K) float32; labels, known (N, K) bool."""
        tasks = len(self.tasks)
        keys, flags = torch.zeros(0, dtype=torch.int64), torch.zeros(0, tasks, dtype=torch.bool)
        empty = (keys, keys, keys, torch.zeros(0, tasks), flags, flags)
        return [torch.cat([empty[i], *(part[i] for part in self._parts)]) for i in range(6)]

    def result(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """``eval/<task>/auc`` (exact), ``/gauc_user``, ``/gauc_users``, ``/gauc_users_skipped`` over all ranks, and
        ``eval/exact``: 1, or 0 where there were too many rows (collective)."""
        too_many = summed(torch.tensor([int(self.rows > self.limit)]), group)
        if int(too_many):
            return {"eval/exact": 0.0}
        _, users, _, logits, labels, known = self.columns()
        values = {"eval/exact": 1.0}
        state = gauc_by_user_state(logits, labels.float(), known.float(), users, group)
        for k, task in enumerate(self.tasks):
            seen = known[:, k]
            values[f"eval/{task}/auc"] = exact_auc_over_ranks(logits[seen, k], labels[seen, k], group)
            values[f"eval/{task}/gauc_user"] = float(gauc.gauc(state)[k])
            values[f"eval/{task}/gauc_users"] = float(state[gauc.REQUESTS, k])
            values[f"eval/{task}/gauc_users_skipped"] = float(state[gauc.SKIPPED, k])
        return values

    def write(self, folder: str | None, rank: int, group: dist.ProcessGroup | None = None) -> None:
        """Writes every rank's rows as Parquet below ``folder``, and ``scores.json`` last (collective; nothing where
        ``folder`` is None). Columns: request_key, user_key, impression_index, and per task ``logit_<task>`` and
        ``label_<task>`` (null where unknown). Raises DataError where a rank has more rows than the limit."""
        if folder is None:
            return
        if int(summed(torch.tensor([int(self.rows > self.limit)]), group)):
            raise DataError(
                f"evaluation.scores: a rank scored more than evaluation.exact_rows={self.limit:,} impressions; raise it"
            )
        filesystem, base = open_filesystem(folder)
        filesystem.create_dir(base, recursive=True)
        if rank == 0 and filesystem.get_file_info(f"{base}/{SCORES_FILE}").is_file:
            filesystem.delete_file(f"{base}/{SCORES_FILE}")  # it would complete what is half written over the old
        int(summed(torch.zeros(1, device=wire_device(group)), group))  # no rank writes before
        request, user, index, logits, labels, known = (column.numpy() for column in self.columns())
        table = {"request_key": request, "user_key": user, "impression_index": index}
        for k, task in enumerate(self.tasks):
            table[f"logit_{task}"] = logits[:, k]
            table[f"label_{task}"] = pa.array(labels[:, k], mask=~known[:, k])
        with filesystem.open_output_stream(f"{base}/part-{rank:05d}.parquet") as stream:
            pq.write_table(pa.table(table), stream)
        rows = int(summed(torch.tensor([self.rows], device=wire_device(group)), group))  # all ranks have written
        if rank == 0:
            with filesystem.open_output_stream(f"{base}/{SCORES_FILE}") as stream:
                stream.write(json.dumps({"ranks": world_size(group), "rows": rows, "tasks": self.tasks}).encode())


def read_scores(folder: str) -> tuple[pa.Table, list[str]]:
    """(the rows that ``write`` wrote, in order of request and impression; the tasks). Raises DataError where they
    are not complete."""
    filesystem, base = open_filesystem(folder)
    if not filesystem.get_file_info(f"{base}/{SCORES_FILE}").is_file:
        raise DataError(f"{folder} holds no complete scores: it has no {SCORES_FILE}")
    with filesystem.open_input_stream(f"{base}/{SCORES_FILE}") as stream:
        note = json.loads(stream.read())
    paths = [f"{base}/part-{rank:05d}.parquet" for rank in range(note["ranks"])]
    table = pa.concat_tables([pq.read_table(path, filesystem=filesystem) for path in paths])
    if table.num_rows != note["rows"]:
        raise DataError(f"{folder} holds {table.num_rows} scored impressions, and {SCORES_FILE} says {note['rows']}")
    return table.sort_by([("request_key", "ascending"), ("impression_index", "ascending")]), list(note["tasks"])
