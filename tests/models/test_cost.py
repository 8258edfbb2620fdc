"""The published cost polynomial gives what torch counts, for every architecture."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from roo_ray.config import Model
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.cost import TERMS, cost_coefficients, example_inputs
from roo_ray.models.ranking import make_towers
from roo_ray.schema import parse_schema
from tests.models.batches import SCHEMA, schema

ONE_SEQUENCE = parse_schema(
    "\n".join(line for line in SCHEMA.splitlines() if not any(x in line for x in ("search", "max_length: 5"))).replace(
        "  - name: searches\n    level: request\n    kind: sequence\n", ""
    )
)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_polynomial_equals_the_counts(kind: str) -> None:
    settings = Model(kind=kind, dim=8, layers=2, heads=2, user_dim=8, cross_rank=4, tower=[16, 8])  # type: ignore[arg-type]
    cost = cost_coefficients(ONE_SEQUENCE, settings)
    assert tuple(cost) == TERMS
    towers = make_towers(ONE_SEQUENCE, settings).eval()
    for t, n in ((0, 1), (1, 1), (5, 7), (12, 3), (11, 16)):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            towers(example_inputs(ONE_SEQUENCE, {"history": t}, n))
        predicted = cost["1"] + cost["t"] * t + cost["t2"] * t * t + cost["n"] * n + cost["nt"] * n * t
        assert predicted == counter.get_total_flops(), (t, n)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_long_histories_and_large_requests_cost_what_is_counted(kind: str) -> None:
    """Past a block of queries (80) and a row of targets (16), where attention skips what it need not compute."""
    long = parse_schema(ONE_SEQUENCE.to_yaml().replace("max_length: 12", "max_length: 400"))
    settings = Model(kind=kind, dim=64, layers=2, heads=2, user_dim=64)  # type: ignore[arg-type]
    cost = cost_coefficients(long, settings)
    towers = make_towers(long, settings).eval()
    for t, n in ((20, 5), (80, 10), (81, 17), (150, 17), (200, 40), (300, 10), (400, 20)):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            towers(example_inputs(long, {"history": t}, n))
        predicted = cost["1"] + cost["t"] * t + cost["t2"] * t * t + cost["n"] * n + cost["nt"] * n * t
        assert abs(predicted / counter.get_total_flops() - 1) < 0.1, (t, n)


def test_long_histories_are_predicted_best_where_they_cost_most() -> None:
    """As docs/models.md says of the architecture whose figures are the worst."""
    long = parse_schema(ONE_SEQUENCE.to_yaml().replace("max_length: 12", "max_length: 1000"))
    settings = Model(kind="two_tower", dim=64, layers=2, heads=2, user_dim=64)
    cost, towers = cost_coefficients(long, settings), make_towers(long, settings).eval()
    for t, most in ((10, 0.12), (20, 0.12), (250, 0.0105), (375, 0.0105), (1000, 0.0105)):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            towers(example_inputs(long, {"history": t}, 10))
        predicted = cost["1"] + cost["t"] * t + cost["t2"] * t * t + cost["n"] * 10 + cost["nt"] * 10 * t
        assert abs(predicted / counter.get_total_flops() - 1) < most, t


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_terms_say_where_the_work_is(kind: str) -> None:
    state = torch.random.get_rng_state()
    cost = cost_coefficients(schema(), Model(kind=kind, dim=8, heads=2, user_dim=8))  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)  # asking does not change a run's initial weights
    assert cost["1"] > 0
    assert cost["n"] > 0
    assert (cost["t2"] > 0) == (kind != "dcn")
    assert (cost["nt"] > 0) == (kind in ("hstu_targets", "cross_attention"))


def test_attention_counts_both_products() -> None:
    """Per pair of events and HSTU layer: query times key and score times value, 2 * dim operations each."""
    cost = cost_coefficients(ONE_SEQUENCE, Model(kind="hstu", dim=8, layers=3, heads=2, user_dim=8))
    assert cost["t2"] == 3 * 2 * 2 * 8
