"""The Triton kernel against the reference, forward and backward: on a GPU, else by Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.models import attention, attention_layout
from tests.models.test_attention import HEADS, NORMALISER, WIDTH, case, lengths_lists

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="triton is not installed: make test-kernels installs it and runs these")
from roo_ray.models.triton_attention import triton_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=8, deadline=None)
@given(lengths_lists, st.integers(0, 1000), st.booleans())
def test_equals_reference(lengths: list[int], seed: int, timed: bool) -> None:
    made, of, ages = case(lengths, seed, timed)
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in made]
    of, ages = of.to(DEVICE), ages.to(DEVICE)
    time = inputs[2] if timed else None
    weight = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    layout = attention_layout.layout(of, ages if timed else None, 1)
    reference = attention.padded_attention(inputs[0], layout, HEADS, NORMALISER, inputs[1], time)
    # blocks of 16 queries are the smallest that a product takes: lengths up to 40 need several
    args = (of, ages if timed else None, max(lengths), HEADS, NORMALISER, inputs[1], time)
    ours = triton_attention(inputs[0], *args, block=16)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    for one, other in zip(torch.autograd.grad((ours * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_several_blocks() -> None:
    lengths = [40, 3, 17, 0, 33]
    inputs, of, ages = case(lengths, 1, True)
    layout = attention_layout.layout(of, ages, 1)
    args = (of, ages, max(lengths), HEADS, NORMALISER, inputs[1], inputs[2])
    results = []
    for out in (
        attention.padded_attention(inputs[0], layout, HEADS, NORMALISER, inputs[1], inputs[2]),
        triton_attention(inputs[0], *args, block=16),
    ):
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for ours, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


# Triton's interpreter multiplies the bits of bfloat16 as integers: that type is for a GPU alone
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
def test_half_precision_is_within_its_rounding(half: torch.dtype) -> None:
    """Products of the inputs' type, sums of float32: against the reference on the same rounded inputs."""
    lengths = [40, 3, 17, 0, 33]
    inputs, of, ages = case(lengths, 1, True)
    qkv = inputs[0].detach().to(half)
    layout = attention_layout.layout(of.to(DEVICE), ages.to(DEVICE), 1)
    biases = [x.detach().to(DEVICE).requires_grad_() for x in inputs[1:]]
    results = []
    for kind in (torch.float32, half):
        tokens = qkv.to(DEVICE, kind).requires_grad_()
        if kind == torch.float32:
            out = attention.padded_attention(tokens, layout, HEADS, NORMALISER, *biases)
        else:
            out = triton_attention(
                tokens, of.to(DEVICE), ages.to(DEVICE), max(lengths), HEADS, NORMALISER, *biases, block=16
            )
        assert out.dtype == kind
        results.append((out, *torch.autograd.grad(out.float().square().sum(), [tokens, *biases])))
    for ours, reference in zip(results[1], results[0], strict=True):
        assert float((ours.float() - reference).norm()) < 8 * torch.finfo(half).eps * float(reference.norm())
