"""The benchmarks' FLOPs: of attention's pairs by formula, of no padding, whatever computes attention."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model_flops import step_flops
from roo_ray.config import Model
from roo_ray.models import attention
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.contract import ModelInputs
from roo_ray.models.cost import example_inputs
from roo_ray.models.ranking import make_towers
from tests.models.test_cost import ONE_SEQUENCE

DIM, LAYERS = 8, 2


def joined(parts: list[Any]) -> Any:
    """One batch of several: tensors one after the other, field by field."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], dict):
        return {name: joined([part[name] for part in parts]) for name in parts[0]}
    if parts[0] is None:
        return None
    return type(parts[0])(**{f.name: joined([getattr(part, f.name) for part in parts]) for f in fields(parts[0])})


def batch_of(requests: list[tuple[int, int]]) -> ModelInputs:
    """Requests of (events, impressions)."""
    inputs: ModelInputs = joined([example_inputs(ONE_SEQUENCE, {"history": t}, n) for t, n in requests])
    return inputs


def step_of(kind: str, requests: list[tuple[int, int]]) -> Callable[[], None]:
    """Forward and backward of an architecture's towers."""
    settings = Model(kind=kind, dim=DIM, layers=LAYERS, heads=2, user_dim=DIM, cross_rank=4, tower=[16, 8])  # type: ignore[arg-type]
    towers, inputs = make_towers(ONE_SEQUENCE, settings), batch_of(requests)
    return lambda: towers(inputs).sum().backward()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_differs_from_torchs_count_by_the_scores_after_a_query(kind: str) -> None:
    """One request has no padding: torch counts all squares of a history's scores, and what is needed is its half."""
    events = 11
    counter = FlopCounterMode(display=False)
    with counter:
        step_of(kind, [(events, 5)])()
    layers = 0 if kind == "dcn" else LAYERS
    skipped = layers * 6 * 2 * DIM * (events**2 - events * (events + 1) // 2)
    assert step_flops(step_of(kind, [(events, 5)])) == counter.get_total_flops() - skipped


@pytest.mark.parametrize("kind", ["hstu", "hstu_targets", "cross_attention", "two_tower"])
def test_padding_does_not_count(kind: str) -> None:
    """More lengths and numbers of impressions than there are buckets."""
    requests = [(t, 1 + 7 * t % 20) for t in range(13)]
    together = step_flops(step_of(kind, requests))
    assert together == sum(step_flops(step_of(kind, [request])) for request in requests)


def test_a_kernel_that_torch_cannot_see_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where attention is one foreign kernel."""

    def foreign(qkv: torch.Tensor, *_: object) -> torch.Tensor:
        return qkv[:, :DIM]

    expected = step_flops(step_of("hstu", [(11, 2)]))
    monkeypatch.setattr(attention, "attention", foreign)
    assert step_flops(step_of("hstu", [(11, 2)])) == expected
    assert attention.attention is foreign  # put back
