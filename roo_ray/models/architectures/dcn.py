"""Late-stage ranking by feature interaction (DCNv2, DLRM): a pooled history, no sequence model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, Matches, RequestFeatures, sequence_widths
from roo_ray.models.heads import CrossAndHeads
from roo_ray.models.history import AttentionPool, HistoryTokens
from roo_ray.models.interaction import Tower
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.schema import Schema


class DCNRanking(RequestOnlyModel):
    """User side: dense features, ids, bags of the histories and, with ``history_pooling: attention``, a pooling of
    their events by softmax attention with a query of the user -> user vector. Impression side: user vector,
    candidate, matches -> cross layers -> heads."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.features = RequestFeatures(schema)
        self.tokens, self.pools = nn.ModuleDict(), nn.ModuleDict()
        if settings.history_pooling == "attention":
            for feature in schema.sequences:
                width = sum(sequence_widths(schema)[feature.name].values())
                self.tokens[feature.name] = HistoryTokens(feature, width, settings.dim)
                self.pools[feature.name] = AttentionPool(settings.dim, self.features.width)
        user_width = self.features.width + len(self.pools) * settings.dim
        self.user_tower = Tower(user_width, [2 * settings.user_dim, settings.user_dim], settings.normalisation)
        self.dropout = KeyedDropout(settings.dropout, "user")
        self.candidate = CandidateFeatures(schema, settings)
        self.matches = Matches(schema, settings.user_dim)
        self.top = CrossAndHeads(settings.user_dim + self.candidate.width + self.matches.width, schema, settings)

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim) and what the matches need."""
        known, interests = self.features(inputs)  # (B_RO, width)
        parts = [known]
        for name, pool in self.pools.items():
            sequence = inputs.sequences[name]
            parts.append(pool(self.tokens[name](sequence), known, sequence.lengths))  # (B_RO, dim)
        user = self.user_tower(torch.cat(parts, dim=1), inputs.request_weight)
        user = self.dropout(user, inputs.request_key)
        return UserState({"user": user, **self.matches.user_vectors(user, interests)})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        parts = [user.vectors["user"], self.candidate(inputs), self.matches(user.vectors, inputs)]
        return self.top(torch.cat(parts, dim=1), inputs)  # type: ignore[no-any-return]
