"""Tables of unbounded ids without collisions (ZCH): an id gets a row of its own when training meets it, and loses it to
ids that are met more, or later.

The map from ids to rows is TorchRec's managed collision module, whole on every rank and fed with the distinct ids of
the global step. So a run has the same map on 1 rank and on N, and in the request and the impression-level form, and a
checkpoint holds all of it. (TorchRec's own sharded form has a map per rank, counts an id as often as its rows are
repeated, keeps what it has counted since the last update out of checkpoints, and does not train on CPU.)

``EmbeddingLookup`` turns ids into rows, which changes nothing; ``training.ids`` feeds the map, in training alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)

from roo_ray.config import ManagedRows
from roo_ray.ingest.batch import Jagged, RequestBatch, impression_id_keys, request_id_keys
from roo_ray.ingest.columns import NO_ID
from roo_ray.schema import Schema

_POLICIES: dict[str, type[MCHEvictionPolicy]] = {
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
    "distance_lfu": DistanceLFU_EvictionPolicy,
}


class TableMap(nn.Module):
    """Which id has which row of one table. The last row is that of all ids without one.

    Ids met are kept until ``settings.every`` steps have passed, or ``settings.buffer`` ids wait; then those of the
    highest score get, or keep, the table's rows. The first intervals are shorter, 1, 2, 4, ... steps: else all ids of a
    run's beginning would train one row. Its state is its buffers, all of them in checkpoints.
    """

    interval: Tensor
    waiting: Tensor
    waiting_ids: Tensor
    waiting_steps: Tensor
    evicted: Tensor

    def __init__(self, rows: int, settings: ManagedRows, device: torch.device) -> None:
        super().__init__()
        self.every, self.num_rows = settings.every, rows
        # each of its updates is one of ours: its own interval would leave what it has counted out of checkpoints
        self.map = MCHManagedCollisionModule(rows, device, _POLICIES[settings.policy](), eviction_interval=1)
        self.register_buffer("waiting", torch.zeros(settings.buffer, dtype=torch.int64, device=device))
        self.register_buffer("interval", torch.ones((), dtype=torch.int64, device=device))
        for name in ("waiting_ids", "waiting_steps", "evicted"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    def rows(self, ids: Tensor) -> Tensor:
        """ids (N,) int64 -> their rows (N,) int64."""
        rows: Tensor = self.map.remap({"ids": _jagged(ids)})["ids"].values()
        return rows

    def meet(self, ids: Tensor) -> Tensor:
        """Takes the distinct ids of a step, (U,) int64, the same on all ranks. Returns the rows whose id has changed,
        (R,) int64: they are to begin anew."""
        changed, held = [], int(self.waiting_ids)
        for part in _parts(ids, held, self.waiting.numel()):
            if held + part.numel() > self.waiting.numel():
                changed.append(self._update(held))
                held = 0
            self.waiting[held : held + part.numel()] = part
            held += part.numel()
        self.waiting_steps += 1
        if int(self.waiting_steps) >= int(self.interval) and held:
            changed.append(self._update(held))
            held = 0
        self.waiting_ids.fill_(held)
        return torch.cat(changed).unique() if changed else ids.new_zeros(0)

    def rows_used(self) -> int:
        """Rows that have an id."""
        return self.num_rows - 1 - int((self.map._mch_sorted_raw_ids[:-1] == torch.iinfo(torch.int64).max).sum())

    def _update(self, held: int) -> Tensor:
        self.waiting_steps.zero_()
        self.interval.copy_((2 * self.interval).clamp(max=self.every))
        used = self.rows_used()
        self.map.train()
        self.map._current_iter = -1  # its buffer says it, which a checkpoint may have set
        self.map._input_history_buffer_size = -1  # of the size of what it is given now
        self.map.profile({"ids": _jagged(self.waiting[:held])})
        changed: Tensor = self.map.evict()
        self.evicted += changed.numel() - (self.rows_used() - used)  # the others were free
        return changed


def _parts(ids: Tensor, held: int, room: int) -> list[Tensor]:
    """The ids in parts that fit: the first beside those ``held``, the others alone."""
    first = min(room - held, ids.numel())
    return [part for part in (ids[:first], *ids[first:].split(room)) if part.numel()]


def _jagged(ids: Tensor) -> JaggedTensor:
    return JaggedTensor(ids, lengths=torch.tensor([ids.numel()], device=ids.device))


class ManagedIds(nn.Module):
    """The maps of the tables that a schema has as ``managed``; without any it does nothing.

    ``device``: where the maps lie, whole, on every rank (``map_bytes``)."""

    def __init__(self, schema: Schema, settings: ManagedRows, device: torch.device | None = None) -> None:
        super().__init__()
        on = device or torch.device("cpu")
        self.features: dict[str, list[str]] = {}
        for key, table in request_id_keys(schema) + impression_id_keys(schema):
            if schema.tables[table].managed:
                self.features.setdefault(table, []).append(key)
        self.maps = nn.ModuleDict({name: TableMap(schema.tables[name].rows, settings, on) for name in self.features})

    def forward(self, batch: RequestBatch) -> RequestBatch:
        """The batch with rows in place of ids."""
        if not self.features:
            return batch
        ids = {"request": dict(batch.request_ids), "impression": dict(batch.impression_ids)}
        for table, keys in self.features.items():
            for key in keys:
                level = ids["request" if key in batch.request_ids else "impression"]
                level[key] = Jagged(self.table(table).rows(level[key].values), level[key].lengths)
        return replace(batch, request_ids=ids["request"], impression_ids=ids["impression"])

    def table(self, name: str) -> TableMap:
        """The map of a table."""
        found = self.maps[name]
        assert isinstance(found, TableMap)
        return found

    def distinct(self, batch: RequestBatch) -> dict[str, Tensor]:
        """Table -> the distinct ids of a batch of ids (not rows), ascending, (U,) int64; a dummy has none."""
        ids = batch.request_ids | batch.impression_ids
        found = {t: torch.cat([ids[key].values for key in keys]).unique() for t, keys in self.features.items()}
        return {table: unique[unique != NO_ID] for table, unique in found.items()}


def map_bytes(rows: int, settings: ManagedRows) -> int:
    """Bytes of the map of a table of so many rows, on every rank: an id, a row and what the policy keeps per row; and
    per waiting id the id, and what TorchRec takes to count them."""
    policy = _POLICIES[settings.policy]()
    per_row = 2 + sum(bool(info.is_mch_metadata) for info in policy.metadata_info)
    return 8 * per_row * rows + 28 * settings.buffer


def managed_ids(model: nn.Module) -> ManagedIds | None:
    """The maps within a model, wrapped or not; None where it has none."""
    found = next((module for module in model.modules() if isinstance(module, ManagedIds)), None)
    return found if found is not None and found.features else None
