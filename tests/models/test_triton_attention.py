"""The Triton kernel against the reference, forward and backward: on a GPU, else by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.models import attention, attention_layout
from roo_ray.models.triton_blocks import shared_bytes
from tests.models.test_attention import HEADS, NORMALISER, case, lengths_lists

pytest.importorskip("triton", reason="triton is not installed: make test-kernels installs it and runs these")
from roo_ray.models.triton_attention import triton_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(
    lengths: list[int], seed: int, timed: bool, width: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """As ``case``, where the kernel runs; ages are None where not ``timed``."""
    made, of, ages = case(lengths, seed, timed, width)
    return [x.detach().to(DEVICE).requires_grad_() for x in made], of.to(DEVICE), ages.to(DEVICE) if timed else None


def assert_equals_reference(lengths: list[int], seed: int, timed: bool, depth: int) -> None:
    """Output and every gradient; blocks of 16 are the smallest that a product takes: longer sequences need several."""
    width = HEADS * depth
    inputs, of, ages = on_device(lengths, seed, timed, width)
    qkv, position, *rest = inputs
    time = rest[0] if rest else None
    weight = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    layout = attention_layout.layout(of, ages, 1)
    reference = attention.padded_attention(qkv, layout, HEADS, NORMALISER, position, time)
    ours = triton_attention(qkv, of, ages, max(lengths), HEADS, NORMALISER, position, time, block=16)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    for one, other in zip(torch.autograd.grad((ours * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(lengths_lists, st.integers(0, 1000), st.booleans(), st.sampled_from([3, 16]))
def test_equals_reference(lengths: list[int], seed: int, timed: bool, depth: int) -> None:
    assert_equals_reference(lengths, seed, timed, depth)


@settings(max_examples=3, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(0, 1000), st.booleans())
def test_lengths_of_several_blocks(lengths: list[int], seed: int, timed: bool) -> None:
    assert_equals_reference(lengths, seed, timed, 3)


@pytest.mark.parametrize("depth", [3, 16, 20])  # as padded to 16 and to 32
def test_several_blocks(depth: int) -> None:
    assert_equals_reference([40, 3, 17, 0, 33], 1, True, depth)


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


COMPILE = """
import roo_ray.models.triton_attention as kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

depth, block = 64, 64
for name in ("_forward", "_backward_queries", "_backward_keys"):
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    types = dict.fromkeys(names, "i32") | {n: "*i64" for n in names if n in ("starts", "lengths")}
    types |= {n: "*fp32" for n in names if n in ("ages", "position", "time", "grad_position", "grad_time")}
    types |= {n: "*bf16" for n in names if n in ("qkv", "out", "grad_out", "grad_qkv")}
    types |= dict.fromkeys(["TIMED", "M", "D"], "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if types[n][0] == "*" or n == "depth"}
    for timed in (True, False):
        types["ages"] = "*fp32" if timed else "*bf16"  # without ages, qkv stands in their place
        values = {(names.index(n),): v for n, v in {"TIMED": timed, "M": block, "D": depth}.items()}
        for major in (8, 9):
            source = ASTSource(kernel, types, values, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major, 32))
            print(name, timed, major, compiled.metadata.shared)
"""


def test_shared_memory_is_what_the_compiler_takes(tmp_path: Path) -> None:
    """Every kernel, with and without time bias, compiled for A100 and H100, which needs no GPU, in a process where
    kernels are compiled. The interpreter takes any Python, the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    taken = [line.split() for line in done.stdout.splitlines()]
    assert len(taken) == 12
    for major in (8, 9):
        bound = shared_bytes(64, 2, 64, major)
        hungriest = max(int(shared) for *_, of, shared in taken if int(of) == major)
        assert bound / 1.5 < hungriest <= bound
