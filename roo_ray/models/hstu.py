"""A layer of HSTU as published (arXiv 2402.17152, section 3), over a history and over candidates beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from roo_ray.models import attention, attention_layout
from roo_ray.models.contract import SequenceInputs
from roo_ray.models.keyed_random import KeyedDropout
from roo_ray.models.target_attention import TargetLayout, silu_target_attention


class HSTULayer(nn.Module):
    """U, V, Q, K = SiLU(linear(norm(x))); pointwise attention with relative bias; x + linear(norm(attention) * U).

    ``max_length``: normaliser of the attention and reach of the position bias; ``timed``: bias by time gaps.
    """

    def __init__(
        self, dim: int, heads: int, max_length: int, timed: bool, dropout: float = 0.0, name: str = ""
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.max_length = dim, heads, max_length
        self.norm_in = nn.LayerNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, 4 * dim)
        self.position = nn.Parameter(torch.randn(max_length) * 0.02)
        self.time = nn.Parameter(torch.randn(attention_layout.TIME_BUCKETS) * 0.02) if timed else None
        self.norm_out = nn.LayerNorm(dim, eps=1e-6)
        self.output = nn.Linear(dim, dim)
        self.dropout = KeyedDropout(dropout, f"hstu.{name}")

    def forward(self, tokens: Tensor, layout: attention_layout.Layout, keys: Tensor) -> Tensor:
        """Causal self-attention of the history: tokens (T, D), keys (T,) of the events -> (T, D)."""
        gate, qkv = self._project(tokens)
        return self._update(tokens, gate, self._mix(qkv, layout), keys)

    def with_memory(self, tokens: Tensor, layout: attention_layout.Layout, keys: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, and the history's keys and values of this layer (T, 2 D) for ``targets``."""
        gate, qkv = self._project(tokens)
        return self._update(tokens, gate, self._mix(qkv, layout), keys), qkv[:, self.dim :]

    def targets(
        self, targets: Tensor, memory: Tensor, sequence: SequenceInputs, layout: TargetLayout, keys: Tensor
    ) -> Tensor:
        """Candidates that stand after their request's history, at position ``hist_len`` and the request's time;
        each attends to the history (``memory``, (T, 2 D)) and itself: targets (N, D) -> (N, D)."""
        gate, qkv = self._project(targets)
        query, key, value = qkv.split(self.dim, dim=1)
        seen = silu_target_attention(query, memory, self._bias(sequence), layout, self.heads)  # (N, D)
        own = (query * key).view(-1, self.heads, self.dim // self.heads).sum(2) + self._bias_of_self()  # (N, H)
        own = functional.silu(own).repeat_interleave(self.dim // self.heads, dim=1) * value  # (N, D)
        return self._update(targets, gate, (seen + own) / self.max_length, keys)

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        projected = functional.silu(self.project(self.norm_in(tokens)))
        gate, qkv = projected.split([self.dim, 3 * self.dim], dim=1)
        return gate, qkv

    def _mix(self, qkv: Tensor, layout: attention_layout.Layout) -> Tensor:
        return attention.attention(qkv, layout, self.heads, self.max_length, self.position, self.time)

    def _update(self, tokens: Tensor, gate: Tensor, mixed: Tensor, keys: Tensor) -> Tensor:
        update = self.dropout(self.norm_out(mixed) * gate, keys)
        return tokens + self.output(update)  # type: ignore[no-any-return]

    def _bias(self, sequence: SequenceInputs) -> Tensor:
        """(T,) bias of each event as seen from its request's candidates."""
        bias = self.position[attention_layout.ranks_from_end(sequence.lengths).clamp_(max=self.max_length - 1)]
        if self.time is not None and sequence.ages is not None:
            bias = bias + self.time[attention_layout.time_buckets(sequence.ages).long()]
        return bias

    def _bias_of_self(self) -> Tensor:
        return self.position[0] if self.time is None else self.position[0] + self.time[0]
