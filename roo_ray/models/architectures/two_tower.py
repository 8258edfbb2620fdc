"""Early-stage ranking: a user tower once per request, an item tower per impression, and a cheap score of the two."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, RequestFeatures, event_keys, sequence_widths
from roo_ray.models.heads import PositionBias
from roo_ray.models.history import HistoryEncoder
from roo_ray.models.interaction import Tower
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.schema import Schema


class UserTower(nn.Module):
    """Histories by HSTU, dense features, ids and bags -> a vector per request."""

    def __init__(self, width: int, schema: Schema, settings: Model) -> None:
        super().__init__()
        widths = {name: sum(columns.values()) for name, columns in sequence_widths(schema).items()}
        self.features = RequestFeatures(schema)
        self.encoders = nn.ModuleDict({f.name: HistoryEncoder(f, widths[f.name], settings) for f in schema.sequences})
        user_width = self.features.width + len(self.encoders) * HistoryEncoder.WIDTHS * settings.dim
        self.tower = Tower(user_width, [2 * settings.user_dim], settings.normalisation)
        self.dropout = KeyedDropout(settings.dropout, "user")
        self.output = nn.Linear(2 * settings.user_dim, width)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """(B_RO, width)."""
        known, _ = self.features(inputs)
        encoded = [encoder(inputs.sequences[name], event_keys(inputs, name)) for name, encoder in self.encoders.items()]
        hidden = self.tower(torch.cat([known, *encoded], dim=1), inputs.request_weight)
        return self.output(self.dropout(hidden, inputs.request_key))  # type: ignore[no-any-return]


class ItemTower(nn.Module):
    """A candidate's ids and dense features -> a vector per impression."""

    def __init__(self, width: int, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.features = CandidateFeatures(schema, settings)
        self.tower = Tower(self.features.width, [2 * settings.user_dim], settings.normalisation)
        self.output = nn.Linear(2 * settings.user_dim, width)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """(B_NRO, width)."""
        return self.output(self.tower(self.features(inputs), inputs.impression_weight))  # type: ignore[no-any-return]


class TwoTowerRanking(RequestOnlyModel):
    """A vector per task and request, one per candidate; the score is their dot product, scaled and shifted per
    task, or a small MLP over both and their product."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.dim, tasks = settings.user_dim, len(schema.labels)
        self.user_tower = UserTower(tasks * self.dim, schema, settings)
        self.item_tower = ItemTower(self.dim, schema, settings)
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.up = nn.Linear(3 * self.dim, self.dim) if settings.score == "mlp" else None
        self.down = nn.Linear(self.dim, 1) if settings.score == "mlp" else None
        self.position = PositionBias(schema, settings)

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, K * user_dim)."""
        return UserState({"user": self.user_tower(inputs)})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        item = self.item_tower(inputs).unsqueeze(1)  # (B_NRO, 1, D)
        users = user.vectors["user"].view(len(item), -1, self.dim)  # (B_NRO, K, D)
        product = users * item  # (B_NRO, K, D)
        if self.up is None or self.down is None:
            scores = product.sum(2) / math.sqrt(self.dim)
        else:
            pair = torch.cat([users, item.expand_as(users), product], dim=2)
            scores = self.down(functional.silu(self.up(pair))).squeeze(2)
        return self.position(scores + self.bias, inputs)  # type: ignore[no-any-return]
