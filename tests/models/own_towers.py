"""A team's own architecture, as docs/models.md shows it: a mean over the history, a small network per impression."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, RequestFeatures
from roo_ray.schema import Schema


class OwnTowers(RequestOnlyModel):
    """User side: the request's features to a vector. Impression side: that vector and the candidate to logits."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        self.request = RequestFeatures(schema)  # dense, ids, means of histories
        self.candidate = CandidateFeatures(schema, settings)  # dense, ids
        self.user = nn.Linear(self.request.width, settings.user_dim)
        self.hidden = nn.Linear(settings.user_dim + self.candidate.width, settings.dim)
        self.logits = nn.Linear(settings.dim, len(schema.labels))

    def user_side(self, inputs: ModelInputs) -> UserState:
        """Once per request: B_RO rows."""
        known, _ = self.request(inputs)  # (B_RO, width)
        return UserState({"user": torch.relu(self.user(known))})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Once per impression: ``user`` is fanned out, B_NRO rows."""
        both = torch.cat([user.vectors["user"], self.candidate(inputs)], dim=1)  # (B_NRO, width)
        return self.logits(torch.relu(self.hidden(both)))  # type: ignore[no-any-return]


class WithBatchNorm(OwnTowers):
    """The same with a norm that request order skews."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__(schema, settings)
        self.norm = nn.BatchNorm1d(settings.user_dim)


class WithTables(OwnTowers):
    """Tables of their own, under names that the sharded ones have, too."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__(schema, settings)
        self.embeddings = nn.ModuleDict({table: nn.Embedding(1, len(schema.labels)) for table in schema.tables})

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """With a term that is the same for all impressions."""
        bias = torch.stack([table.weight[0] for table in self.embeddings.values()]).sum(0)  # (K,)
        return super().impression_side(user, inputs) + bias


class LookingTowers(OwnTowers):
    """They look at a value while they are made, which tensors without memory do not have."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__(schema, settings)
        self.steps = torch.linspace(0, 1, 3).tolist()


class BrokenTowers(OwnTowers):
    """Their author's mistake."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__(schema, settings)
        self.wide = nn.Linear(settings.dim, settings.width)  # type: ignore[attr-defined]


class SlowTowers(OwnTowers):
    """A worker takes long to make them."""

    seconds = 48.0

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__(schema, settings)
        if dist.is_initialized():
            time.sleep(self.seconds)
