"""What the late-stage architectures have in common, around their ways of reading a history."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, Matches, RequestFeatures, sequence_widths
from roo_ray.models.heads import CrossAndHeads
from roo_ray.models.history import HistoryPool, HistoryTokens, HSTUStack
from roo_ray.models.interaction import Tower
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.schema import Schema


class LateStage(RequestOnlyModel):
    """User side: request features and what an architecture makes of the histories -> user vector. Impression side:
    user vector, candidate, matches, and what an architecture makes of candidate and history -> cross layers -> heads.

    ``history_width``: floats per request of the histories. ``target_width``: floats per candidate beside the rest.
    """

    def __init__(self, schema: Schema, settings: Model, history_width: int, target_width: int = 0) -> None:
        super().__init__()
        self.features = RequestFeatures(schema)
        self.candidate = CandidateFeatures(schema, settings)
        self.matches = Matches(schema, settings.user_dim)
        user_widths = [2 * settings.user_dim, settings.user_dim]
        self.user_tower = Tower(self.features.width + history_width, user_widths, settings.normalisation)
        self.dropout = KeyedDropout(settings.dropout, "user")
        top_width = settings.user_dim + self.candidate.width + self.matches.width + target_width
        self.top = CrossAndHeads(top_width, schema, settings)

    def user_vectors(
        self, known: Tensor, interests: dict[str, Tensor], histories: Iterable[Tensor], inputs: ModelInputs
    ) -> dict[str, Tensor]:
        """``user`` (B_RO, user_dim), and what the matches need; ``known``, ``interests``: of ``features``."""
        user = self.user_tower(torch.cat([known, *histories], dim=1), inputs.request_weight)
        user = self.dropout(user, inputs.request_key)
        return {"user": user, **self.matches.user_vectors(user, interests)}

    def logits(self, user: UserState, candidate: Tensor, targets: Iterable[Tensor], inputs: ModelInputs) -> Tensor:
        """The fanned-out user state, candidate (B_NRO, width) and targets (B_NRO, ...) -> (B_NRO, K)."""
        parts = [user.vectors["user"], candidate, self.matches(user.vectors, inputs), *targets]
        return self.top(torch.cat(parts, dim=1), inputs)  # type: ignore[no-any-return]


class TargetStage(LateStage):
    """A late stage whose candidates meet the events of each history: event tokens, HSTU layers and pools of each,
    and a candidate's token for each."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        widths = {name: sum(columns.values()) for name, columns in sequence_widths(schema).items()}
        names = [f.name for f in schema.sequences]
        super().__init__(schema, settings, len(names) * HistoryPool.WIDTHS * settings.dim, len(names) * settings.dim)
        self.names = names
        self.tokens = nn.ModuleDict({f.name: HistoryTokens(f, widths[f.name], settings.dim) for f in schema.sequences})
        self.stacks = nn.ModuleDict({f.name: HSTUStack(f, settings) for f in schema.sequences})
        self.norms = nn.ModuleDict({name: nn.LayerNorm(settings.dim) for name in names})
        self.pools = nn.ModuleDict({name: HistoryPool(settings.dim) for name in names})
        width = self.candidate.width + settings.user_dim
        self.target_tokens = nn.ModuleDict({name: nn.Linear(width, settings.dim) for name in names})
