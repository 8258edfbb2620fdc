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

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, D), of length 1."""
        return UserState({"user": functional.normalize(at_least_float32(self.user_tower(inputs)), dim=1)})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Pairs (B_NRO, 2 D): the user's vector, then the item's, which is a function of the candidate alone."""
        items = functional.normalize(at_least_float32(self.item_tower(inputs)), dim=1)
        return torch.cat([user.vectors["user"], items], dim=1)

    def count_items(self, items: Tensor) -> None:
        """Counts the impressions of a global batch by their items (M,) int64."""
        self.item_counts.index_add_(0, items, torch.ones_like(items))
        self.items_seen += items.numel()

    def forget_items(self, rows: Tensor) -> None:
        """Counts from none again for rows (R,) int64 of the items' table, which have got other items."""
        self.items_seen -= self.item_counts[rows].sum()
        self.item_counts[rows] = 0

    def log_frequency(self, items: Tensor) -> Tensor:
        """Logarithm of the items' share of all impressions counted: (M,) int64 -> (M,) float32. Its cost is that of
        ``items``, not of the table."""
        counts = self.item_counts.index_select(0, items).double()
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
