"""The index of item vectors that retrieval exports, exact search in it, and recall at k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.models.architectures.retrieval import RetrievalTowers
from roo_ray.models.retrieval import gather_rows

_SCORES_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class ItemIndex:
    """``ids`` (M,) int64, ascending and unique; ``vectors`` (M, D) float32 of length 1."""

    ids: Tensor
    vectors: Tensor

    @staticmethod
    def of(ids: Tensor, vectors: Tensor) -> ItemIndex:
        """An index of items that may come several times; the last vector of each counts."""
        unique, place = torch.unique(ids, return_inverse=True)
        last = torch.zeros(len(unique), dtype=torch.int64, device=ids.device)
        last.scatter_reduce_(0, place, torch.arange(len(ids), device=ids.device), "amax", include_self=False)
        return ItemIndex(unique, vectors[last])

    def search(self, users: Tensor, k: int) -> Tensor:
        """Ids of the k best items by dot product, best first: users (B, D) -> (B, min(k, M)) int64. Exact."""
        rows = max(1, _SCORES_AT_ONCE // max(1, len(self.ids)))
        found = [(part @ self.vectors.T).topk(min(k, len(self.ids)), dim=1).indices for part in users.split(rows)]
        return self.ids[torch.cat(found)] if found else self.ids.new_zeros(0, min(k, len(self.ids)))

    def save(self, path: str | Path) -> None:
        """Writes a Parquet file with columns ``item`` and ``vector`` (a list of D floats)."""
        flat = pa.array(self.vectors.cpu().contiguous().numpy().ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1])
        pq.write_table(pa.table({"item": self.ids.cpu().numpy(), "vector": vectors}), path)

    @staticmethod
    def load(path: str | Path) -> ItemIndex:
        """Reads what ``save`` wrote."""
        table = pq.read_table(path).combine_chunks()
        vectors = table.column("vector").chunk(0)
        flat = torch.from_numpy(vectors.values.to_numpy(zero_copy_only=False).copy())
        return ItemIndex(torch.from_numpy(table.column("item").to_numpy().copy()), flat.view(len(vectors), -1))


class RetrievalEvaluation:
    """Recall at k over held-out requests: the share of a request's positives among its k best items of the index,
    averaged over requests that have a positive. The index holds every item of the pass, on all ranks."""

    def __init__(self, towers: RetrievalTowers) -> None:
        self.towers = towers
        self._items: list[tuple[Tensor, Tensor]] = []
        self._users: list[Tensor] = []
        self._positives: list[Jagged] = []

    def update(self, pairs: Tensor, batch: RequestBatch) -> None:
        """Takes a request batch and the towers' pairs (B_NRO, 2 D) of it."""
        users, vectors = pairs.detach().float().chunk(2, dim=1)
        ids = batch.impression_ids[self.towers.item].values
        real = (batch.weights > 0).any(dim=1)
        self._items.append((ids[real], vectors[real]))
        first = batch.num_impressions.cumsum(0) - batch.num_impressions
        self._users.append(users[first])
        positive = (batch.labels * batch.weights)[:, self.towers.positive] > 0  # (B_NRO,)
        per_request = torch.zeros_like(batch.num_impressions)
        per_request.index_add_(0, batch.request_of_impression(), positive.long())
        self._positives.append(Jagged(ids[positive], per_request))

    def index(self) -> ItemIndex:
        """The items of all ranks (collective)."""
        own = ItemIndex.of(torch.cat([i for i, _ in self._items]), torch.cat([v for _, v in self._items]))
        return ItemIndex.of(*gather_rows(own.ids, own.vectors))

    def result(self) -> dict[str, float]:
        """``compute`` on the index of the pass; nothing after a pass without batches (collective)."""
        return self.compute(self.index()) if self._users else {}

    def compute(self, index: ItemIndex, at: Sequence[int] = (10, 50, 100)) -> dict[str, float]:
        """``recall_at_k`` over all ranks, for each k, and the requests and items it is measured on (collective)."""
        positives = Jagged.concat(self._positives)
        asked = positives.lengths > 0
        found = index.search(torch.cat(self._users)[asked], max(at))  # (B, k)
        lengths = positives.lengths[asked]
        row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        hits = found[row] == positives.values.unsqueeze(1)  # (positives, k)
        share = 1.0 / lengths[row].double()
        sums = torch.stack([(hits[:, :k].any(dim=1) * share).sum() for k in at] + [asked.sum().double()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        *recalls, requests = sums.tolist()
        values = {f"recall_at_{k}": recall / max(requests, 1.0) for k, recall in zip(at, recalls, strict=True)}
        return values | {"requests_with_positive": requests, "items": float(len(index.ids))}
