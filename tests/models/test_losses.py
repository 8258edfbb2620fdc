"""The ranking loss against a loop, and over ranks against one rank."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.models.losses import ranking_loss, task_loss_sums


def draw(rows: int, tasks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, tasks, generator=generator)
    labels = (torch.rand(rows, tasks, generator=generator) < 0.4).float()
    weights = (torch.rand(rows, tasks, generator=generator) < 0.7).float()
    return logits.requires_grad_(), labels, weights


def brute_force(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, task_weights: list[float]) -> float:
    total = 0.0
    for k, task_weight in enumerate(task_weights):
        known = float(weights[:, k].sum())
        for i in range(logits.shape[0]):
            if known and weights[i, k]:
                p = 1 / (1 + math.exp(-float(logits[i, k])))
                loss = -math.log(p if labels[i, k] else 1 - p)
                total += task_weight * float(weights[i, k]) * loss / known
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 1000))
def test_equals_loop(rows: int, tasks: int, seed: int) -> None:
    logits, labels, weights = draw(rows, tasks, seed)
    task_weights = [1.0, 0.25, 2.0][:tasks]
    loss = ranking_loss(logits, labels, weights, torch.tensor(task_weights), weights.sum(0), 1)
    assert math.isclose(float(loss), brute_force(logits, labels, weights, task_weights), rel_tol=1e-4, abs_tol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 1000))
def test_mean_over_ranks_is_the_loss_of_the_global_batch(sizes: list[int], seed: int) -> None:
    logits, labels, weights = draw(sum(sizes), 2, seed)
    task_weights, everywhere = torch.tensor([1.0, 0.5]), weights.sum(0)
    whole = ranking_loss(logits, labels, weights, task_weights, everywhere, 1)
    parts = [
        ranking_loss(*part, task_weights, everywhere, len(sizes))
        for part in zip(*(x.split(sizes) for x in (logits, labels, weights)), strict=True)
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole, rtol=1e-5, atol=1e-6)
    (one,), (other,) = torch.autograd.grad(whole, [logits]), torch.autograd.grad(mean, [logits])
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_task_that_is_known_nowhere_contributes_nothing() -> None:
    logits, labels, weights = draw(5, 2, 0)
    weights[:, 1] = 0
    loss = ranking_loss(logits, labels, weights, torch.ones(2), weights.sum(0), 1)
    only = ranking_loss(logits[:, :1], labels[:, :1], weights[:, :1], torch.ones(1), weights[:, :1].sum(0), 1)
    assert torch.equal(loss, only)
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert gradient[:, 1].abs().max() == 0
    assert torch.isfinite(gradient).all()


def test_sums_take_the_weights() -> None:
    logits, labels, weights = draw(6, 2, 1)
    torch.testing.assert_close(task_loss_sums(logits, labels, 2 * weights), 2 * task_loss_sums(logits, labels, weights))
