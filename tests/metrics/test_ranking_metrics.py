"""Metrics against scikit-learn and brute force, and the same for any cut into batches and ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from roo_ray.errors import DataError, RooError
from roo_ray.metrics.auc import exact_auc
from roo_ray.metrics.collection import RankingMetrics
from tests.metrics.reference import pair_auc, pair_gauc, random_batch
from tests.processes import start_ranks

TASKS = ["click", "like"]


def measured(*batches: tuple[torch.Tensor, ...]) -> RankingMetrics:
    metrics = RankingMetrics(TASKS)
    for batch in batches:
        metrics.update(*batch)
    return metrics


def split_by_requests(batch: tuple[torch.Tensor, ...], cut: int) -> list[tuple[torch.Tensor, ...]]:
    """The batch cut before request ``cut``."""
    logits, labels, weights, counts = batch
    row = int(counts[:cut].sum())
    return [
        (logits[:row], labels[:row], weights[:row], counts[:cut]),
        (logits[row:], labels[row:], weights[row:], counts[cut:]),
    ]


def test_against_scikit_learn() -> None:
    batch = random_batch(1, requests=800)
    logits, labels, weights, _ = (part.numpy() for part in batch)
    values = measured(batch).compute()
    for k, task in enumerate(TASKS):
        seen = weights[:, k] > 0
        x, y = logits[seen, k].astype(np.float64), labels[seen, k].astype(np.float64)
        p = 1 / (1 + np.exp(-x))
        rate = y.mean()
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        assert values[f"{task}/log_loss"] == pytest.approx(log_loss(y, p), rel=1e-9)
        assert values[f"{task}/ne"] == pytest.approx(log_loss(y, p) / entropy, rel=1e-9)
        assert values[f"{task}/auc"] == pytest.approx(roc_auc_score(y, x), abs=1e-4)
        assert values[f"{task}/calibration"] == pytest.approx(p.sum() / y.sum(), rel=1e-9)
        assert values[f"{task}/base_rate"] == pytest.approx(rate)
        assert values[f"{task}/impressions"] == seen.sum()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), requests=st.integers(1, 12), levels=st.sampled_from([2, 3, 1000]))
def test_auc_and_gauc_equal_pair_counting(seed: int, requests: int, levels: int) -> None:
    batch = random_batch(seed, requests, levels=levels)
    logits, labels, weights, counts = batch
    metrics = measured(batch)
    values = metrics.compute()
    for k, task in enumerate(TASKS):
        seen = weights[:, k] > 0
        brute = pair_auc(logits[seen, k].tolist(), labels[seen, k].int().tolist())
        assert exact_auc(logits[seen, k], labels[seen, k]) == pytest.approx(brute, nan_ok=True)
        assert values[f"{task}/auc"] == pytest.approx(brute, nan_ok=True)  # distinct logits here are 1 apart
        expected, used, skipped = pair_gauc(
            logits[:, k].numpy(), labels[:, k].numpy(), weights[:, k].numpy(), counts.tolist()
        )
        assert values[f"{task}/gauc"] == pytest.approx(expected, nan_ok=True)
        assert (values[f"{task}/gauc_requests"], values[f"{task}/gauc_skipped"]) == (used, skipped)


def take_requests(batch: tuple[torch.Tensor, ...], requests: np.ndarray) -> tuple[torch.Tensor, ...]:
    """The batch of the given requests, in that order."""
    *values, counts = batch
    chunks = [part.split(counts.tolist()) for part in values]
    taken = [torch.cat([c[r] for r in requests] or [values[0][:0]]) for c in chunks]
    return (*taken, counts[torch.as_tensor(requests)])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    requests=st.integers(1, 20),
    batches=st.integers(1, 5),
    ranks=st.integers(1, 4),
    levels=st.sampled_from([2, None]),
)
def test_any_partition_into_batches_and_ranks_gives_the_same(
    seed: int, requests: int, batches: int, ranks: int, levels: int | None
) -> None:
    batch = random_batch(seed, requests, levels=levels)
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, ranks * batches, requests)  # some own nothing: empty batches and ranks
    states = []
    for rank in range(ranks):
        parts = [np.flatnonzero(owner == rank * batches + b) for b in range(batches)]
        states.append(measured(*(take_requests(batch, rng.permutation(p).astype(int)) for p in parts)).state_tensor())
    merged = RankingMetrics(TASKS)
    merged.load_state_tensor(torch.stack(states).sum(0))
    assert merged.compute() == pytest.approx(measured(batch).compute(), rel=1e-12, nan_ok=True)


def test_states_add() -> None:
    first, second = split_by_requests(random_batch(7, 30), 11)
    added = RankingMetrics(TASKS)
    added.load_state_tensor(measured(first).state_tensor() + measured(second).state_tensor())
    assert added.compute() == pytest.approx(measured(first, second).compute(), rel=1e-12)
    with pytest.raises(RooError, match=r"not one of the tasks \['click'\]"):
        RankingMetrics(["click"]).load_state_tensor(added.state_tensor())


def test_window_and_lifetime() -> None:
    first, second = split_by_requests(random_batch(7, 30), 11)
    window, lifetime = RankingMetrics(TASKS), RankingMetrics(TASKS)
    for part in (first, second):
        window.update(*part)
        assert window.compute() == pytest.approx(measured(part).compute(), rel=1e-12)
        lifetime.add(window)
        window.reset()
    assert not window.state_tensor().any()
    assert lifetime.compute() == pytest.approx(measured(first, second).compute(), rel=1e-12)


def test_oracle_probabilities_give_the_bayes_figures() -> None:
    logits, labels, weights, counts = random_batch(9, 200)
    probabilities = torch.sigmoid(logits)
    probabilities[::3, 1] = torch.nan
    probabilities[1, 0], labels[1, 0], weights[1, 0] = 1.0, 1.0, 1.0  # certain, and right: costs nothing
    oracle = RankingMetrics(TASKS)
    oracle.update_probabilities(probabilities, labels, weights, counts)
    values = oracle.compute()
    for k, task in enumerate(TASKS):
        seen = (weights[:, k] > 0) & ~probabilities[:, k].isnan()
        p, y = probabilities[seen, k].double().numpy(), labels[seen, k].numpy()
        rate = float(y.astype(np.float64).mean())
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        assert values[f"{task}/impressions"] == seen.sum()
        assert values[f"{task}/ne"] == pytest.approx(log_loss(y, p) / entropy, rel=1e-6)
        assert values[f"{task}/auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-4)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = split_by_requests(random_batch(7, 30), 11)[rank]
    merged = measured(part).merge().compute()
    torch.save(merged, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    start_ranks(_rank, (str(tmp_path),), 2)
    expected = measured(random_batch(7, 30)).compute()
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-12)


def test_unknown_and_dummy_rows_change_nothing() -> None:
    logits, labels, weights, counts = random_batch(5, 20)
    noise = torch.where(weights > 0, logits, torch.nan)
    dummy = torch.zeros(1, 2)
    with_dummy = (
        torch.cat([noise, dummy]),
        torch.cat([labels, dummy]),
        torch.cat([weights, dummy]),
        torch.cat([counts, torch.ones(1, dtype=torch.int64)]),
    )
    assert measured(with_dummy).compute() == measured((logits, labels, weights, counts)).compute()


def test_undefined_figures_are_nan() -> None:
    empty = RankingMetrics(TASKS).compute()
    assert math.isnan(empty["click/ne"])
    assert math.isnan(empty["click/auc"])
    assert empty["click/impressions"] == 0
    ones = torch.ones(3, 2)
    one_class = measured((torch.randn(3, 2), ones, ones, torch.tensor([3]))).compute()
    assert math.isnan(one_class["click/ne"])
    assert math.isnan(one_class["click/gauc"])
    assert one_class["click/gauc_skipped"] == 1
    assert one_class["click/log_loss"] > 0


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, 1e4], [-1e4, -math.inf], [-1e4, -1e4], [1e4, math.inf]])
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    values = measured((logits, labels, torch.ones(4, 2), torch.tensor([4]))).compute()
    assert values["click/log_loss"] == pytest.approx(5000)
    assert values["click/auc"] == pytest.approx(0.5)
    assert values["like/log_loss"] == pytest.approx(0)
    assert values["like/auc"] == 1


def test_a_wrong_infinite_logit_counts_1e30() -> None:
    logits = torch.tensor([[math.inf, 0.0], [-1.0, 0.0]])
    values = measured((logits, torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([2]))).compute()
    assert values["click/log_loss"] == pytest.approx(5e29)
    assert values["like/log_loss"] == pytest.approx(math.log(2))


def test_low_precision_and_gradients_are_taken() -> None:
    logits, labels, weights, counts = random_batch(2, 50)
    halves = logits.bfloat16().requires_grad_()
    values = measured((halves, labels, weights, counts)).compute()
    assert values == measured((halves.detach().float(), labels, weights, counts)).compute()


def test_wrong_input_is_refused_and_not_counted() -> None:
    metrics = RankingMetrics(TASKS)
    good = (torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([1]))
    with pytest.raises(RooError, match="task 'like': 1 of 1 logits"):
        metrics.update(torch.tensor([[0.0, math.nan]]), *good[1:])
    for label in (2.0, 0.5, -1.0, math.nan):
        with pytest.raises(DataError, match="task 'click': 1 of 1 labels"):
            metrics.update(good[0], torch.tensor([[label, 0.0]]), *good[2:])
    with pytest.raises(ValueError, match="num_impressions sums to 3, but there are 1 logits"):
        metrics.update(*good[:3], torch.tensor([3]))
    with pytest.raises(ValueError, match=r"shape \(B_NRO, 2\), got \(1,\)"):
        metrics.update(torch.zeros(1), *good[1:])
    with pytest.raises(RooError, match="task 'click': 1 of 1 logits"):
        metrics.update_probabilities(torch.tensor([[1.5, 0.5]]), *good[1:])
    assert not metrics.state_tensor().any()


def test_gauc_skips_requests_that_are_split() -> None:
    """Two halves of a request have other AUCs than the whole: they count in all metrics but GAUC."""
    draw = torch.Generator().manual_seed(3)
    counts = torch.tensor([4, 3, 3, 5])  # the second and the third are one request
    logits = torch.randn(15, 1, generator=draw)
    labels = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0])[:, None]
    known = torch.ones(15, 1)
    whole = torch.cat([torch.arange(4), torch.arange(10, 15)])
    with_parts, without = RankingMetrics(["a"]), RankingMetrics(["a"])
    with_parts.update(logits, labels, known, counts, torch.tensor([0, 1, 2, 0]))
    without.update(logits[whole], labels[whole], known[whole], counts[[0, 3]])
    got, expected = with_parts.compute(), without.compute()
    assert got["a/gauc"] == pytest.approx(expected["a/gauc"])
    assert (got["a/gauc_requests"], got["a/gauc_skipped"]) == (2, 1)
    assert got["a/impressions"] == 15
