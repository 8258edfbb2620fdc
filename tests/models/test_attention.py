"""HSTU attention: the reference against a double loop, the bucketed path against the reference."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.models import attention, attention_layout, bucketed_attention

HEADS, WIDTH, REACH, NORMALISER = 2, 6, 9, 12


def case(
    lengths: list[int], seed: int, timed: bool, width: int = WIDTH
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """([qkv, position, time?] that require grad, lengths, ages)."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    inputs = [
        torch.randn(total, 3 * width, generator=generator),
        torch.randn(REACH, generator=generator),
        *([torch.randn(attention_layout.TIME_BUCKETS, generator=generator)] if timed else []),
    ]
    ages = [(10 ** (8 * torch.rand(n, generator=generator))).sort(descending=True).values for n in lengths]
    return [x.requires_grad_() for x in inputs], torch.tensor(lengths), torch.cat([torch.zeros(0), *ages])


def double_loop(inputs: list[torch.Tensor], lengths: list[int], ages: torch.Tensor) -> torch.Tensor:
    qkv, position = inputs[:2]
    time = inputs[2] if len(inputs) == 3 else None
    depth = WIDTH // HEADS
    rows = []
    start = 0
    for length in lengths:
        for i in range(length):
            q, _, _ = qkv[start + i].view(3, HEADS, depth)
            out = torch.zeros(HEADS, depth)
            for j in range(i + 1):
                _, k, v = qkv[start + j].view(3, HEADS, depth)
                score = (q * k).sum(1) + position[min(i - j, REACH - 1)]
                if time is not None:
                    gap = (ages[start + j] - ages[start + i]).reshape(1)
                    score = score + time[int(attention_layout.time_buckets(gap))]
                out = out + (score * torch.sigmoid(score)).unsqueeze(1) * v
            rows.append(out.flatten() / NORMALISER)
        start += length
    return torch.stack(rows) if rows else qkv.new_zeros(0, WIDTH)


lengths_lists = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(lengths_lists, st.integers(0, 1000), st.booleans(), st.integers(1, 4))
def test_reference_equals_double_loop(lengths: list[int], seed: int, timed: bool, buckets: int) -> None:
    inputs, of, ages = case(lengths, seed, timed)
    layout = attention_layout.layout(of, ages if timed else None, buckets)
    time = inputs[2] if timed else None
    ours = attention.padded_attention(inputs[0], layout, HEADS, NORMALISER, inputs[1], time)
    torch.testing.assert_close(ours, double_loop(inputs, lengths, ages), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths_lists,
    st.integers(0, 1000),
    st.sampled_from(["times", "none", "ages alone", "bias alone"]),
    st.integers(1, 8),
    st.sampled_from([2, 5, 80]),
    st.booleans(),
)
def test_bucketed_equals_reference(
    lengths: list[int], seed: int, times: str, buckets: int, block: int, keeps: bool
) -> None:
    inputs, of, ages = case(lengths, seed, times in ("times", "bias alone"))
    time = inputs[2] if len(inputs) == 3 else None
    weight = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    results = []
    for function, count in ((attention.padded_attention, 1), (bucketed_attention.bucketed_attention, buckets)):
        layout = attention_layout.layout(of, ages if times in ("times", "ages alone") else None, count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_layout, "QUERIES_PER_BLOCK", block)  # up to 6 blocks of the longest
            patch.setattr(bucketed_attention, "KEPT_SCORES", 1 << 20 if keeps else -1)
            out = function(inputs[0], layout, HEADS, NORMALISER, inputs[1], time)
            loss = (out * weight).sum()
            # raises for an input without a gradient, which would leave DDP's ranks waiting
            gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
            for gradient, again in zip(gradients, torch.autograd.grad(loss, inputs), strict=True):
                assert torch.equal(gradient, again)  # backward changes nothing that is kept for it
            results.append((out, *gradients))
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 1000), st.sampled_from([1.0, 100.0, 3000.0])
)
def test_the_future_changes_nothing_however_large(lengths: list[int], seed: int, scale: float) -> None:
    """Products of large queries and keys are far above any finite mask that is not far below them."""
    inputs, of, ages = case(lengths, seed, True)
    outs, gradients = [], []
    for changed in (False, True):
        qkv = scale * inputs[0].detach()
        newest = of.cumsum(0) - 1
        if changed:
            qkv[newest] = -qkv[newest]
        qkv.requires_grad_()
        out = bucketed_attention.bucketed_attention(
            qkv, attention_layout.layout(of, ages), HEADS, NORMALISER, inputs[1], inputs[2]
        )
        before = torch.ones(len(out), dtype=torch.bool).index_fill_(0, newest, False)
        outs.append(out[before])
        gradients.append(torch.autograd.grad(out[before].sum(), qkv)[0])
        assert bool((gradients[-1][newest] == 0).all())
    assert torch.equal(outs[0], outs[1])


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(1, 9))
def test_every_token_has_one_slot(lengths: list[int], buckets: int) -> None:
    layout = attention_layout.layout(torch.tensor(lengths), None, buckets)
    tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *(bucket.tokens for bucket in layout.buckets)])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert len(layout.buckets) <= buckets
    for bucket in layout.buckets:
        assert len(set(bucket.slots.tolist())) == len(bucket.tokens)
        assert bucket.length == int((bucket.slots % bucket.length).max()) + 1  # padded no further than needed


