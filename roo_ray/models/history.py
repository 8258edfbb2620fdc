"""The user's history: event tokens, and vectors pooled from them, one per request."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from roo_ray.config import Model
from roo_ray.models import attention_layout
from roo_ray.models.contract import SequenceInputs
from roo_ray.models.hstu import HSTULayer
from roo_ray.models.jagged import segment_last, segment_softmax, segment_sum
from roo_ray.schema import Feature


class HistoryTokens(nn.Module):
    """Events to tokens: a linear map of an event's id embeddings and dense values, plus an embedding of its
    recency: of the logarithm of its age, or of its rank from the end where the sequence has no time.

    ``id_width``: sum of the dims of the sequence's id columns.
    """

    def __init__(self, feature: Feature, id_width: int, dim: int) -> None:
        super().__init__()
        assert feature.max_length is not None  # the schema requires it of sequences
        self.max_length, self.timed = feature.max_length, feature.time is not None
        self.token = nn.Linear(id_width + len(feature.sequence_dense), dim)
        self.recency = nn.Embedding(attention_layout.TIME_BUCKETS if self.timed else self.max_length, dim)
        nn.init.normal_(self.recency.weight, std=0.02)

    def forward(self, sequence: SequenceInputs) -> Tensor:
        """(T, dim)."""
        values = torch.cat([*sequence.ids.values(), sequence.dense], dim=1)  # (T, id_width + C)
        tokens: Tensor = self.token(values) + self.recency(self._recency(sequence))
        return tokens

    def _recency(self, sequence: SequenceInputs) -> Tensor:
        """(T,) int: the event's bucket of age, or its rank from the end."""
        if sequence.ages is not None:
            return attention_layout.time_buckets(sequence.ages)
        return (attention_layout.ranks_from_end(sequence.lengths) - 1).clamp_(max=self.max_length - 1)


class HistoryPool(nn.Module):
    """Mean, learned weighted mean and last token: (T, D) -> (B_RO, 3 D); 0 for an empty history."""

    WIDTHS = 3

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 1)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (T, D), lengths (B_RO,) -> (B_RO, 3 D)."""
        weights = torch.sigmoid(self.gate(tokens))  # (T, 1)
        sums = segment_sum(torch.cat([tokens, tokens * weights, weights], dim=1), lengths)  # (B_RO, 2 D + 1)
        plain, weighted, total = sums.split([tokens.shape[1], tokens.shape[1], 1], dim=1)
        mean = plain / lengths.clamp(min=1).unsqueeze(1)
        return torch.cat([mean, weighted / total.clamp(min=1e-6), segment_last(tokens, lengths)], dim=1)


class AttentionPool(nn.Module):
    """One vector per request by softmax attention over its events, queried by what is known of the user."""

    def __init__(self, dim: int, query_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_width, dim)
        self.scale = 1.0 / math.sqrt(dim)

    def forward(self, tokens: Tensor, user: Tensor, lengths: Tensor) -> Tensor:
        """tokens (T, D), user (B_RO, query_width), lengths (B_RO,) -> (B_RO, D); 0 for an empty history."""
        query = torch.repeat_interleave(self.query(user), lengths, dim=0, output_size=tokens.shape[0])  # (T, D)
        weights = segment_softmax((query * tokens).sum(1) * self.scale, lengths)  # (T,)
        return segment_sum(tokens * weights.unsqueeze(1), lengths)


class HSTUStack(nn.Module):
    """HSTU layers over event tokens. ``name``: of the sequence, keys its dropout."""

    def __init__(self, feature: Feature, settings: Model) -> None:
        super().__init__()
        assert feature.max_length is not None
        self.layers = nn.ModuleList(
            HSTULayer(
                settings.dim,
                settings.heads,
                feature.max_length,
                timed=feature.time is not None,
                dropout=settings.dropout,
                name=f"{feature.name}.{place}",
            )
            for place in range(settings.layers)
        )

    def forward(self, tokens: Tensor, sequence: SequenceInputs, keys: Tensor) -> Tensor:
        """tokens (T, D); keys (T,): of the events, for dropout -> (T, D)."""
        if self.layers:
            layout = attention_layout.layout(sequence.lengths, sequence.ages)
            for layer in self.layers:
                tokens = layer(tokens, layout, keys)
        return tokens


class HistoryEncoder(nn.Module):
    """Event tokens, HSTU over them, pooled: an event sequence to WIDTHS * dim values per request."""

    WIDTHS = HistoryPool.WIDTHS

    def __init__(self, feature: Feature, id_width: int, settings: Model) -> None:
        super().__init__()
        self.tokens = HistoryTokens(feature, id_width, settings.dim)
        self.stack = HSTUStack(feature, settings)
        self.norm = nn.LayerNorm(settings.dim)
        self.pool = HistoryPool(settings.dim)

    def forward(self, sequence: SequenceInputs, keys: Tensor) -> Tensor:
        """keys (T,): of the events -> (B_RO, WIDTHS * dim)."""
        tokens = self.stack(self.tokens(sequence), sequence, keys)
        return self.pool(self.norm(tokens), sequence.lengths)  # type: ignore[no-any-return]
