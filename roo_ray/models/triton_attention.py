"""HSTU's attention as a Triton kernel on jagged sequences: scores never reach memory, nothing is padded.

The same values and gradients as ``attention.padded_attention``. A program takes one head of one sequence and a block
of queries (forward, and the gradients of queries and biases) or of keys (gradients of keys and values), and walks over
the blocks on its side of the diagonal. Bias gradients are summed by atomic additions: not bitwise reproducible.

Importing this module needs ``triton``; with ``TRITON_INTERPRET=1`` it runs on CPU tensors, for tests.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from roo_ray.models.triton_blocks import padded_depth


@triton.jit
def _silu_scores(q, k, rows, columns, age_q, age_k, length, position, time, reach, last_bucket, TIMED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(raw scores, visible): raw (M, N) of queries at ``rows`` and keys at ``columns``."""
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    distance = rows[:, None] - columns[None, :]
    visible = (distance >= 0) & (rows < length)[:, None] & (columns < length)[None, :]
    place = tl.minimum(tl.maximum(distance, 0), reach - 1)
    raw += tl.load(position + place, mask=visible, other=0.0)
    if TIMED:
        seconds = tl.maximum(age_k[None, :] - age_q[:, None], 1.0)
        bucket = (seconds.to(tl.int32, bitcast=True) >> 22) - 254
        raw += tl.load(time + tl.minimum(bucket, last_bucket), mask=visible, other=0.0)
    return raw, visible


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, ages, position, time, starts, lengths, out,
    heads, depth, reach, last_bucket, normaliser,
    TIMED: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    first = tl.program_id(1) * M
    if first >= length:
        return
    width = heads * depth
    rows, dims = first + tl.arange(0, M), tl.arange(0, D)
    inside = (rows < length)[:, None] & (dims < depth)[None, :]
    at = (start + rows)[:, None] * (3 * width) + head * depth + dims[None, :]
    q = tl.load(qkv + at, mask=inside, other=0.0)
    age_q = tl.load(ages + start + rows, mask=(rows < length) & TIMED, other=0.0)
    total = tl.zeros([M, D], dtype=tl.float32)
    for begin in range(0, first + M, M):
        columns = begin + tl.arange(0, M)
        held = (columns < length)[:, None] & (dims < depth)[None, :]
        key_at = (start + columns)[:, None] * (3 * width) + width + head * depth + dims[None, :]
        k = tl.load(qkv + key_at, mask=held, other=0.0)
        v = tl.load(qkv + key_at + width, mask=held, other=0.0)
        age_k = tl.load(ages + start + columns, mask=(columns < length) & TIMED, other=0.0)
        raw, visible = _silu_scores(
            q, k, rows, columns, age_q, age_k, length, position, time, reach, last_bucket, TIMED
        )
        scores = tl.where(visible, raw * tl.sigmoid(raw), 0.0)
        total += tl.dot(scores.to(v.dtype), v, input_precision="ieee")
    out_at = (start + rows)[:, None] * width + head * depth + dims[None, :]
    tl.store(out + out_at, (total / normaliser).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_queries(  # type: ignore[no-untyped-def]
    qkv, ages, position, time, starts, lengths, grad_out, grad_qkv, grad_position, grad_time,
    heads, depth, reach, last_bucket, normaliser,
    TIMED: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    first = tl.program_id(1) * M
    if first >= length:
        return
    width = heads * depth
    rows, dims = first + tl.arange(0, M), tl.arange(0, D)
    inside = (rows < length)[:, None] & (dims < depth)[None, :]
    at = (start + rows)[:, None] * (3 * width) + head * depth + dims[None, :]
    out_at = (start + rows)[:, None] * width + head * depth + dims[None, :]
    q = tl.load(qkv + at, mask=inside, other=0.0)
    upstream = (tl.load(grad_out + out_at, mask=inside, other=0.0).to(tl.float32) / normaliser).to(q.dtype)
    age_q = tl.load(ages + start + rows, mask=(rows < length) & TIMED, other=0.0)
    grad_q = tl.zeros([M, D], dtype=tl.float32)
    for begin in range(0, first + M, M):
        columns = begin + tl.arange(0, M)
        held = (columns < length)[:, None] & (dims < depth)[None, :]
        key_at = (start + columns)[:, None] * (3 * width) + width + head * depth + dims[None, :]
        k = tl.load(qkv + key_at, mask=held, other=0.0)
        v = tl.load(qkv + key_at + width, mask=held, other=0.0)
        age_k = tl.load(ages + start + columns, mask=(columns < length) & TIMED, other=0.0)
        raw, visible = _silu_scores(
            q, k, rows, columns, age_q, age_k, length, position, time, reach, last_bucket, TIMED
        )
        gate = tl.sigmoid(raw)
        grad_raw = tl.dot(upstream, tl.trans(v), input_precision="ieee") * gate * (1.0 + raw * (1.0 - gate))
        grad_raw = tl.where(visible, grad_raw, 0.0)
        grad_q += tl.dot(grad_raw.to(k.dtype), k, input_precision="ieee")
        distance = tl.maximum(rows[:, None] - columns[None, :], 0)
        tl.atomic_add(grad_position + tl.minimum(distance, reach - 1), grad_raw, mask=visible)
        if TIMED:
            seconds = tl.maximum(age_k[None, :] - age_q[:, None], 1.0)
            bucket = (seconds.to(tl.int32, bitcast=True) >> 22) - 254
            tl.atomic_add(grad_time + tl.minimum(bucket, last_bucket), grad_raw, mask=visible)
    tl.store(grad_qkv + at, grad_q.to(grad_qkv.dtype.element_ty), mask=inside)


@triton.jit
def _backward_keys(  # type: ignore[no-untyped-def]
    qkv, ages, position, time, starts, lengths, grad_out, grad_qkv,
    heads, depth, reach, last_bucket, normaliser,
    TIMED: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    first = tl.program_id(1) * M
    if first >= length:
        return
    width = heads * depth
    columns, dims = first + tl.arange(0, M), tl.arange(0, D)
    held = (columns < length)[:, None] & (dims < depth)[None, :]
    key_at = (start + columns)[:, None] * (3 * width) + width + head * depth + dims[None, :]
    k = tl.load(qkv + key_at, mask=held, other=0.0)
    v = tl.load(qkv + key_at + width, mask=held, other=0.0)
    age_k = tl.load(ages + start + columns, mask=(columns < length) & TIMED, other=0.0)
    grad_k = tl.zeros([M, D], dtype=tl.float32)
    grad_v = tl.zeros([M, D], dtype=tl.float32)
    for begin in range(first, length, M):
        rows = begin + tl.arange(0, M)
        inside = (rows < length)[:, None] & (dims < depth)[None, :]
        at = (start + rows)[:, None] * (3 * width) + head * depth + dims[None, :]
        out_at = (start + rows)[:, None] * width + head * depth + dims[None, :]
        q = tl.load(qkv + at, mask=inside, other=0.0)
        upstream = (tl.load(grad_out + out_at, mask=inside, other=0.0).to(tl.float32) / normaliser).to(q.dtype)
        age_q = tl.load(ages + start + rows, mask=(rows < length) & TIMED, other=0.0)
        raw, visible = _silu_scores(
            q, k, rows, columns, age_q, age_k, length, position, time, reach, last_bucket, TIMED
        )
        gate = tl.sigmoid(raw)
        scores = tl.where(visible, raw * gate, 0.0)
        grad_v += tl.dot(tl.trans(scores.to(upstream.dtype)), upstream, input_precision="ieee")
        grad_raw = tl.dot(upstream, tl.trans(v), input_precision="ieee") * gate * (1.0 + raw * (1.0 - gate))
        grad_raw = tl.where(visible, grad_raw, 0.0)
        grad_k += tl.dot(tl.trans(grad_raw.to(q.dtype)), q, input_precision="ieee")
    tl.store(grad_qkv + key_at, grad_k.to(grad_qkv.dtype.element_ty), mask=held)
    tl.store(grad_qkv + key_at + width, grad_v.to(grad_qkv.dtype.element_ty), mask=held)


class _JaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        position: Tensor,
        time: Tensor | None,
        lengths: Tensor,
        ages: Tensor | None,
        longest: int,
        heads: int,
        normaliser: int,
        block: int,
    ) -> Tensor:
        qkv = qkv.contiguous()
        out = qkv.new_zeros(qkv.shape[0], qkv.shape[1] // 3)
        ctx.save_for_backward(qkv, position, time, lengths, ages)
        ctx.longest, ctx.heads, ctx.normaliser, ctx.block = longest, heads, normaliser, block
        grid, sizes, options = _launch(ctx, qkv, position, time, ages, lengths.numel())
        _forward[grid](qkv, *_inputs(qkv, position, time, lengths, ages), out, *sizes, **options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, position, time, lengths, ages = ctx.saved_tensors
        grad_out, grad_qkv = grad_out.contiguous(), torch.zeros_like(qkv)
        grad_position = torch.zeros_like(position, dtype=torch.float32)
        grad_time = torch.zeros_like(position if time is None else time, dtype=torch.float32)
        grid, sizes, options = _launch(ctx, qkv, position, time, ages, lengths.numel())
        inputs = _inputs(qkv, position, time, lengths, ages)
        _backward_queries[grid](
            qkv, *inputs, grad_out, grad_qkv, grad_position, grad_time, *sizes, **options
        )  # fmt: skip
        _backward_keys[grid](qkv, *inputs, grad_out, grad_qkv, *sizes, **options)
        grads = (grad_qkv, grad_position.to(position.dtype), None if time is None else grad_time.to(time.dtype))
        return (*grads, None, None, None, None, None, None)


def _inputs(
    qkv: Tensor, position: Tensor, time: Tensor | None, lengths: Tensor, ages: Tensor | None
) -> tuple[Tensor, ...]:
    """(ages, position, time, starts, lengths); what is not there is replaced by what is not read."""
    starts = lengths.cumsum(0) - lengths
    return (qkv if ages is None else ages), position, (position if time is None else time), starts, lengths


def _launch(
    ctx: Any, qkv: Tensor, position: Tensor, time: Tensor | None, ages: Tensor | None, sequences: int
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """(grid, sizes, compile-time options) of a launch."""
    depth = qkv.shape[1] // 3 // ctx.heads
    grid = (sequences * ctx.heads, max(1, -(-ctx.longest // ctx.block)))
    timed = time is not None and ages is not None
    last_bucket = time.numel() - 1 if time is not None else 0
    sizes = (ctx.heads, depth, position.numel(), last_bucket, ctx.normaliser)
    return grid, sizes, {"TIMED": timed, "M": ctx.block, "D": padded_depth(depth)}


def triton_attention(
    qkv: Tensor,
    lengths: Tensor,
    ages: Tensor | None,
    longest: int,
    heads: int,
    normaliser: int,
    position: Tensor,
    time: Tensor | None,
    block: int,
) -> Tensor:
    """As ``attention.attention``, of sequences of ``lengths`` (B,) int64, the longest ``longest``, with ``ages``
    (T,) float32 or None; ``block``: see ``triton_blocks.block_size``. Products are of ``qkv``'s type, so that bfloat16
    gets tensor cores; sums are float32. Differentiable once."""
    apply: Any = _JaggedAttention.apply
    out: Tensor = apply(qkv, position, time, lengths, ages, longest, heads, normaliser, block)
    return out
