"""HSTU with targets: all candidates of a request stand in one sequence with its history.

The joint attention is split, with equal results: the history attends to itself, causally, once per request; a
candidate attends to the history and to itself, never to another candidate. Every candidate stands at position
``hist_len`` and at the request's time, and the normaliser is the configured maximum length, so that a candidate's
output does not depend on how many others there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models import attention_layout
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, Matches, RequestFeatures, event_keys, sequence_widths
from roo_ray.models.heads import CrossAndHeads
from roo_ray.models.history import HistoryPool, HistoryTokens, HSTUStack
from roo_ray.models.interaction import Tower
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.models.target_attention import target_layout
from roo_ray.schema import Schema


class HSTUTargetsRanking(RequestOnlyModel):
    """User side: HSTU over each history, whose keys and values per layer are kept (``memory``), and the user
    vector. Impression side: the candidate as a token through the same layers; its state, user vector, candidate
    and matches -> cross layers -> heads."""

    def __init__(self, schema: Schema, settings: Model) -> None:
        super().__init__()
        widths = {name: sum(columns.values()) for name, columns in sequence_widths(schema).items()}
        self.names = [f.name for f in schema.sequences]
        self.features = RequestFeatures(schema)
        self.candidate = CandidateFeatures(schema, settings)
        self.matches = Matches(schema, settings.user_dim)
        self.tokens = nn.ModuleDict({f.name: HistoryTokens(f, widths[f.name], settings.dim) for f in schema.sequences})
        self.stacks = nn.ModuleDict({f.name: HSTUStack(f, settings) for f in schema.sequences})
        self.norms = nn.ModuleDict({name: nn.LayerNorm(settings.dim) for name in self.names})
        self.pools = nn.ModuleDict({name: HistoryPool(settings.dim) for name in self.names})
        self.target_tokens = nn.ModuleDict(
            {name: nn.Linear(self.candidate.width + settings.user_dim, settings.dim) for name in self.names}
        )
        user_width = self.features.width + len(self.names) * HistoryPool.WIDTHS * settings.dim
        self.user_tower = Tower(user_width, [2 * settings.user_dim, settings.user_dim], settings.normalisation)
        self.dropout = KeyedDropout(settings.dropout, "user")
        top_width = settings.user_dim + self.candidate.width + self.matches.width + len(self.names) * settings.dim
        self.top = CrossAndHeads(top_width, schema, settings)

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim), what the matches need, and per sequence and layer ``name.layer`` (T, 2 dim)."""
        known, interests = self.features(inputs)  # (B_RO, width)
        parts, memories = [known], {}
        for name in self.names:
            sequence, keys = inputs.sequences[name], event_keys(inputs, name)
            layout = attention_layout.layout(sequence.lengths, sequence.ages)
            tokens = self.tokens[name](sequence)  # (T, dim)
            for place, layer in enumerate(self.stacks[name].layers):  # type: ignore[arg-type]
                tokens, memories[f"{name}.{place}"] = layer.with_memory(tokens, layout, keys)
            parts.append(self.pools[name](self.norms[name](tokens), sequence.lengths))
        user = self.user_tower(torch.cat(parts, dim=1), inputs.request_weight)
        user = self.dropout(user, inputs.request_key)
        return UserState({"user": user, **self.matches.user_vectors(user, interests)}, memories)

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        candidate = self.candidate(inputs)  # (B_NRO, width)
        parts = [user.vectors["user"], candidate, self.matches(user.vectors, inputs)]
        for name in self.names:
            sequence = inputs.sequences[name]
            layout = target_layout(sequence.lengths, inputs.num_impressions)
            targets = self.target_tokens[name](torch.cat([candidate, user.vectors["user"]], dim=1))  # (B_NRO, dim)
            for place, layer in enumerate(self.stacks[name].layers):  # type: ignore[arg-type]
                memory = user.tokens[f"{name}.{place}"]
                targets = layer.targets(targets, memory, sequence, layout, inputs.impression_key)
            parts.append(self.norms[name](targets))
        return self.top(torch.cat(parts, dim=1), inputs)  # type: ignore[no-any-return]
