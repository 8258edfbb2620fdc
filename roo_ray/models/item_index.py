"""The index of item vectors that retrieval exports, exact search in it, and recall at k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from roo_ray.errors import DataError
from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.models.architectures.retrieval import RetrievalTowers
from roo_ray.models.retrieval import gather_rows
from roo_ray.storage import open_filesystem, without_secrets

MERGE_AT = 1 << 20  # vectors held before those of one item are made one
_SCORES_AT_ONCE = 1 << 25
_TOWER = b"roo_ray.item_tower"  # metadata of an exported file


@dataclass(frozen=True)
class ItemIndex:
    """``ids`` (M,) int64, rows of the item's table, ascending and unique; ``vectors`` (M, D) float32 of length 1.

    An exported index has ``items`` (M,) too, the data set's own ids, ascending and unique; its ``ids`` are not where
    ids of a hashed table collide. ``tower``: the fingerprint of the item tower that the vectors are of."""

    ids: Tensor
    vectors: Tensor
    items: pa.Array | None = None
    tower: str = ""

    @staticmethod
    def of(ids: Tensor, vectors: Tensor) -> ItemIndex:
        """An index of items that may come several times; the last vector of each counts."""
        unique, place = torch.unique(ids, return_inverse=True)
        last = torch.zeros(len(unique), dtype=torch.int64, device=ids.device)
        last.scatter_reduce_(0, place, torch.arange(len(ids), device=ids.device), "amax", include_self=False)
        return ItemIndex(unique, vectors[last])

    def nearest(self, users: Tensor, k: int) -> Tensor:
        """Places of the k best items by dot product, best first: users (B, D) -> (B, min(k, M)) int64. Exact."""
        found = [
            (part @ self.vectors.T).topk(min(k, len(self.ids)), dim=1).indices
            for part in users.split(self.users_at_once())
        ]
        return torch.cat(found) if found else self.ids.new_zeros(0, min(k, len(self.ids)))

    def search(self, users: Tensor, k: int) -> Tensor:
        """Rows of the k best items, as ``nearest`` has them: (B, min(k, M)) int64."""
        return self.ids[self.nearest(users, k)]

    def search_items(self, users: Tensor, k: int) -> list[list[Any]]:
        """The data set's own ids of the k best items of each user, of an exported index."""
        assert self.items is not None
        return [self.items.take(pa.array(places)).to_pylist() for places in self.nearest(users, k).cpu().numpy()]

    def users_at_once(self) -> int:
        """How many users' scores of all items are computed at a time."""
        return max(1, _SCORES_AT_ONCE // max(1, len(self.ids)))

    def save(self, path: str | Path) -> None:
        """Writes a Parquet file with columns ``item`` (the data set's own id, or the row where that is not known),
        ``row`` and ``vector`` (a list of D floats)."""
        flat = pa.array(self.vectors.cpu().contiguous().numpy().ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1])
        rows = pa.array(self.ids.cpu().numpy())
        table = pa.table({"item": rows if self.items is None else self.items, "row": rows, "vector": vectors})
        pq.write_table(table.replace_schema_metadata({_TOWER: self.tower}), path)

    @staticmethod
    def load(path: str | Path) -> ItemIndex:
        """Reads what ``save`` wrote, from a local path or URI. Raises DataError where it is no such file."""
        tower = tower_of(path)
        filesystem, inner = open_filesystem(str(path))
        table = pq.read_table(inner, filesystem=filesystem).combine_chunks()
        vectors = table.column("vector").chunk(0)
        flat = torch.from_numpy(vectors.values.to_numpy(zero_copy_only=False).copy())
        rows = torch.from_numpy(table.column("row").to_numpy().copy())
        return ItemIndex(rows, flat.view(len(vectors), -1), table.column("item").chunk(0), tower)

    def to(self, device: torch.device) -> ItemIndex:
        """With its tensors on a device."""
        return replace(self, ids=self.ids.to(device), vectors=self.vectors.to(device))


def tower_of(path: str | Path) -> str:
    """The fingerprint of the item tower that an exported file is of. Raises DataError where it is no such file."""
    filesystem, inner = open_filesystem(str(path))
    shown = without_secrets(str(path)) if "://" in str(path) else path
    try:
        schema = pq.read_schema(inner, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"item vectors {shown} cannot be read: {error}") from None
    if not {"item", "row", "vector"} <= set(schema.names):
        raise DataError(f"{shown} has no item vectors (columns item, row, vector): export it (jobs/export_items.py)")
    return str((schema.metadata or {}).get(_TOWER, b"").decode())


