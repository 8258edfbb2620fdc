"""Candidates attend to an encoded history (STCA, arXiv 2511.06077; Pinterest's DCAT): the history's keys and values
are made once per request, and each candidate queries them. With ``layers: 0`` the history is not self-attended,
and cost is linear in its length."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from roo_ray.config import Model
from roo_ray.models.contract import ModelInputs, RequestOnlyModel, UserState
from roo_ray.models.features import CandidateFeatures, Matches, RequestFeatures, event_keys, sequence_widths
from roo_ray.models.heads import CrossAndHeads
from roo_ray.models.history import HistoryPool, HistoryTokens, HSTUStack
from roo_ray.models.interaction import Tower
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.models.target_attention import TargetLayout, softmax_target_attention, target_layout
from roo_ray.schema import Schema


class CrossAttentionLayer(nn.Module):
    """x + attention(norm(x), memory), then x + MLP(norm(x)); per candidate."""

    def __init__(self, dim: int, heads: int, dropout: float, name: str) -> None:
        super().__init__()
        self.heads = heads
        self.memory = nn.Linear(dim, 2 * dim)  # runs on the user side
        self.norm_query, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dropout = KeyedDropout(dropout, f"cross_attention.{name}")

    def forward(self, targets: Tensor, memory: Tensor, layout: TargetLayout, keys: Tensor) -> Tensor:
        """targets (N, D), memory (T, 2 D) of their requests' events -> (N, D)."""
        query = self.query(self.norm_query(targets))
        targets = targets + self.output(softmax_target_attention(query, memory, layout, self.heads))
        hidden = self.dropout(functional.silu(self.up(self.norm_mlp(targets))), keys)
        return targets + self.down(hidden)  # type: ignore[no-any-return]


class CrossAttentionRanking(RequestOnlyModel):
    """User side: event tokens, HSTU over them (``layers``), keys and values for each cross-attention layer, user
    vector. Impression side: the candidate through the cross-attention layers; its state, user vector, candidate
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
        self.layers = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    CrossAttentionLayer(settings.dim, settings.heads, settings.dropout, f"{name}.{place}")
                    for place in range(settings.attention_layers)
                )
                for name in self.names
            }
        )
        self.target_norms = nn.ModuleDict({name: nn.LayerNorm(settings.dim) for name in self.names})
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
            sequence = inputs.sequences[name]
            tokens = self.stacks[name](self.tokens[name](sequence), sequence, event_keys(inputs, name))
            tokens = self.norms[name](tokens)  # (T, dim)
            for place, layer in enumerate(self.layers[name]):  # type: ignore[var-annotated, arg-type]
                memories[f"{name}.{place}"] = layer.memory(tokens)
            parts.append(self.pools[name](tokens, sequence.lengths))
        user = self.user_tower(torch.cat(parts, dim=1), inputs.request_weight)
        user = self.dropout(user, inputs.request_key)
        return UserState({"user": user, **self.matches.user_vectors(user, interests)}, memories)

    def impression_side(self, user: UserState, inputs: ModelInputs) -> Tensor:
        """Logits (B_NRO, K)."""
        candidate = self.candidate(inputs)  # (B_NRO, width)
        parts = [user.vectors["user"], candidate, self.matches(user.vectors, inputs)]
        for name in self.names:
            layout = target_layout(inputs.sequences[name].lengths, inputs.num_impressions)
            targets = self.target_tokens[name](torch.cat([candidate, user.vectors["user"]], dim=1))  # (B_NRO, dim)
            for place, layer in enumerate(self.layers[name]):  # type: ignore[var-annotated, arg-type]
                targets = layer(targets, user.tokens[f"{name}.{place}"], layout, inputs.impression_key)
            parts.append(self.target_norms[name](targets))
        return self.top(torch.cat(parts, dim=1), inputs)  # type: ignore[no-any-return]
