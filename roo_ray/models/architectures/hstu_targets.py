"""HSTU with targets: all candidates of a request stand in one sequence with its history.

The joint attention is split, with equal results: the history attends to itself, causally, once per request; a
candidate attends to the history and to itself, never to another candidate. Every candidate stands at position
``hist_len`` and at the request's time, and the normaliser is the configured maximum length, so that a candidate's
output does not depend on how many others there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roo_ray.models import attention
from roo_ray.models.architectures.late_stage import TargetStage
from roo_ray.models.contract import ModelInputs, UserState
from roo_ray.models.features import event_keys
from roo_ray.models.target_attention import target_layout


class HSTUTargetsRanking(TargetStage):
    """User side: HSTU over each history, whose keys and values per layer are kept (``memory``), and the user
    vector. Impression side: the candidate as a token through the same layers; its state, user vector, candidate
    and matches -> cross layers -> heads."""

    def user_side(self, inputs: ModelInputs) -> UserState:
        """``user`` (B_RO, user_dim), what the matches need, and per sequence and layer ``name.layer`` (T, 2 dim)."""
        known, interests = self.features(inputs)  # (B_RO, width)
        pooled, memories = [], {}
        for name in self.names:
            sequence, keys = inputs.sequences[name], event_keys(inputs, name)
            layout = attention.layout(sequence.lengths, sequence.ages)
            tokens = self.tokens[name](sequence)  # (T, dim)
            for place, layer in enumerate(self.stacks[name].layers):  # type: ignore[arg-type]
                tokens, memories[f"{name}.{place}"] = layer.with_memory(tokens, layout, keys)
            pooled.append(self.pools[name](self.norms[name](tokens), sequence.lengths))
        return UserState(self.user_vectors(known, interests, pooled, inputs), memories)

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        candidate = self.candidate(inputs)  # (B_NRO, width)
        met = []
        for name in self.names:
            sequence = inputs.sequences[name]
            layout = target_layout(sequence.lengths, inputs.num_impressions)
            targets = self.target_tokens[name](torch.cat([candidate, user.vectors["user"]], dim=1))  # (B_NRO, dim)
            for place, layer in enumerate(self.stacks[name].layers):  # type: ignore[arg-type]
                memory = user.tokens[f"{name}.{place}"]
                targets = layer.targets(targets, memory, sequence, layout, inputs.impression_key)
            met.append(self.norms[name](targets))
        return self.logits(user, candidate, met, inputs)
