"""Batch statistics over impressions, without dummies: against torch's BatchNorm on the exploded rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from roo_ray.models.normalise import GlobalBatchNorm


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8).filter(lambda n: sum(n) > 1), st.integers(0, 1000))
def test_weighted_rows_equal_batch_norm_of_repeated_rows(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = GlobalBatchNorm(3), nn.BatchNorm1d(3)
    weights = torch.tensor(counts)
    rows = torch.randn(len(counts), 3, requires_grad=True)
    out = ours(rows, weights.float())
    repeated = theirs(rows.repeat_interleave(weights, dim=0))
    torch.testing.assert_close(out.repeat_interleave(weights, dim=0), repeated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_variance, theirs.running_var, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(repeated.shape)
    (one,) = torch.autograd.grad((out.repeat_interleave(weights, dim=0) * upstream).sum(), [rows], retain_graph=True)
    (other,) = torch.autograd.grad((repeated * upstream).sum(), [rows])
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_evaluation_takes_the_running_statistics() -> None:
    norm = GlobalBatchNorm(2)
    norm(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.ones(2))
    row = torch.tensor([[5.0, 1.0]])
    expected = (row - norm.running_mean) / torch.sqrt(norm.running_variance + norm.eps)
    torch.testing.assert_close(norm.eval()(row, torch.ones(1)), expected)
    assert torch.equal(norm.running_mean, torch.tensor([0.2, 0.4]))


def test_a_batch_of_dummies_gives_numbers_and_moves_nothing() -> None:
    norm = GlobalBatchNorm(2)
    norm(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.ones(2))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    assert torch.isfinite(norm(torch.randn(1, 2), torch.zeros(1))).all()
    for name, value in norm.named_buffers():
        assert torch.equal(value, before[name]), name


def test_one_impression_moves_the_mean_alone() -> None:
    """It has no variance of its own."""
    norm = GlobalBatchNorm(2)
    norm(torch.tensor([[1.0, 2.0]]), torch.ones(1))
    assert torch.equal(norm.running_mean, torch.tensor([0.1, 0.2]))
    assert torch.equal(norm.running_variance, torch.ones(2))
