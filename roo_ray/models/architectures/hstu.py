"""Late-stage ranking with HSTU over the history: sequence model once per request, interaction per impression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, Matches, RequestFeatures, event_keys, sequence_widths
from roo_ray.models.heads import CrossAndHeads
from roo_ray.models.history import HistoryEncoder
from roo_ray.models.interaction import Tower
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.schema import Schema


class HSTURanking(RequestOnlyModel):
    """User side: each history's HSTU encoding, dense features, ids and bags -> user vector. Impression side: user
    vector, candidate, matches -> cross layers -> heads."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        widths = {name: sum(columns.values()) for name, columns in sequence_widths(schema).items()}
        self.features = RequestFeatures(schema)
        self.encoders = nn.ModuleDict({f.name: HistoryEncoder(f, widths[f.name], settings) for f in schema.sequences})
        user_width = self.features.width + len(self.encoders) * HistoryEncoder.WIDTHS * settings.dim
        self.user_tower = Tower(user_width, [2 * settings.user_dim, settings.user_dim], settings.normalisation)
        self.dropout = KeyedDropout(settings.dropout, "user")
        self.candidate = CandidateFeatures(schema, settings)
        self.matches = Matches(schema, settings.user_dim)
        self.top = CrossAndHeads(settings.user_dim + self.candidate.width + self.matches.width, schema, settings)

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim) and what the matches need."""
        known, interests = self.features(inputs)  # (B_RO, width)
        encoded = [encoder(inputs.sequences[name], event_keys(inputs, name)) for name, encoder in self.encoders.items()]
        user = self.user_tower(torch.cat([known, *encoded], dim=1), inputs.request_weight)
        user = self.dropout(user, inputs.request_key)
        return UserState({"user": user, **self.matches.user_vectors(user, interests)})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        parts = [user.vectors["user"], self.candidate(inputs), self.matches(user.vectors, inputs)]
        return self.top(torch.cat(parts, dim=1), inputs)  # type: ignore[no-any-return]
