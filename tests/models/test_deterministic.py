"""What ``training.deterministic`` needs: operations that a GPU has a deterministic form of, and cuBLAS told in time."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from roo_ray.config import Training
from roo_ray.metrics.collection import RankingMetrics
from roo_ray.models import attention, attention_layout
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.item_index import RetrievalEvaluation
from roo_ray.models.objective import logits_of, retrieval_towers, training_loss
from roo_ray.training.build import choose_algorithms
from tests.models.batches import random_batch, schema
from tests.models.test_parity import build

ALWAYS = {
    "bincount",
    "histc",
    "kthvalue",
    "put_",
    "median",
    "nanmedian",
    "cumprod",
    "logcumsumexp",
    "adaptive_avg_pool2d",
}
ONLY_FLOATS = {"cumsum", "cumsum_"}


class RefuseWhatCudaCannot(TorchDispatchMode):
    """Fails where torch documents no deterministic form on CUDA, though the tensors are on CPU here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        counts = (
            name == "bincount" and not (len(args) > 1 and args[1] is not None) and not (kwargs or {}).get("weights")
        )
        if (name in ALWAYS and not counts) or (name in ONLY_FLOATS and args[0].is_floating_point()):
            raise AssertionError(f"{func} has no deterministic form on a GPU")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_step_and_an_evaluation_use_what_a_gpu_has(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with the attention that a GPU takes in this mode, the metrics of both, and recall."""
    monkeypatch.setattr(attention, "bucketed_attention", attention.padded_attention)  # the other is of the CPU
    model = build(kind=kind, dropout=0.1, stochastic_length=1.5)
    batch = random_batch(schema(), [3, 1, 4, 2], 2)
    weights = torch.ones(2)
    with RefuseWhatCudaCannot():
        outputs, loss = training_loss(model, batch, weights, batch.weights.sum(0), 1)
        loss.backward()
        metrics = RankingMetrics(["click", "buy"])
        logits = logits_of(model, outputs.detach(), 2)
        metrics.update(logits, batch.labels, batch.weights, batch.num_impressions, batch.split)
        towers = retrieval_towers(model)
        if towers is not None:
            recall = RetrievalEvaluation(towers)
            recall.update(outputs, batch)
            recall.result()


def test_cuts_are_where_the_cost_is_even() -> None:
    generator = torch.Generator().manual_seed(0)
    for parts in (1, 2, 8):
        costs = torch.randint(1, 400, (100,), generator=generator).sort(descending=True).values
        cuts = attention_layout.even_cuts(costs, parts)
        assert [start for start, _ in cuts[1:]] == [stop for _, stop in cuts[:-1]]
        assert (cuts[0][0], cuts[-1][1]) == (0, 100)
        sums = [int(costs[start:stop].sum()) for start, stop in cuts]
        assert len(cuts) == parts
        assert max(sums) - min(sums) <= 2 * int(costs.max())


def test_cublas_is_told_before_a_worker_touches_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        choose_algorithms(Training())
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        choose_algorithms(Training(deterministic=True))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # who set it knows
        choose_algorithms(Training(deterministic=True))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
