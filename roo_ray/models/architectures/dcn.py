"""Late-stage ranking by feature interaction (DCNv2, DLRM): a pooled history, no sequence model."""

from __future__ import annotations

from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models.architectures.late_stage import LateStage
from roo_ray.models.contract import ModelInputs, UserState
from roo_ray.models.features import sequence_widths
from roo_ray.models.history import AttentionPool, HistoryTokens
from roo_ray.schema import Schema


class DCNRanking(LateStage):
    """User side: dense features, ids, bags of the histories and, with ``history_pooling: attention``, a pooling of
    their events by softmax attention with a query of the user -> user vector. Impression side: user vector,
    candidate, matches -> cross layers -> heads."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        pooled = schema.sequences if settings.history_pooling == "attention" else []
        super().__init__(schema, settings, len(pooled) * settings.dim)
        self.tokens, self.pools = nn.ModuleDict(), nn.ModuleDict()
        for feature in pooled:
            width = sum(sequence_widths(schema)[feature.name].values())
            self.tokens[feature.name] = HistoryTokens(feature, width, settings.dim)
            self.pools[feature.name] = AttentionPool(settings.dim, self.features.width)

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim) and what the matches need."""
        known, interests = self.features(inputs)  # (B_RO, width)
        pooled = []
        for name, pool in self.pools.items():
            sequence = inputs.sequences[name]
            pooled.append(pool(self.tokens[name](sequence), known, sequence.lengths))  # (B_RO, dim)
        return UserState(self.user_vectors(known, interests, pooled, inputs))

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        return self.logits(user, self.candidate(inputs), (), inputs)