def index_for(towers: RetrievalTowers, path: str, device: torch.device) -> ItemIndex:
    """An exported index, to be searched by a model's users. Raises DataError where it is of another item tower."""
    index = ItemIndex.load(path)
    if index.tower != towers.item_fingerprint():
        shown = without_secrets(path) if "://" in path else path
        raise DataError(f"the item vectors of {shown} are of another model: export this checkpoint's (export_items.py)")
    return index.to(device)


class ItemVectors:
    """Gathers vectors of items that come many times: the last of each, and no more memory than twice the distinct
    items' (or MERGE_AT vectors) and a batch."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []
        self.held = self._merge_at = 0

    def add(self, ids: Tensor, vectors: Tensor) -> int | None:
        """ids (N,) int64, vectors (N, D); how many distinct items there are, where they were merged now."""
        self._parts.append((ids, vectors))
        self.held += len(ids)
        if self.held <= max(self._merge_at, MERGE_AT):
            return None
        items = len(self.index().ids)
        self._merge_at = 2 * items  # a catalogue larger than MERGE_AT is not merged at every step
        return items

    def index(self) -> ItemIndex:
        """The items so far, of which there must be a batch."""
        merged = ItemIndex.of(torch.cat([i for i, _ in self._parts]), torch.cat([v for _, v in self._parts]))
        self._parts, self.held = [(merged.ids, merged.vectors)], len(merged.ids)
        return merged


class RetrievalEvaluation:
    """Recall at k over held-out requests: the share of a request's positives among its k best items of the index,
    averaged over requests that have a positive. ``index``: where the items are looked for, the same on all ranks; by
    default it holds every item of the pass, of all ranks.

    On the device there is a vector per distinct item; users and positives, of requests that have one, wait on the
    host. Items are told apart by their rows: of ids that collide in a hashed table any is as good as the positive."""

    def __init__(self, towers: RetrievalTowers, index: ItemIndex | None = None) -> None:
        self.towers, self._given = towers, index
        self._items = ItemVectors()
        self._users: list[Tensor] = []
        self._positives: list[Jagged] = []

    def update(self, pairs: Tensor, batch: RequestBatch) -> None:
        """Takes a request batch and the towers' pairs (B_NRO, 2 D) of it."""
        users, vectors = pairs.detach().float().chunk(2, dim=1)
        ids = batch.impression_ids[self.towers.item].values
        real = (batch.weights > 0).any(dim=1)
        if self._given is None:
            self._items.add(ids[real], vectors[real])
        first = batch.num_impressions.cumsum(0) - batch.num_impressions
        positive = (batch.labels * batch.weights)[:, self.towers.positive] > 0  # (B_NRO,)
        per_request = torch.zeros_like(batch.num_impressions)
        per_request.index_add_(0, batch.request_of_impression(), positive.long())
        asked = per_request > 0
        self._users.append(users[first[asked]].cpu())
        self._positives.append(Jagged(ids[positive].cpu(), per_request[asked].cpu()))

    def index(self) -> ItemIndex:
        """The index that was given, or the items of all ranks (collective)."""
        if self._given is not None:
            return self._given
        own = self._items.index()
        return ItemIndex.of(*gather_rows(own.ids, own.vectors))

    def result(self) -> dict[str, float]:
        """``compute`` on ``index``; nothing after a pass without batches (collective)."""
        return self.compute(self.index()) if self._users else {}

    def compute(self, index: ItemIndex, at: Sequence[int] = (10, 50, 100)) -> dict[str, float]:
        """``recall_at_k`` over all ranks, for each k, and the requests and items it is measured on (collective)."""
        users, positives = torch.cat(self._users), Jagged.concat(self._positives)
        device = index.ids.device
        sums = torch.zeros(len(at) + 1, dtype=torch.float64, device=device)
        sums[-1] = len(users)
        for rows in torch.arange(len(users)).split(index.users_at_once()) if len(users) else ():
            found = index.search(users[rows].to(device), max(at))  # (B, k)
            wanted = positives.take(rows)
            lengths = wanted.lengths.to(device)
            row = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
            hits = found[row] == wanted.values.to(device).unsqueeze(1)  # (positives, k)
            share = 1.0 / lengths[row].double()
            sums[:-1] += torch.stack([(hits[:, :k].any(dim=1) * share).sum() for k in at])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        *recalls, requests = sums.tolist()
        values = {f"recall_at_{k}": recall / max(requests, 1.0) for k, recall in zip(at, recalls, strict=True)}
        return values | {"requests_with_positive": requests, "items": float(len(index.ids))}
