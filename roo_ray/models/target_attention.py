"""Attention of candidates to the history of their request, on jagged batches: a history's keys and values are
read once per request, however many candidates it has.

Requests are sorted by history length into buckets; a row of a bucket is one request with up to TARGETS_PER_ROW of
its candidates, so that neither long histories nor large requests pad the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from roo_ray.models.attention_layout import even_cuts
from roo_ray.models.precision import at_least_float32

TARGETS_PER_ROW = 16


@dataclass(frozen=True)
class TargetBucket:
    """R rows of N candidate slots and L event slots.

    ``events`` (T_b,), ``event_slots`` (T_b,) int64: the events (of all rows; a request in two rows comes twice)
    and their places in R * L; ``targets`` (N_b,), ``target_slots`` (N_b,): likewise in R * N.
    ``known`` (R, L) bool: slots that hold an event.
    """

    rows: int
    length: int
    count: int
    events: Tensor
    event_slots: Tensor
    targets: Tensor
    target_slots: Tensor
    known: Tensor

    def pad_events(self, values: Tensor) -> Tensor:
        """(T, C) -> (R * L, C), 0 where there is no event."""
        padded = values.new_zeros(self.rows * self.length, values.shape[1])
        return padded.index_copy_(0, self.event_slots, values.index_select(0, self.events))

    def pad_targets(self, values: Tensor) -> Tensor:
        """(N, C) -> (R * N, C), 0 where there is no candidate."""
        padded = values.new_zeros(self.rows * self.count, values.shape[1])
        return padded.index_copy_(0, self.target_slots, values.index_select(0, self.targets))


@dataclass(frozen=True)
class TargetLayout:
    """The buckets of a batch; made once per batch, used by every layer. Candidates of requests without history
    are in none."""

    buckets: tuple[TargetBucket, ...]


def target_layout(lengths: Tensor, num_impressions: Tensor, max_buckets: int | None = None) -> TargetLayout:
    """lengths (B,) events, num_impressions (B,) candidates of each request. Default for ``max_buckets``: 8 on CPU,
    one on a GPU, where padding is cheaper than launches."""
    if max_buckets is None:
        max_buckets = 8 if lengths.device.type == "cpu" else 1
    device = lengths.device
    rows_of = (num_impressions + TARGETS_PER_ROW - 1) // TARGETS_PER_ROW  # (B,)
    request = torch.repeat_interleave(torch.arange(len(lengths), device=device), rows_of)  # (rows,)
    part = torch.arange(len(request), device=device) - (rows_of.cumsum(0) - rows_of)[request]
    counts = (num_impressions[request] - part * TARGETS_PER_ROW).clamp(max=TARGETS_PER_ROW)  # (rows,)
    first_target = (num_impressions.cumsum(0) - num_impressions)[request] + part * TARGETS_PER_ROW
    first_event = (lengths.cumsum(0) - lengths)[request]
    events = lengths[request]
    order = torch.argsort(events, descending=True, stable=True)
    order = order[: int((events > 0).sum())]
    buckets = []
    for start, stop in even_cuts(events[order] * counts[order], max_buckets) if len(order) else []:
        rows = order[start:stop]
        event_at, event_slots = _places(first_event[rows], events[rows])
        target_at, target_slots = _places(first_target[rows], counts[rows])
        length, count = int(events[rows[0]]), int(counts[rows].max())
        known = torch.arange(length, device=device) < events[rows].unsqueeze(1)
        buckets.append(TargetBucket(stop - start, length, count, event_at, event_slots, target_at, target_slots, known))
    return TargetLayout(tuple(buckets))


def _places(first: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows that hold ``counts`` values from ``first`` on: the values' indices, and their slots in rows padded
    to the largest count."""
    column = torch.arange(int(counts.max()), device=counts.device)
    slots = (column < counts.unsqueeze(1)).flatten().nonzero().squeeze(1)
    return (first.unsqueeze(1) + column).flatten().index_select(0, slots), slots


def silu_target_attention(query: Tensor, memory: Tensor, bias: Tensor, layout: TargetLayout, heads: int) -> Tensor:
    """HSTU's pointwise attention: ``out_i = sum_j SiLU(q_i . k_j + bias_j) v_j`` over the request's events.
    Products are of ``products_in``'s type, scores float32.

    query   (N, H * d) of the candidates. memory (T, 2 * H * d): keys, then values, of the events.
    bias    (T,) of the events. Result (N, H * d) float32; 0 for a request without history.
    """
    return _attend(query, memory, bias, layout, heads, softmax=False)


def softmax_target_attention(query: Tensor, memory: Tensor, layout: TargetLayout, heads: int) -> Tensor:
    """Scaled dot-product attention: ``out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j``; as above without bias."""
    return _attend(query, memory, None, layout, heads, softmax=True)


def products_in(device: torch.device, given: torch.dtype) -> torch.dtype:
    """The type that products are computed in, of inputs of type ``given``: theirs on a GPU, where bfloat16 gets tensor
    cores; at least float32 on CPU, which gains nothing below it."""
    return torch.promote_types(given, torch.float32) if device.type == "cpu" else given


def _attend(
    query: Tensor, memory: Tensor, bias: Tensor | None, layout: TargetLayout, heads: int, softmax: bool
) -> Tensor:
    width = query.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        kind = products_in(query.device, torch.promote_types(query.dtype, memory.dtype))
        query, memory = query.to(kind), memory.to(kind)
        if not layout.buckets:  # no history, yet every parameter must take part
            return 0.0 * at_least_float32(query + memory.sum() + (0.0 if bias is None else bias.sum()))
        out = at_least_float32(query.new_zeros(query.shape))
        for bucket in layout.buckets:
            rows, length, count = bucket.rows, bucket.length, bucket.count
            q = bucket.pad_targets(query).view(rows, count, heads, -1).transpose(1, 2)  # (R, H, N, d)
            padded = bucket.pad_events(memory).view(rows, length, 2, heads, -1)
            k, v = padded.permute(2, 0, 3, 1, 4)  # (R, H, L, d) each
            scores = at_least_float32(q @ k.transpose(2, 3))  # (R, H, N, L)
            if bias is not None:
                scores = scores + bucket.pad_events(bias.unsqueeze(1)).view(rows, 1, 1, length)
            if softmax:
                scores = (scores / math.sqrt(q.shape[3])).masked_fill(~bucket.known.view(rows, 1, 1, length), -1e30)
                weights = torch.softmax(scores, dim=3)
            else:
                weights = functional.silu(scores)  # an empty slot has a value of 0
            mixed = (weights.to(kind) @ v).transpose(1, 2).reshape(rows * count, width)
            out = out.index_add(0, bucket.targets, at_least_float32(mixed.index_select(0, bucket.target_slots)))
        return out
