"""The request-only form equals the impression-level form, for every architecture: logits, loss and every
gradient, also with the random choices of training and with batch statistics.
"""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from roo_ray.config import Model
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.models.check import unused_keys
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.keyed_random import set_epoch
from roo_ray.models.losses import ranking_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import Schema
from tests.models.batches import random_batch, schema, take_requests

SCHEMA = schema()
RANKING = ["dcn", "hstu", "hstu_targets", "cross_attention", "two_tower"]


def variants(kind: str) -> list[dict[str, Any]]:
    """Every switch of the config that changes what a model of a kind computes."""
    heads = {"score": "mlp"} if kind == "two_tower" else {"task_heads": "mmoe", "experts": 3}
    return [
        heads | {"position_feature": "distance", "normalisation": "rms"},
        {"history_pooling": "mean"} if kind == "dcn" else {"layers": 0},
        {"dropout": 0.3, "stochastic_length": 1.2},
        {"normalisation": "batch"},
    ]


def build(of: Schema = SCHEMA, autocast: bool = False, **options: Any) -> RankingModel:
    torch.manual_seed(0)
    sizes = {"dim": 8, "layers": 2, "heads": 2, "user_dim": 8, "cross_rank": 4, "tower": [16, 8]} | options
    model = RankingModel(of, Model(**sizes), autocast=autocast)
    initialise_tables(model, 0)
    return model


def logits_loss_gradients(model: RankingModel, batch: RequestBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(batch)
    loss = ranking_loss(logits, batch.labels, batch.weights, torch.tensor([1.0, 0.5]), batch.weights.sum(0), 1)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} took no part in the forward pass: DDP would hang"
        gradients[name] = parameter.grad.clone()
    return logits.detach(), loss.detach(), gradients


def assert_parity(model: RankingModel, one: RequestBatch, other: RequestBatch, slack: float = 1.0) -> None:
    """``slack``: times float32's tolerance."""
    logits, loss, gradients = logits_loss_gradients(model, one)
    other_logits, other_loss, other_gradients = logits_loss_gradients(model, other)
    torch.testing.assert_close(logits, other_logits, rtol=1e-4 * slack, atol=1e-5 * slack)
    torch.testing.assert_close(loss, other_loss, rtol=1e-5 * slack, atol=1e-6 * slack)
    for name, gradient in gradients.items():
        difference = float((gradient - other_gradients[name]).abs().max())
        assert difference <= slack * (2e-5 * float(gradient.abs().max()) + 1e-6), f"{name}: {difference}"


def wide(values: Tensor) -> Tensor:
    """float32 as float64, for ``RequestBatch.map``."""
    return values.double() if values.dtype == torch.float32 else values


