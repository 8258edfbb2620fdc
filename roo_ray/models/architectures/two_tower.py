"""Early-stage ranking: a user tower once per request, an item tower per impression, and a cheap score of the two."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, Matches, RequestFeatures, event_keys, sequence_widths
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

    def known(self, inputs: ModelInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """What the vector is made of, (B_RO, 2 user_dim), and the interests (``RequestFeatures``)."""
        known, interests = self.features(inputs)
        encoded = [encoder(inputs.sequences[name], event_keys(inputs, name)) for name, encoder in self.encoders.items()]
        hidden = self.tower(torch.cat([known, *encoded], dim=1), inputs.request_weight)
        return self.dropout(hidden, inputs.request_key), interests

    def forward(self, inputs: ModelInputs) -> Tensor:
        """(B_RO, width)."""
        return self.output(self.known(inputs)[0])  # type: ignore[no-any-return]


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
    """Per request and task a vector and a term of its own, per candidate likewise. The score is the sum of three
    dot products: of the towers' vectors, of the candidate's embeddings with a query that the user tower makes for
    them, and with the user's interests on the same tables. That is one dot product of longer vectors, so that
    items can be indexed. Without the last two, topics and items would have to pass two towers and their norms before
    they meet, which learns an interaction far slower than the late-stage models do. ``score: mlp`` puts a small
    MLP over the vectors and all products instead of the first dot product.
    """

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.dim, self.tasks = settings.user_dim, len(schema.labels)
        self.user_tower = UserTower(self.tasks * (self.dim + 1), schema, settings)
        self.item_tower = ItemTower(self.dim + self.tasks, schema, settings)
        self.matches = Matches(schema, 2 * settings.user_dim)
        self.matched = nn.Linear(self.matches.width, self.tasks)
        self.matches.start_as_dots(self.matched)
        self.up = nn.Linear(3 * self.dim + self.matches.width, self.dim) if settings.score == "mlp" else None
        self.down = nn.Linear(self.dim, 1) if settings.score == "mlp" else None
        self.position = PositionBias(schema, settings)

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, K * user_dim + K), and what the matches need."""
        known, interests = self.user_tower.known(inputs)
        vectors = {"user": self.user_tower.output(known)}
        return UserState(vectors | self.matches.user_vectors(known, interests))

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        item, item_term = self.item_tower(inputs).split([self.dim, self.tasks], dim=1)
        users, user_term = user.vectors["user"].split([self.tasks * self.dim, self.tasks], dim=1)
        item = item.unsqueeze(1)  # (B_NRO, 1, D)
        users = users.reshape(len(item), self.tasks, self.dim)  # (B_NRO, K, D)
        matches = self.matches(user.vectors, inputs)  # (B_NRO, width)
        product = users * item  # (B_NRO, K, D)
        if self.up is None or self.down is None:
            scores = product.sum(2) / math.sqrt(self.dim)
        else:
            every = matches.unsqueeze(1).expand(-1, self.tasks, -1)
            pair = torch.cat([users, item.expand_as(users), product, every], dim=2)
            scores = self.down(functional.silu(self.up(pair))).squeeze(2)
        scores = scores + user_term + item_term + self.matched(matches)
        return self.position(scores, inputs)  # type: ignore[no-any-return]
