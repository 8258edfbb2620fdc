"""Retrieval: user and item vectors of length 1, whose dot product ranks the whole catalogue."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from roo_ray.config import Model
from roo_ray.errors import ConfigError
from roo_ray.models.architectures.two_tower import ItemTower, UserTower
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.precision import at_least_float32
from roo_ray.schema import Schema


class RetrievalTowers(RequestOnlyModel):
    """Two towers without a score: what they give are pairs, (B_NRO, 2 D), the vector of the impression's user and
    that of its item. Losses and index are in ``roo_ray.models.retrieval``.

    ``item``: the id feature that names an item; ``positive``: the column of ``labels`` that makes an impression a
    positive. ``item_counts`` (rows of the item's table,) int64: impressions of each item seen in training, on all
    ranks; ``items_seen`` () int64: their sum. Both are the model's state, because the logQ correction goes on from
    them after a restart.
    """

    item_counts: Tensor
    items_seen: Tensor
    seen_before: Tensor

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.temperature, self.log_q = settings.temperature, settings.log_q
        self.item, self.table = _item_feature(schema, settings)
        labels = [label.name for label in schema.labels]
        if settings.positive is not None and settings.positive not in labels:
            raise ConfigError(f"model.positive '{settings.positive}' is no label of schema '{schema.name}': {labels}")
        self.positive = labels.index(settings.positive) if settings.positive else 0
        self.user_tower = UserTower(settings.user_dim, schema, settings)
        self.item_tower = ItemTower(settings.user_dim, schema, settings)
        self.register_buffer("item_counts", torch.zeros(schema.tables[self.table].rows, dtype=torch.int64))
        self.register_buffer("items_seen", torch.zeros((), dtype=torch.int64))
        self.managed = schema.tables[self.table].managed
        if self.managed:  # rows change hands: what had been seen when each got its item
            self.register_buffer("seen_before", torch.zeros_like(self.item_counts))

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, D), of length 1."""
        return UserState({"user": functional.normalize(at_least_float32(self.user_tower(inputs)), dim=1)})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Pairs (B_NRO, 2 D): the user's vector, then the item's, which is a function of the candidate alone."""
        items = functional.normalize(at_least_float32(self.item_tower(inputs)), dim=1)
        return torch.cat([user.vectors["user"], items], dim=1)

    def count_items(self, rows: Tensor) -> None:
        """Counts the impressions of a global batch by the rows (M,) int64 of their items. Of a managed table's last
        row, which is that of all items without one, nothing is counted."""
        self.items_seen += rows.numel()
        rows = rows[rows < self.item_counts.numel() - 1] if self.managed else rows
        self.item_counts.index_add_(0, rows, torch.ones_like(rows))

    def forget_items(self, rows: Tensor) -> None:
        """Counts anew for rows (R,) int64 of a managed table, which have got other items."""
        self.item_counts[rows] = 0
        self.seen_before[rows] = self.items_seen

    def log_frequency(self, rows: Tensor) -> Tensor:
        """Logarithm of the items' share of all impressions counted: (M,) int64 -> (M,) float32. Its cost is that of
        ``rows``, not of the table. In a managed table the share is of those since the row got its item, and begins at
        that of one item in as many as there are rows."""
        counts = self.item_counts.index_select(0, rows).double()
        if self.managed:
            seen = self.items_seen - self.seen_before.index_select(0, rows)
            return torch.log((counts + 1) / (seen + self.item_counts.numel())).float()
        return torch.log(counts.clamp(min=1) / self.items_seen.clamp(min=1)).float()

    def item_fingerprint(self) -> str:
        """A hash of the item tower's weights: it tells the vectors of one model from those of another."""
        digest = hashlib.sha256()
        for name, value in sorted(self.item_tower.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def scores(self, pairs: Tensor) -> Tensor:
        """(B_NRO, 2 D) -> (B_NRO,): cosine over temperature."""
        users, items = pairs.chunk(2, dim=1)
        return (users * items).sum(1) / self.temperature


def _item_feature(schema: Schema, settings: Model) -> tuple[str, str]:
    """(feature, its table)."""
    features = {f.name: f for f in schema.select("impression", "ids") if f.pooling == "none"}
    name = settings.item or next(iter(features), None)
    if name not in features:
        raise ConfigError(
            f"retrieval needs an impression-level id feature with pooling none that names the item: model.item is "
            f"'{settings.item}', schema '{schema.name}' has {sorted(features) or 'none'}"
        )
    table = features[name].table
    assert table is not None
    return name, table