def assert_parity_in_float64(model: RankingModel, one: RequestBatch, other: RequestBatch) -> None:
    """To 1e-11 of the largest: what is left of a difference then is no rounding of float32. Embeddings to 1e-6: what
    TorchRec looks up is float32, and so is its gradient before it is added to the table's."""
    logits, loss, gradients = logits_loss_gradients(model.double(), one.map(wide))
    other_logits, other_loss, other_gradients = logits_loss_gradients(model, other.map(wide))
    assert logits.dtype == loss.dtype == torch.float64
    torch.testing.assert_close(logits, other_logits, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(loss, other_loss, rtol=1e-11, atol=1e-12)
    for name, gradient in gradients.items():
        difference = float((gradient - other_gradients[name]).abs().max())
        relative = 1e-6 if name.startswith("sparse.") else 1e-11
        assert difference <= relative * float(gradient.abs().max()) + 1e-13, f"{name}: {difference}"


def largest_of_module(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Of each parameter, the largest gradient in its module: a bias may cancel to nothing, its weight does not."""
    largest: dict[str, float] = {}
    for name, gradient in gradients.items():
        module = name.rpartition(".")[0]
        largest[module] = max(largest.get(module, 0.0), float(gradient.abs().max()))
    return {name: largest[name.rpartition(".")[0]] for name in gradients}


def assert_gradients_within_bfloat16(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Relative alone: to 25 roundings of 2 ** -8 of the module's largest."""
    largest = largest_of_module(gradients)
    for name, gradient in gradients.items():
        difference = float((gradient - others[name]).abs().max())
        assert difference <= 0.1 * largest[name], f"{name}: {difference} of {largest[name]}"


def assert_parity_within_bfloat16(model: RankingModel, one: RequestBatch, other: RequestBatch) -> None:
    logits, loss, gradients = logits_loss_gradients(model, one)
    other_logits, other_loss, other_gradients = logits_loss_gradients(model, other)
    torch.testing.assert_close(logits, other_logits, rtol=0.02, atol=0.02)
    torch.testing.assert_close(loss, other_loss, rtol=0.01, atol=0.0)
    assert_gradients_within_bfloat16(gradients, other_gradients)


@pytest.mark.parametrize("kind", RANKING)
@settings(max_examples=15, deadline=None)
@given(
    num_impressions=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
)
@example(num_impressions=[4, 4], seed=518, empty=0.3)  # where float32 rounds by more than usual
def test_request_form_equals_impression_form(kind: str, num_impressions: list[int], seed: int, empty: float) -> None:
    batch = random_batch(SCHEMA, num_impressions, seed, empty_history=empty)
    exploded = batch.explode()
    assert exploded.num_requests == sum(num_impressions)
    assert_parity_in_float64(build(kind=kind), batch, exploded)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", RANKING)
def test_parity_in_float32(kind: str, seed: int) -> None:
    batch = random_batch(SCHEMA, [3, 1, 2, 5], seed)
    assert_parity(build(kind=kind), batch, batch.explode())


@pytest.mark.parametrize(
    ("kind", "variant"),
    [(kind, variant) for kind in RANKING for variant in variants(kind)],
    ids=lambda v: next(iter(v)),
)
def test_variants_have_parity(kind: str, variant: dict[str, Any]) -> None:
    assert unused_keys(Model(kind=kind, **variant)) == []  # type: ignore[arg-type]
    batch = random_batch(SCHEMA, [3, 20, 2, 5, 1], 7)  # 20: more candidates than a row of target attention holds
    # batch statistics are divided by and subtracted: float32 cancels
    slack = 10.0 if variant.get("normalisation") == "batch" else 1.0
    assert_parity(build(kind=kind, **variant), batch, batch.explode(), slack)


@pytest.mark.parametrize("kind", RANKING)
def test_parity_within_bfloat16(kind: str) -> None:
    batch = random_batch(SCHEMA, [3, 1, 2, 5], 3)
    model = build(kind=kind, autocast=True)
    plain, logits = build(kind=kind)(batch), model(batch)
    assert logits.dtype == torch.float32
    assert not torch.equal(plain, logits)  # the towers did run in bfloat16
    torch.testing.assert_close(logits, plain, rtol=0.05, atol=0.05)
    assert_parity_within_bfloat16(model, batch, batch.explode())


@pytest.mark.parametrize("kind", RANKING)
def test_parity_would_notice_a_wrong_fan_out(kind: str) -> None:
    batch = random_batch(SCHEMA, [3, 2], 0, empty_history=0.0)
    wrong = RequestBatch(**{**vars(batch), "num_impressions": torch.tensor([2, 3])})
    checks = ((False, assert_parity), (False, assert_parity_in_float64), (True, assert_parity_within_bfloat16))
    for autocast, check in checks:
        with pytest.raises(AssertionError):
            check(build(kind=kind, autocast=autocast), wrong, batch.explode())


@pytest.mark.parametrize("kind", RANKING)
def test_bfloat16_parity_would_notice_any_wrong_gradient(kind: str) -> None:
    """Each gradient alone, wrong by a fifth of its module's largest: there is no allowance to hide in."""
    model = build(kind=kind, autocast=True)
    _, _, gradients = logits_loss_gradients(model, random_batch(SCHEMA, [3, 1, 2, 5], 3))
    largest = largest_of_module(gradients)
    for name, gradient in gradients.items():
        assert largest[name] > 0, f"{name} has no gradient to compare"
        wrong = gradient + 0.2 * largest[name]
        with pytest.raises(AssertionError, match=name):
            assert_gradients_within_bfloat16(gradients, gradients | {name: wrong})


def test_random_choices_depend_on_seed_epoch_and_row() -> None:
    batch = random_batch(SCHEMA, [3, 2, 4], 5, empty_history=0.0)
    for options in ({"dropout": 0.3}, {"stochastic_length": 1.1}):
        model = build(**options)
        draws = {}
        for run in ((0, 0), (0, 1), (1, 0)):
            set_epoch(model, *run)
            draws[run] = model(batch)
            assert torch.equal(model(batch), draws[run])
            alone = torch.cat([model(take_requests(batch, [row])) for row in range(batch.num_requests)])
            torch.testing.assert_close(alone, draws[run], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(draws[0, 0], draws[0, 1])
        assert not torch.allclose(draws[0, 0], draws[1, 0])
        torch.testing.assert_close(model.eval()(batch), build()(batch))


@pytest.mark.parametrize("kind", RANKING)
def test_deterministic_algorithms_give_the_same_bits_twice(kind: str) -> None:
    batch = random_batch(SCHEMA, [3, 2, 4], 5)
    torch.use_deterministic_algorithms(True)
    try:
        (logits, _, gradients), (again, _, gradients_again) = (
            logits_loss_gradients(build(kind=kind), batch) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(logits, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


@pytest.mark.parametrize("normalisation", ["layer", "batch"])
@pytest.mark.parametrize("kind", RANKING)
def test_dummy_request_adds_nothing(kind: str, normalisation: str) -> None:
    model = build(kind=kind, normalisation=normalisation)
    batch = random_batch(SCHEMA, [3, 1, 2], 1, known=1.0)
    logits, loss, gradients = logits_loss_gradients(model, batch)
    padded_logits, padded_loss, padded = logits_loss_gradients(model, RequestBatch.concat([batch, dummy_batch(SCHEMA)]))
    torch.testing.assert_close(padded_logits[:-1], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RANKING)
def test_dummy_request_alone_has_zero_gradients(kind: str) -> None:
    _, loss, gradients = logits_loss_gradients(build(kind=kind), dummy_batch(SCHEMA))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
