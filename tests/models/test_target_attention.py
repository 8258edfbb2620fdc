"""Attention of candidates to their request's history: against loops, and against one joint HSTU sequence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.models import attention_layout, target_attention
from roo_ray.models.contract import SequenceInputs
from roo_ray.models.hstu import HSTULayer
from roo_ray.models.target_attention import silu_target_attention, softmax_target_attention, target_layout

HEADS, WIDTH = 2, 6
requests = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=5)


def loop(
    query: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, shapes: list[tuple[int, int]]
) -> torch.Tensor:
    rows, event, target = [], 0, 0
    depth = WIDTH // HEADS
    for events, targets in shapes:
        keys, values = memory[event : event + events].view(events, 2, HEADS, depth).unbind(1)
        for i in range(target, target + targets):
            scores = (query[i].view(HEADS, depth) * keys).sum(2)  # (events, H)
            if bias is None:
                weights = torch.softmax(scores / math.sqrt(depth), dim=0)
            else:
                raw = scores + bias[event : event + events].unsqueeze(1)
                weights = raw * torch.sigmoid(raw)
            rows.append((weights.unsqueeze(2) * values).sum(0).flatten())
        event, target = event + events, target + targets
    return torch.stack(rows)


@settings(max_examples=20, deadline=None)
@given(requests, st.integers(0, 1000), st.booleans(), st.integers(1, 8))
def test_equals_loop(shapes: list[tuple[int, int]], seed: int, softmax: bool, buckets: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths, counts = (torch.tensor(x) for x in zip(*shapes, strict=True))
    query = torch.randn(int(counts.sum()), WIDTH, generator=generator, requires_grad=True)
    memory = torch.randn(int(lengths.sum()), 2 * WIDTH, generator=generator, requires_grad=True)
    bias = None if softmax else torch.randn(int(lengths.sum()), generator=generator, requires_grad=True)
    layout = target_layout(lengths, counts, buckets)
    if bias is None:
        ours = softmax_target_attention(query, memory, layout, HEADS)
    else:
        ours = silu_target_attention(query, memory, bias, layout, HEADS)
    reference = loop(query, memory, bias, shapes)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    inputs = [x for x in (query, memory, bias) if x is not None]
    weight = torch.randn(ours.shape, generator=generator)
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)  # raises where an input takes no part
    if lengths.sum() > 0:
        expected = torch.autograd.grad((reference * weight).sum(), inputs)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softmax", [False, True])
def test_under_autocast_products_are_of_half_precision_on_a_gpu(softmax: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes it, here: within bfloat16's rounding of the same inputs in float32, and summed in float32."""
    assert target_attention.products_in(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    assert target_attention.products_in(torch.device("cpu"), torch.bfloat16) == torch.float32
    assert target_attention.products_in(torch.device("cpu"), torch.float64) == torch.float64
    generator = torch.Generator().manual_seed(0)
    lengths, counts = torch.tensor([9, 0, 4]), torch.tensor([3, 2, 17])
    half = [torch.randn(rows, width, generator=generator).bfloat16() for rows, width in ((22, WIDTH), (13, 2 * WIDTH))]
    bias, layout = torch.randn(13, generator=generator), target_layout(lengths, counts, 1)
    results = []
    for kind in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(target_attention, "products_in", lambda device, given, kind=kind: kind)
        query, memory = (x.clone().requires_grad_() for x in half)
        if softmax:
            out = softmax_target_attention(query, memory, layout, HEADS)
        else:
            out = silu_target_attention(query, memory, bias, layout, HEADS)
        assert out.dtype == torch.float32
        results.append((out, *torch.autograd.grad(out.square().sum(), [query, memory])))
    for exact, ours in zip(*results, strict=True):
        assert 0 < float((ours.float() - exact.float()).norm()) < 0.03 * float(exact.float().norm())


@given(requests, st.integers(1, 8))
def test_every_candidate_with_a_history_is_in_one_row(shapes: list[tuple[int, int]], buckets: int) -> None:
    lengths, counts = (torch.tensor(x) for x in zip(*shapes, strict=True))
    layout = target_layout(lengths, counts, buckets)
    placed = torch.cat([torch.zeros(0, dtype=torch.int64), *(bucket.targets for bucket in layout.buckets)])
    owner = torch.repeat_interleave(lengths, counts)
    assert sorted(placed.tolist()) == (owner > 0).nonzero().squeeze(1).tolist()
    assert all(bucket.count <= target_attention.TARGETS_PER_ROW for bucket in layout.buckets)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.integers(0, 1000), st.booleans())
def test_split_attention_equals_one_joint_sequence(lengths: list[int], seed: int, timed: bool) -> None:
    """A candidate beside its history's keys and values gives what it gives as the last token of the sequence."""
    torch.manual_seed(seed)
    layer = HSTULayer(WIDTH, HEADS, max_length=12, timed=timed)
    of = torch.tensor(lengths)
    tokens, targets = torch.randn(int(of.sum()), WIDTH), torch.randn(len(lengths), WIDTH)
    ages = torch.cat([torch.zeros(0), *(10 ** torch.linspace(6, 1, n) for n in lengths)])
    sequence = SequenceInputs({}, tokens[:, :0], ages if timed else None, of)
    keys = torch.zeros(len(tokens), dtype=torch.int64)
    _, memory = layer.with_memory(tokens, attention_layout.layout(of, sequence.ages), keys)
    layout = target_layout(of, torch.ones_like(of))
    split = layer.targets(targets, memory, sequence, layout, keys[:0])

    parts, part_ages = [], []
    for place, events in enumerate(tokens.split(lengths)):
        parts += [events, targets[place : place + 1]]
        part_ages += [ages.split(lengths)[place], torch.zeros(1)]
    joint_layout = attention_layout.layout(of + 1, torch.cat(part_ages) if timed else None)
    joint = layer(torch.cat(parts), joint_layout, keys[:0])
    torch.testing.assert_close(split, joint[(of + 1).cumsum(0) - 1], rtol=1e-4, atol=1e-5)