def test_time_buckets_are_half_octaves() -> None:
    seconds = torch.tensor([-5.0, 0.0, 1.0, 1.49, 1.5, 2.0, 3.0, 4.0, 1024.0, 2.0**31, 3e38])
    assert attention_layout.time_buckets(seconds).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 20, 62, 63]


def test_dispatcher_takes_the_bucketed_path_on_cpu() -> None:
    inputs, of, ages = case([3, 1], 0, True)
    out = attention.attention(inputs[0], attention_layout.layout(of, ages), HEADS, NORMALISER, inputs[1], inputs[2])
    assert "BucketedAttention" in type(out.grad_fn).__name__


@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_a_broken_sequence_breaks_no_other(lengths: list[int], buckets: int) -> None:
    """Sequences share buckets, and padding is never a token of another: NaN in the first stays there."""
    inputs, of, ages = case(lengths, 1, True)
    out, gradients = [], []
    for broken in (False, True):
        qkv = inputs[0].detach().clone()
        if broken:
            qkv[: lengths[0]] = float("nan")
        qkv.requires_grad_()
        found = bucketed_attention.bucketed_attention(
            qkv, attention_layout.layout(of, ages, buckets), HEADS, NORMALISER, inputs[1], inputs[2]
        )
        out.append(found[lengths[0] :].detach())
        gradients.append(torch.autograd.grad(found[lengths[0] :].sum(), qkv)[0][lengths[0] :])
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def on_meta(layout: attention_layout.Layout) -> attention_layout.Layout:
    """For tokens on the meta device, which takes a GPU's way."""
    moved = [replace(part, tokens=part.tokens.to("meta"), slots=part.slots.to("meta")) for part in layout.buckets]
    return replace(layout, buckets=tuple(moved))


def asked_anew() -> Iterator[None]:
    """What was found out and warned of in this process is so again, before and after."""
    for asked in (attention._has_triton, attention._warn_once):
        asked.cache_clear()
    yield
    for asked in (attention._has_triton, attention._warn_once):
        asked.cache_clear()


anew = pytest.fixture(asked_anew)


def test_triton_without_a_c_compiler_is_left_for_the_reference(
    anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton would raise at the first step."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (qkv, position), of, _ = case([3, 1, 4], 0, False)
    layout = on_meta(attention_layout.layout(of, None, 1))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            out = attention.attention(qkv.to("meta"), layout, HEADS, NORMALISER, position.to("meta"), None)
            assert out.shape == (8, WIDTH)
    (warning,) = warned
    assert "attention is the padded reference" in str(warning.message)
    assert "no C compiler" in str(warning.message)
    for name, found in (("gcc", None), ("cc", "no C compiler")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).touch()
        (tmp_path / "bin" / name).chmod(0o755)
        problem = attention.kernel_problem()
        assert (problem is None) if found is None else found in str(problem)
        (tmp_path / "bin" / name).unlink()
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert "CC=no-such-compiler" in str(attention.kernel_problem())


def test_small_batches_have_few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket's launches take as long as a good deal of padding; where there is much to compute, buckets pad less."""
    monkeypatch.setattr(attention_layout, "LAUNCHES", 6_000)
    few = attention_layout.layout(torch.arange(1, 17), None)
    assert [(bucket.rows, bucket.length) for bucket in few.buckets] == [(16, 16)]
    lengths = torch.arange(640) % 200 + 1
    many = attention_layout.layout(lengths, None)
    assert 8 < len(many.buckets) <= attention_layout.MOST_BUCKETS
    assert sum(bucket.rows for bucket in many.buckets) == 640
    assert sum(bucket.tokens.numel() for bucket in many.buckets) == int(lengths.sum())


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12), launches=st.sampled_from([0, 600, 6_000]))
def test_no_other_cuts_cost_less(lengths: list[int], launches: int) -> None:
    """Of all ways to cut few rows, each of which may begin a bucket."""
    lengths.sort(reverse=True)

    def cost(cuts: Iterable[tuple[int, int]]) -> int:
        total = 0
        for first, last in cuts:
            blocks = attention_layout.query_blocks(lengths[first])
            pairs = sum((stop - start) * stop for start, stop in blocks)
            total += launches * (1 + len(blocks)) + (last - first) * (attention_layout.SLOT * lengths[first] + pairs)
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_layout, "LAUNCHES", launches)
        patch.setattr(attention_layout, "MOST_BUCKETS", 10_000)
        cuts = attention_layout.cheapest_cuts(torch.tensor(lengths))
    assert [first for first, _ in cuts] == [0, *(last for _, last in cuts[:-1])]
    assert cuts[-1][1] == len(lengths)
    inner = range(1, len(lengths))
    every = chain.from_iterable(combinations(inner, count) for count in range(len(lengths)))
    assert cost(cuts) == min(cost(pairwise([0, *places, len(lengths)])) for places in every)
