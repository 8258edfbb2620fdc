"""The user's history: event tokens, HSTU layers over them, and one vector per request pooled from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from roo_ray.config import Model
from roo_ray.ingest.batch import segment_positions
from roo_ray.models import attention
from roo_ray.models.contract import SequenceInputs
from roo_ray.models.jagged import segment_last, segment_sum
from roo_ray.schema import Feature


class HSTULayer(nn.Module):
    """A layer of HSTU as published (arXiv 2402.17152, section 3): U, V, Q, K = SiLU(linear(norm(x))); pointwise
    attention with relative bias; x + linear(norm(attention) * U).

    ``max_length``: normaliser of the attention and reach of the position bias; ``timed``: bias by time gaps.
    """

    def __init__(self, dim: int, heads: int, max_length: int, timed: bool) -> None:
        super().__init__()
        self.dim, self.heads, self.max_length = dim, heads, max_length
        self.norm_in = nn.LayerNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, 4 * dim)
        self.position = nn.Parameter(torch.randn(max_length) * 0.02)
        self.time = nn.Parameter(torch.randn(attention.TIME_BUCKETS) * 0.02) if timed else None
        self.norm_out = nn.LayerNorm(dim, eps=1e-6)
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, layout: attention.Layout) -> Tensor:
        """Tokens (T, D) -> (T, D)."""
        projected = functional.silu(self.project(self.norm_in(tokens)))
        gate, qkv = projected.split([self.dim, 3 * self.dim], dim=1)
        mixed = attention.attention(qkv, layout, self.heads, self.max_length, self.position, self.time)
        update: Tensor = self.output(self.norm_out(mixed) * gate)
        return tokens + update


class HistoryEncoder(nn.Module):
    """An event sequence to one vector per request.

    A token is a linear map of the event's id embeddings and dense values, plus an embedding of its recency: of
    the logarithm of its age, or of its rank from the end where the sequence has no time. ``id_width``: sum of
    the dims of the sequence's id columns.
    """

    WIDTHS = 3  # pooled vectors of width ``dim`` per request

    def __init__(self, feature: Feature, id_width: int, settings: Model) -> None:
        super().__init__()
        assert feature.max_length is not None  # the schema requires it of sequences
        self.max_length, timed = feature.max_length, feature.time is not None
        self.token = nn.Linear(id_width + len(feature.sequence_dense), settings.dim)
        self.recency = nn.Embedding(attention.TIME_BUCKETS if timed else self.max_length, settings.dim)
        nn.init.normal_(self.recency.weight, std=0.02)
        self.layers = nn.ModuleList(
            HSTULayer(settings.dim, settings.heads, self.max_length, timed) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.dim)
        self.gate = nn.Linear(settings.dim, 1)

    def forward(self, ids: Tensor, sequence: SequenceInputs) -> Tensor:
        """ids (T, id_width) the events' id embeddings -> (B_RO, WIDTHS * dim)."""
        tokens = self.token(torch.cat([ids, sequence.dense], dim=1)) + self.recency(self._recency(sequence))
        if self.layers:
            layout = attention.layout(sequence.lengths, sequence.ages)
            for layer in self.layers:
                tokens = layer(tokens, layout)
        return self.pool(self.norm(tokens), sequence.lengths)

    def _recency(self, sequence: SequenceInputs) -> Tensor:
        """(T,) int: the event's bucket of age, or its rank from the end."""
        if sequence.ages is not None:
            return attention.time_buckets(sequence.ages)
        last = torch.repeat_interleave(sequence.lengths - 1, sequence.lengths)
        return (last - segment_positions(sequence.lengths)).clamp_(max=self.max_length - 1)

    def pool(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Mean, learned weighted mean and last token: (T, D) -> (B_RO, 3 D); 0 for an empty history."""
        weights = torch.sigmoid(self.gate(tokens))  # (T, 1)
        sums = segment_sum(torch.cat([tokens, tokens * weights, weights], dim=1), lengths)  # (B_RO, 2 D + 1)
        plain, weighted, total = sums.split([tokens.shape[1], tokens.shape[1], 1], dim=1)
        mean = plain / lengths.clamp(min=1).unsqueeze(1)
        return torch.cat([mean, weighted / total.clamp(min=1e-6), segment_last(tokens, lengths)], dim=1)
