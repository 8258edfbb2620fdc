"""HSTU's attention on CPU: the reference's values and gradients (``attention.padded_attention``) without padding every
sequence to the longest, and in few passes over the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from roo_ray.models.attention_layout import Bucket, Layout, query_blocks

KEPT_SCORES = 8 << 20  # scores of a layer up to which they are kept for backward: 32 MB; more are computed again
MASKED = -1e30  # below every product of query and key; SiLU and its slope are exactly 0 here


class _BucketedAttention(torch.autograd.Function):
    """Queries go in blocks, and a block looks at the keys up to its own end alone. Tokens come into buckets and out
    of them by gathers of whole rows, (part, head) by (part, head), which is a fifth of the time of scattering them.
    The biases of time and distance are added up in a table of all pairs, from which a score's bias is one gather, and
    whose gradient is one count per bin."""

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
        table = _bias_table(position, time if layout.ages is not None else None)
        keeps = _scores_of(layout, heads) <= KEPT_SCORES
        qkv = qkv.contiguous()  # once: a part of wider rows would be copied whole by every bucket's gather
        rows = qkv.new_empty(heads * layout.slots(), qkv.shape[1] // (3 * heads))
        gathered, kept = [], []
        for bucket, (mixed,) in zip(layout.buckets, layout.parts_of(rows, 1, heads), strict=True):
            gathered.append(bucket.split_heads(qkv, 3, heads))
            q, k, v = gathered[-1]  # (H * R, L, d) each
            for first, last in query_blocks(bucket.length):
                raw = _raw_scores(bucket, q, k, first, last, table, position)
                kept += [raw] if keeps else []
                scores = functional.silu(raw, inplace=not keeps)
                _product(scores, v[:, :last], mixed[:, first:last])
        ctx.save_for_backward(position, time, table, *gathered, *kept)
        ctx.layout, ctx.heads, ctx.normaliser = layout, heads, normaliser
        return layout.join_heads(rows, 1, heads).div_(normaliser)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        position, time, table, *saved = ctx.saved_tensors
        layout, heads = ctx.layout, ctx.heads
        gathered, kept = saved[: len(layout.buckets)], iter(saved[len(layout.buckets) :])
        scaled = grad_out.new_zeros(grad_out.shape[0] + 1, grad_out.shape[1])  # the last row is for padding
        torch.div(grad_out, ctx.normaliser, out=scaled[:-1])
        grad_table = torch.zeros(table.numel(), dtype=torch.float64)  # many small terms of both signs fall into a bin
        rows = grad_out.new_empty(3 * heads * layout.slots(), grad_out.shape[1] // heads)
        grads = layout.parts_of(rows, 3, heads)
        for bucket, (q, k, v), (grad_q, grad_k, grad_v) in zip(layout.buckets, gathered, grads, strict=True):
            (grad_mixed,) = bucket.split_heads(scaled, 1, heads, padding=len(scaled) - 1)  # (H * R, L, d)
            blocks = query_blocks(bucket.length)
            raws: list[Tensor | None] = [next(kept, None) for _ in blocks]
            # from the last block, which has all keys: it sets, others add
            for (first, last), known in zip(reversed(blocks), reversed(raws), strict=True):
                raw = _raw_scores(bucket, q, k, first, last, table, position) if known is None else known
                upstream, queries = grad_mixed[:, first:last], q[:, first:last]
                # 0 where masked: SiLU and its slope vanish far below 0; padding has a gradient of 0
                gate = torch.sigmoid(raw)
                scores = torch.mul(raw, gate, out=raw if known is None else None)
                slope = torch.addcmul(gate, scores, gate, value=-1).add_(scores)
                grad_raw = torch.bmm(upstream, v[:, :last].transpose(1, 2)).mul_(slope)  # (H * R, S, last)
                _product(grad_raw, k[:, :last], grad_q[:, first:last])
                for grad, left, right in ((grad_k, grad_raw, queries), (grad_v, scores, upstream)):
                    if last == bucket.length:
                        torch.bmm(left.transpose(1, 2), right, out=grad)
                    else:
                        grad[:, :last].add_(torch.bmm(left.transpose(1, 2), right))
                place = _bias_rows(bucket, first, last, table, position)
                grad_bias = grad_raw.view(heads, bucket.rows, last - first, last).sum(0)  # (R, S, last)
                if place.shape[0] < bucket.rows:
                    grad_bias = grad_bias.sum(0)
                grad_table += torch.bincount(
                    place.flatten(), weights=grad_bias.flatten().double(), minlength=table.numel()
                )
        by_distance = grad_table.view(-1, position.numel() + 1)[:, :-1]  # the last was masked
        grad_position = by_distance.sum(0).to(position.dtype)
        grad_time = None
        if time is not None:
            grad_time = by_distance.sum(1).to(time.dtype) if layout.ages is not None else torch.zeros_like(time)
        return layout.join_heads(rows, 3, heads), grad_position, grad_time, None, None, None


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Batches of matrices into ``out``: a part of wider ones torch would fill a matrix at a time."""
    if out.is_contiguous():
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))


def _bias_table(position: Tensor, time: Tensor | None) -> Tensor:
    """position (P,), time (TIME_BUCKETS,) -> (TIME_BUCKETS * (P + 1),), or (P + 1,) without times: bias by (time
    bucket, distance), MASKED in the last column."""
    by_distance = torch.cat([position, position.new_full((1,), MASKED)])
    return by_distance if time is None else (time.unsqueeze(1) + by_distance).flatten()


def _scores_of(layout: Layout, heads: int) -> int:
    """Scores of a layer."""
    blocks = ((bucket.rows, *block) for bucket in layout.buckets for block in query_blocks(bucket.length))
    return heads * sum(rows * (last - first) * last for rows, first, last in blocks)


def _bias_rows(bucket: Bucket, first: int, last: int, table: Tensor, position: Tensor) -> Tensor:
    reach = position.numel()
    return bucket.bias_rows(first, last, reach, timed=table.numel() > reach + 1)


def _raw_scores(bucket: Bucket, q: Tensor, k: Tensor, first: int, last: int, table: Tensor, position: Tensor) -> Tensor:
    """Scores before SiLU: q, k (H * R, L, d) -> (H * R, last - first, last)."""
    place = _bias_rows(bucket, first, last, table, position)  # (R, S, last) or (1, S, last)
    heads = q.shape[0] // bucket.rows
    every = table.new_empty(heads, bucket.rows, *place.shape[1:])
    if place.shape[0] == bucket.rows:
        torch.index_select(table, 0, place.flatten(), out=every[0].view(-1))
        every[1:] = every[0]
    else:
        every.copy_(table.index_select(0, place.flatten()).view(place.shape))
    flat = every.view(-1, *place.shape[1:])
    # not baddbmm_, whose operations torch's counter, and so model.cost, would not see
    return torch.baddbmm(flat, q[:, first:last], k[:, :last].transpose(1, 2), out=flat)


@torch.compiler.disable  # type: ignore[misc]  # buckets are cut by values, which the compiler cannot follow
def bucketed_attention(
    qkv: Tensor, layout: Layout, heads: int, normaliser: int, position: Tensor, time: Tensor | None
) -> Tensor:
    """Arguments and result as ``attention.attention``, float32. Differentiable once."""
    if not layout.buckets:  # no events, yet every parameter must take part
        return qkv[:, : qkv.shape[1] // 3] + position.sum() + (0.0 if time is None else time.sum())
    apply: Any = _BucketedAttention.apply
    out: Tensor = apply(qkv, position, time, layout, heads, normaliser)
    return out
