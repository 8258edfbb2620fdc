"""HSTU's pointwise attention over jagged sequences (arXiv 2402.17152, equation 2), causal, with relative bias:

    out_i = sum over j <= i of SiLU(q_i . k_j + position[i - j] + time[bucket(t_i - t_j)]) v_j / N

N is the configured maximum length, not the batch's longest, so that a sequence's output does not depend on the
batch around it. ``attention`` is the entry; ``padded_attention`` is the reference and runs everywhere;
``bucketed_attention`` is the same on CPU without padding every sequence to the longest; ``triton_attention`` is the
same on a GPU without padding.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from roo_ray.models.attention_layout import Layout
from roo_ray.models.bucketed_attention import bucketed_attention
from roo_ray.models.precision import at_least_float32
from roo_ray.models.triton_blocks import block_size

_say: Callable[[str], None] | None = None


def say_fallbacks(say: Callable[[str], None] | None) -> None:
    """From now on ``say`` gets what ``attention`` warns of in this process, a line each, once (None: Python's warnings
    do): nobody reads the warnings of a worker."""
    global _say
    _say = say


def position_bias(weights: Tensor, length: int) -> Tensor:
    """(P,) by distance -> (L, L) by (query, key); distances from P - 1 on take the last weight."""
    place = torch.arange(length, device=weights.device)
    return weights[(place.unsqueeze(1) - place).clamp_(0, weights.shape[0] - 1)]


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
        bias, gaps = position_bias(position, length), bucket.gaps()  # (L, L), (R, L, L)
        if time is not None:  # without ages it still takes part
            bias = bias + time.sum() * 0.0 if gaps is None else (bias + time[gaps.long()]).unsqueeze(1)  # (R, 1, L, L)
        scores = functional.silu(q @ k.transpose(2, 3) + bias).tril()  # (R, H, L, L)
        mixed = (scores @ v).transpose(1, 2).reshape(rows * length, width) / normaliser
        out = out.index_copy(0, bucket.tokens, mixed.index_select(0, bucket.slots))
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
        block = None
        if layout.buckets and _has_triton() and not torch.are_deterministic_algorithms_enabled():
            block = triton_block(qkv, qkv.shape[1] // 3 // heads)
        if block is not None:
            from roo_ray.models.triton_attention import triton_attention

            longest = max(bucket.length for bucket in layout.buckets)
            return triton_attention(qkv, layout.lengths, layout.ages, longest, heads, normaliser, position, time, block)
        return padded_attention(qkv, layout, heads, normaliser, position, time)
    with torch.autocast("cpu", enabled=False):  # scores in float32: the CPU gains nothing below it
        mixed: Tensor = bucketed_attention(at_least_float32(qkv), layout, heads, normaliser, position, time)
        return mixed.to(qkv.dtype)


def kernel_problem() -> str | None:
    """Why the Triton kernel cannot run in this process, whatever its GPU; None where it can. Triton builds a launcher
    at first use, by the C compiler that ``CC`` names, gcc or clang (it looks for no other name)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    named = (os.environ.get("CC") or "").split()[:1]
    if not any(shutil.which(compiler) for compiler in named or ("gcc", "clang")):
        return f"Triton finds no C compiler ({f'CC={named[0]}' if named else 'CC, gcc or clang'})"
    return None


def triton_block(qkv: Tensor, depth: int) -> int | None:
    """The kernel's block for heads of ``depth`` on the GPU of ``qkv``; None, with one warning, where none fits."""
    gpu = torch.cuda.get_device_properties(qkv.device)
    shared: int = getattr(gpu, "shared_memory_per_block_optin", gpu.shared_memory_per_block)
    block = block_size(depth, qkv.itemsize, gpu.major, shared)
    if block is None:
        _warn_once(
            f"attention is the padded reference, which is slower: heads of depth {depth} in {qkv.dtype} do not fit the "
            f"{shared // 1024} KiB of shared memory of {gpu.name}; take more model.heads, or training.autocast: bf16"
        )
    return block


@cache
def _warn_once(message: str) -> None:
    if _say is None:
        warnings.warn(message, stacklevel=3)
    else:
        _say(message)


@cache
def _has_triton() -> bool:
    problem = kernel_problem()
    if problem is not None:
        _warn_once(f"attention is the padded reference, which is slower and takes more memory: {problem}")
    return problem is None
