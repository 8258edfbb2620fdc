"""HSTU's pointwise attention over jagged sequences (arXiv 2402.17152, equation 2), causal, with relative bias:

    out_i = sum over j <= i of SiLU(q_i . k_j + position[i - j] + time[bucket(t_i - t_j)]) v_j / N

N is the configured maximum length, not the batch's longest, so that a sequence's output does not depend on the
batch around it. ``attention`` is the entry; ``padded_attention`` is the reference and runs everywhere;
``bucketed_attention`` is the same on CPU without padding every sequence to the longest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from roo_ray.ingest.batch import segment_positions

TIME_BUCKETS = 64  # half octaves: up to 2**32 seconds

SCORES_PER_BUCKET = 1 << 17
QUERIES_PER_BLOCK = 80  # on CPU: a block skips the keys after it, but a small one is not worth its launches
MASKED = -1e30  # below every product of query and key; SiLU and its slope are exactly 0 here


def time_buckets(seconds: Tensor) -> Tensor:
    """Logarithmic buckets, two per octave: float32 seconds (below 1 counts as 1) -> int32 in [0, TIME_BUCKETS).

    The exponent and the first bit of the mantissa of a float32 are its logarithm in half octaves.
    """
    half_octaves = (seconds.clamp(min=1.0).view(torch.int32) >> 22) - (127 << 1)
    return half_octaves.clamp_(max=TIME_BUCKETS - 1)


def ranks_from_end(lengths: Tensor) -> Tensor:
    """(T,) int64: how many places before the request each event stands, 1 for the newest."""
    return torch.repeat_interleave(lengths, lengths) - segment_positions(lengths)


@dataclass(frozen=True)
class Bucket:
    """Sequences padded to one length: R rows of L slots.

    ``tokens`` (T_b,) int64: the tokens of these sequences; ``slots`` (T_b,) int64: their places in the R * L
    slots; ``newest`` (R,) int64: each sequence's last token; ``ages`` (R, L) float32 as in ``layout``, 0 where there
    is no token; None without times.
    """

    rows: int
    length: int
    tokens: Tensor
    slots: Tensor
    newest: Tensor
    ages: Tensor | None
    _sources: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, compare=False)
    _gaps: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False)

    def pad(self, values: Tensor) -> Tensor:
        """(T, C) of all tokens -> (R * L, C), 0 where there is no token."""
        padded = values.new_zeros(self.rows * self.length, values.shape[1])
        return padded.index_copy_(0, self.slots, values.index_select(0, self.tokens))

    def split_heads(self, values: Tensor, parts: int, heads: int, padding: int | None = None) -> Tensor:
        """(T, parts * H * d) of all tokens -> (parts, H * R, L, d). Padding takes the row ``padding``; without, the
        newest token of its own sequence, which no query of a token looks at."""
        key = (parts * heads, padding)
        if key not in self._sources:
            source = (
                self.newest.repeat_interleave(self.length)
                if padding is None
                else self.newest.new_full((self.rows * self.length,), padding)
            )
            source[self.slots] = self.tokens
            part = torch.arange(parts * heads, device=source.device).unsqueeze(1)
            self._sources[key] = (source * (parts * heads) + part).flatten()
        rows = values.reshape(values.shape[0] * parts * heads, -1)
        return rows.index_select(0, self._sources[key]).view(parts, heads * self.rows, self.length, rows.shape[1])

    def gaps(self, first: int, last: int) -> Tensor | None:
        """(R, last - first, last) int32: buckets of the time between the queries at ``first`` to ``last`` and the
        keys before ``last``; made once, for all layers. None without times."""
        if self.ages is None:
            return None
        if (first, last) not in self._gaps:
            between = self.ages[:, None, :last] - self.ages[:, first:last, None]
            self._gaps[first, last] = time_buckets(between)
        return self._gaps[first, last]


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch's sequences lie in buckets; made once per batch, used by every layer.

    ``lengths``, ``ages``: what it was made of, for kernels that need no buckets.
    """

    total: int
    buckets: tuple[Bucket, ...]
    lengths: Tensor
    ages: Tensor | None
    _places: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def join_heads(self, values: Sequence[Tensor], parts: int, heads: int, like: Tensor) -> Tensor:
        """Of each bucket (parts, H * R, L, d), or without the first where it is 1 -> (T, parts * H * d)."""
        if not values:
            return like.new_zeros(self.total, parts * like.shape[1] // 3)
        count = parts * heads
        if count not in self._places:
            place = torch.empty(self.total, count, dtype=torch.int64, device=self.lengths.device)
            start = 0
            for bucket in self.buckets:
                size = bucket.rows * bucket.length
                part = torch.arange(count, device=place.device) * size + start
                place[bucket.tokens] = bucket.slots.unsqueeze(1) + part
                start += count * size
            self._places[count] = place.flatten()
        depth = values[0].shape[-1]
        rows = torch.cat([value.reshape(-1, depth) for value in values])
        return rows.index_select(0, self._places[count]).view(self.total, count * depth)


def layout(lengths: Tensor, ages: Tensor | None, max_buckets: int | None = None) -> Layout:
    """Sorts sequences by length into at most ``max_buckets`` buckets of about equally many tokens.

    lengths (B,) int64; ages (T,) float32 seconds from event to request, or None. Empty sequences are in no
    bucket. Default for ``max_buckets``: what pays on the device.
    """
    if max_buckets is None:
        max_buckets = default_buckets(lengths)
    order = torch.argsort(lengths, descending=True, stable=True)  # (B,)
    ordered = lengths[order]
    starts = (lengths.cumsum(0) - lengths)[order]  # (B,) first token of each sequence
    buckets = []
    for first, last in _splits(ordered, max_buckets):
        length = int(ordered[first])
        kept = ordered[first:last]  # (R,)
        column = torch.arange(length, device=lengths.device)
        slots = (column < kept.unsqueeze(1)).flatten().nonzero().squeeze(1)  # (T_b,)
        tokens = (starts[first:last].unsqueeze(1) + column).flatten().index_select(0, slots)  # (T_b,)
        bucket = Bucket(last - first, length, tokens, slots, starts[first:last] + kept - 1, None)
        if ages is not None:
            bucket = replace(bucket, ages=bucket.pad(ages.unsqueeze(1)).view(bucket.rows, length))
        buckets.append(bucket)
    return Layout(int(lengths.sum()), tuple(buckets), lengths, ages)


def default_buckets(lengths: Tensor) -> int:
    """Length buckets that pay on the device of ``lengths``: on CPU 8, and more where a bucket's scores would
    outgrow the cache; one on a GPU, where padding is cheaper than launches."""
    if lengths.device.type != "cpu":
        return 1
    return max(8, int(lengths.square().sum()) // SCORES_PER_BUCKET)


def _splits(descending: Tensor, max_buckets: int) -> list[tuple[int, int]]:
    """Row ranges of the buckets, for lengths in descending order, without the empty sequences: about equally many
    tokens each. For lengths spread evenly 8 such buckets compute 1.2 times the scores that count; buckets of equal
    attention cost, whose last holds all short sequences, 1.33 times."""
    count = int((descending > 0).sum())
    if count == 0:
        return []
    tokens = descending[:count].double().cumsum(0)
    targets = tokens[-1] * torch.arange(1, max_buckets, device=tokens.device) / max_buckets
    cuts = torch.searchsorted(tokens, targets).tolist()
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    return list(pairwise(edges))


def position_bias(weights: Tensor, length: int) -> Tensor:
    """(P,) by distance -> (L, L) by (query, key); distances from P - 1 on take the last weight."""
    place = torch.arange(length, device=weights.device)
    return weights[_distances(place, place, weights.shape[0])]


def _distances(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    return (queries.unsqueeze(1) - keys).clamp_(0, count - 1)  # (queries, keys)


def padded_attention(
    qkv: Tensor, layout: Layout, heads: int, normaliser: int, position: Tensor, time: Tensor | None
) -> Tensor:
    """The reference, by autograd: arguments and result as ``attention``."""
    width = qkv.shape[1] // 3
    if not layout.buckets:  # no events, yet every parameter must take part
        return qkv[:, :width] + position.sum() + (0.0 if time is None else time.sum())
    out = qkv.new_zeros(qkv.shape[0], width)
    for bucket in layout.buckets:
        rows, length = bucket.rows, bucket.length
        q, k, v = bucket.pad(qkv).view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (R, H, L, d) each
        bias, gaps = position_bias(position, length), bucket.gaps(0, length)  # (L, L), (R, L, L)
        if time is not None and gaps is not None:
            bias = (bias + time[gaps.long()]).unsqueeze(1)  # (R, 1, L, L)
        scores = functional.silu(q @ k.transpose(2, 3) + bias).tril()  # (R, H, L, L)
        mixed = (scores @ v).transpose(1, 2).reshape(rows * length, width) / normaliser
        out = out.index_copy(0, bucket.tokens, mixed.index_select(0, bucket.slots))
    return out


class _BucketedAttention(torch.autograd.Function):
    """Recomputes the scores in backward: what it keeps is linear in the number of tokens. Queries go in blocks, and
    a block looks at the keys up to its own end alone. Tokens come into buckets and out of them by gathers of whole
    rows, (part, head) by (part, head), which is a fifth of the time of scattering them."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        position: Tensor,
        time: Tensor | None,
        layout: Layout,
        heads: int,
        normaliser: int,
    ) -> Tensor:
        ctx.save_for_backward(qkv, position, time)
        ctx.layout, ctx.heads, ctx.normaliser = layout, heads, normaliser
        found = []
        for bucket in layout.buckets:
            q, k, v = bucket.split_heads(qkv, 3, heads)  # (H * R, L, d) each
            blocks = query_blocks(bucket.length)
            mixed = torch.empty_like(q)
            for first, last in blocks:
                scores = _scores(q, k, first, last, _bias(bucket, first, last, position, time), heads)
                functional.silu(scores, inplace=True)
                if len(blocks) == 1:
                    torch.bmm(scores, v, out=mixed)
                else:
                    mixed[:, first:last] = torch.bmm(scores, v[:, :last])
            found.append(mixed)
        return layout.join_heads(found, 1, heads, qkv).div_(normaliser)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, position, time = ctx.saved_tensors
        heads, found = ctx.heads, []
        grad_position = torch.zeros_like(position)
        grad_time = None if time is None else torch.zeros_like(time)
        scaled = grad_out.new_zeros(grad_out.shape[0] + 1, grad_out.shape[1])  # the last row is for padding
        torch.div(grad_out, ctx.normaliser, out=scaled[:-1])
        for bucket in ctx.layout.buckets:
            q, k, v = bucket.split_heads(qkv, 3, heads)  # (H * R, L, d) each
            (grad_mixed,) = bucket.split_heads(scaled, 1, heads, padding=len(scaled) - 1)
            grads = torch.empty(3, *q.shape, dtype=q.dtype, device=q.device)
            for first, last in reversed(
                query_blocks(bucket.length)
            ):  # the last block has all keys: it sets, others add
                raw = _scores(q, k, first, last, _bias(bucket, first, last, position, time), heads)  # (H * R, S, last)
                upstream = grad_mixed[:, first:last]
                grad_raw = torch.bmm(upstream, v[:, :last].transpose(1, 2))
                # 0 where masked: SiLU and its slope vanish far below 0; padding has a gradient of 0
                gate = torch.sigmoid(raw)
                scores = raw.mul_(gate)
                slope = torch.addcmul(gate, scores, gate, value=-1).add_(scores)
                grad_raw.mul_(slope)
                parts = (
                    torch.bmm(grad_raw.transpose(1, 2), q[:, first:last]),
                    torch.bmm(scores.transpose(1, 2), upstream),
                )
                for grad, part in zip(grads[1:], parts, strict=True):
                    if last == bucket.length:
                        grad.copy_(part)
                    else:
                        grad[:, :last] += part
                grads[0, :, first:last] = torch.bmm(grad_raw, k[:, :last])
                grad_bias = grad_raw.view(heads, bucket.rows, last - first, last).sum(0)  # (R, S, last)
                place = torch.arange(last, device=qkv.device)
                distance = _distances(place[first:], place, position.shape[0])  # (S, last)
                grad_position += _binned(grad_bias.sum(0), distance, position)
                gaps = bucket.gaps(first, last)
                if grad_time is not None and gaps is not None:
                    grad_time += _binned(grad_bias, gaps, grad_time)
            found.append(grads)
        return ctx.layout.join_heads(found, 3, heads, qkv), grad_position, grad_time, None, None, None


def query_blocks(length: int) -> list[tuple[int, int]]:
    """(first, last) of blocks of about equally many queries, QUERIES_PER_BLOCK at most."""
    count = max(1, -(-length // QUERIES_PER_BLOCK))
    edges = [place * length // count for place in range(count + 1)]
    return list(pairwise(edges))


def _bias(bucket: Bucket, first: int, last: int, position: Tensor, time: Tensor | None) -> Tensor:
    """(R, S, last), or (1, S, last) without times: bias of queries first .. last, MASKED above the diagonal."""
    place = torch.arange(last, device=position.device)
    bias = position[_distances(place[first:], place, position.shape[0])]  # (S, last)
    bias = bias.masked_fill(place > place[first:].unsqueeze(1), MASKED).unsqueeze(0)
    gaps = bucket.gaps(first, last)
    if time is None or gaps is None:
        return bias.expand(bucket.rows, -1, -1)
    return time.index_select(0, gaps.flatten()).view(gaps.shape).add_(bias)


def _scores(q: Tensor, k: Tensor, first: int, last: int, bias: Tensor, heads: int) -> Tensor:
    """Scores before SiLU: q, k (H * R, L, d), bias (R, S, last) -> (H * R, S, last)."""
    every = bias.new_empty(heads, *bias.shape)
    every.copy_(bias)
    flat = every.view(-1, *bias.shape[1:])
    # not baddbmm_, whose operations torch's counter, and so model.cost, would not see
    return torch.baddbmm(flat, q[:, first:last], k[:, :last].transpose(1, 2), out=flat)


def _binned(values: Tensor, bins: Tensor, like: Tensor) -> Tensor:
    # float64: many small terms of both signs fall into one bin
    sums = torch.bincount(bins.flatten(), weights=values.flatten().double(), minlength=like.numel())
    return sums.to(like.dtype)


def bucketed_attention(
    qkv: Tensor, layout: Layout, heads: int, normaliser: int, position: Tensor, time: Tensor | None
) -> Tensor:
    """The reference's values and gradients, in fewer passes over the scores, which are not kept for backward.
    Differentiable once."""
    apply: Any = _BucketedAttention.apply
    out: Tensor = apply(qkv, position, time, layout, heads, normaliser)
    return out


def attention(
    qkv: Tensor, layout: Layout, heads: int, normaliser: int, position: Tensor, time: Tensor | None
) -> Tensor:
    """Pointwise attention within each sequence, by the best implementation for the device.

    qkv         (T, 3 * H * d): queries, keys and values of all tokens, in this order.
    layout      of the same tokens. heads: H. normaliser: the configured maximum length N.
    position    (P,) bias by distance in tokens; distances from P - 1 on share the last.
    time        (TIME_BUCKETS,) bias by bucket of the time between query and key, or None.
    Result      (T, H * d).
    """
    if qkv.device.type != "cpu":
        if layout.buckets and _has_triton() and not torch.are_deterministic_algorithms_enabled():
            from roo_ray.models.triton_attention import triton_attention

            longest = max(bucket.length for bucket in layout.buckets)
            return triton_attention(qkv, layout.lengths, layout.ages, longest, heads, normaliser, position, time)
        return padded_attention(qkv, layout, heads, normaliser, position, time)
    if qkv.dtype == torch.float32:
        return bucketed_attention(qkv, layout, heads, normaliser, position, time)
    with torch.autocast("cpu", enabled=False):  # scores in float32: the CPU gains nothing below it
        return bucketed_attention(qkv.float(), layout, heads, normaliser, position, time).to(qkv.dtype)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
