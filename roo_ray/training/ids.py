"""Feeds the maps of managed tables (``models.managed``): every step's ids, of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from roo_ray.ingest.batch import RequestBatch
from roo_ray.models.embeddings import EmbeddingLookup, without_future_events
from roo_ray.models.initialise import begin_rows_anew
from roo_ray.models.managed import managed_ids
from roo_ray.models.objective import retrieval_towers
from roo_ray.models.retrieval import gather_rows
from roo_ray.schema import Schema
from roo_ray.training.sharding import ShardedModel


def meet_ids(model: ShardedModel, schema: Schema, batch: RequestBatch, seed: int) -> None:
    """Before a training step: the maps of managed tables meet the ids of this rank's ``batch`` and of the others', and
    rows that go to another id begin anew, their optimizer's state too (collective, where there is such a table).

    The same in the request and the impression-level form, and for any number of ranks. What an id's future events say
    stays unknown."""
    managed = managed_ids(model.module)
    if managed is None:
        return
    lookup = next(module for module in model.module.modules() if isinstance(module, EmbeddingLookup))
    towers = retrieval_towers(model.module)
    own = managed.distinct(without_future_events(batch, schema))
    # of all tables at once, each id with its table's number: (U, 2)
    (every,) = gather_rows(torch.cat([_numbered(ids, number) for number, ids in enumerate(own.values())]))
    for number, table in enumerate(own):
        changed = managed.table(table).meet(every[every[:, 1] == number, 0].unique())
        if not changed.numel():
            continue
        begin_rows_anew(lookup, seed, table, changed, model.optimizer.state_dict()["state"])
        if towers is not None and towers.table == table:
            towers.forget_items(changed)


def _numbered(ids: Tensor, number: int) -> Tensor:
    return torch.stack([ids, torch.full_like(ids, number)], dim=1)


def id_metrics(model: torch.nn.Module) -> dict[str, float]:
    """Per managed table: rows that have an id, and how many ids have lost theirs so far."""
    managed = managed_ids(model)
    if managed is None:
        return {}
    maps = {name: managed.table(name) for name in managed.features}
    used = {f"ids/{name}/rows_used": float(of.rows_used()) for name, of in maps.items()}
    return used | {f"ids/{name}/evicted": float(of.evicted) for name, of in maps.items()}
