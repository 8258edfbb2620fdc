"""Late-stage ranking with HSTU over the history: sequence model once per request, interaction per impression."""

from __future__ import annotations

from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models.architectures.late_stage import LateStage
from roo_ray.models.contract import ModelInputs, UserState
from roo_ray.models.features import event_keys, sequence_widths
from roo_ray.models.history import HistoryEncoder
from roo_ray.schema import Schema


class HSTURanking(LateStage):
    """User side: each history's HSTU encoding, dense features, ids and bags -> user vector. Impression side: user
    vector, candidate, matches -> cross layers -> heads."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__(schema, settings, len(schema.sequences) * HistoryEncoder.WIDTHS * settings.dim)
        widths = {name: sum(columns.values()) for name, columns in sequence_widths(schema).items()}
        self.encoders = nn.ModuleDict({f.name: HistoryEncoder(f, widths[f.name], settings) for f in schema.sequences})

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim) and what the matches need."""
        known, interests = self.features(inputs)  # (B_RO, width)
        encoded = [encoder(inputs.sequences[name], event_keys(inputs, name)) for name, encoder in self.encoders.items()]
        return UserState(self.user_vectors(known, interests, encoded, inputs))

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        return self.logits(user, self.candidate(inputs), (), inputs)
