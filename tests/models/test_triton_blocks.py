"""The blocks of the Triton attention: the largest that fit the GPU at hand, and what happens where none does."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.models import attention
from roo_ray.models.triton_blocks import BLOCKS, block_size, padded_depth, shared_bytes

L4, A100, H100 = ((major, kib * 1024) for major, kib in ((8, 99), (8, 163), (9, 227)))


@pytest.mark.parametrize(
    ("depth", "itemsize", "gpu", "block"),
    [
        (64, 2, L4, 64), (128, 2, L4, 32), (32, 4, L4, 64), (64, 4, L4, 32), (256, 4, L4, 16), (512, 4, L4, None),
        (128, 2, A100, 64), (64, 4, A100, 64), (128, 4, A100, 32),
        (128, 2, H100, 64), (256, 2, H100, 32), (128, 4, H100, 64), (256, 4, H100, 32), (2048, 4, H100, None),
    ],
)  # fmt: skip
def test_what_fits_is_taken(depth: int, itemsize: int, gpu: tuple[int, int], block: int | None) -> None:
    assert block_size(depth, itemsize, *gpu) == block


# of the hungriest kernel, keys' gradients, in bytes, as Triton 3.7.1 compiles it for sm_80 and sm_90 with time bias
COMPILED = {
    8: {
        (16, 2, 64): 43264, (16, 2, 32): 13440, (16, 2, 16): 4672, (32, 2, 64): 53504, (32, 2, 32): 16512,
        (32, 2, 16): 7232, (64, 2, 64): 65792, (64, 2, 32): 28800, (64, 2, 16): 12352, (128, 2, 64): 106752,
        (128, 2, 32): 49280, (128, 2, 16): 22592, (256, 2, 64): 188672, (256, 2, 32): 90240, (256, 2, 16): 43072,
        (32, 4, 64): 73984, (32, 4, 32): 28800, (32, 4, 16): 12352, (64, 4, 64): 114944, (64, 4, 32): 49280,
        (128, 4, 32): 90240, (128, 4, 16): 43072, (256, 4, 32): 172160, (256, 4, 16): 84032,
    },
    9: {
        (16, 2, 64): 47360, (32, 2, 64): 61696, (64, 2, 64): 82176, (128, 2, 64): 147712, (256, 2, 64): 262400,
        (128, 2, 32): 49280, (256, 2, 32): 90240, (64, 4, 32): 49280, (32, 4, 64): 73984, (64, 4, 64): 114944,
    },
}  # fmt: skip


@pytest.mark.parametrize("major", COMPILED)
def test_no_program_takes_more_than_is_said(major: int) -> None:
    for (depth, itemsize, block), taken in COMPILED[major].items():
        bound = shared_bytes(depth, itemsize, block, major)
        assert bound / 1.5 < taken <= bound, (depth, itemsize, block)


@given(st.integers(1, 1000), st.sampled_from([2, 4]), st.sampled_from([8, 9]), st.integers(0, 240_000))
def test_the_block_is_the_largest_that_fits(depth: int, itemsize: int, major: int, memory: int) -> None:
    block = block_size(depth, itemsize, major, memory)
    larger = [b for b in BLOCKS if block is None or b > block]
    assert block is None or shared_bytes(depth, itemsize, block, major) <= memory
    assert all(shared_bytes(depth, itemsize, b, major) > memory for b in larger)


@given(st.integers(1, 1000))
def test_depths_are_padded_to_powers_of_two(depth: int) -> None:
    padded = padded_depth(depth)
    assert padded & (padded - 1) == 0
    assert padded >= max(16, depth)
    assert padded == 16 or padded < 2 * depth


def test_heads_that_fit_no_block_take_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=L4[1], major=8, name="L4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    on_gpu: Any = SimpleNamespace(device="cuda:0", dtype=torch.float32, itemsize=4)
    with pytest.warns(UserWarning, match=r"heads of depth 777 .* 99 KiB .* of L4; .* model\.heads"):
        assert attention.triton_block(on_gpu, 777) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention.triton_block(on_gpu, 777) is None
        assert attention.triton_block(on_gpu, 64) == 32
