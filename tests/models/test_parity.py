"""The request-only form equals the impression-level form: logits, loss and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roo_ray.config import Model
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.losses import ranking_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import Schema
from tests.models.batches import random_batch, schema

SCHEMA = schema()


def build(of: Schema = SCHEMA, **options: int) -> RankingModel:
    torch.manual_seed(0)
    sizes = {"dim": 8, "layers": 2, "heads": 2, "user_dim": 8, "cross_rank": 4} | options
    model = RankingModel(of, Model(**sizes, tower=[16, 8]))  # type: ignore[arg-type]
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


def assert_parity(model: RankingModel, one: RequestBatch, other: RequestBatch) -> None:
    logits, loss, gradients = logits_loss_gradients(model, one)
    other_logits, other_loss, other_gradients = logits_loss_gradients(model, other)
    torch.testing.assert_close(logits, other_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        difference = float((gradient - other_gradients[name]).abs().max())
        assert difference <= 2e-5 * float(gradient.abs().max()) + 1e-6, f"{name}: {difference}"


@settings(max_examples=12, deadline=None)
@given(
    num_impressions=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
    layers=st.integers(0, 2),
)
def test_request_form_equals_impression_form(num_impressions: list[int], seed: int, empty: float, layers: int) -> None:
    batch = random_batch(SCHEMA, num_impressions, seed, empty_history=empty)
    exploded = batch.explode()
    assert exploded.num_requests == sum(num_impressions)
    assert_parity(build(layers=layers), batch, exploded)


def test_parity_would_notice_a_wrong_fan_out() -> None:
    batch = random_batch(SCHEMA, [3, 2], 0, empty_history=0.0)
    wrong = RequestBatch(**{**vars(batch), "num_impressions": torch.tensor([2, 3])})
    with pytest.raises(AssertionError):
        assert_parity(build(), wrong, batch.explode())


def test_dummy_request_adds_nothing() -> None:
    model = build()
    batch = random_batch(SCHEMA, [3, 1, 2], 1)
    logits, loss, gradients = logits_loss_gradients(model, batch)
    padded_logits, padded_loss, padded = logits_loss_gradients(model, RequestBatch.concat([batch, dummy_batch(SCHEMA)]))
    torch.testing.assert_close(padded_logits[:-1], logits)
    torch.testing.assert_close(padded_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-4, atol=1e-6)


def test_dummy_request_alone_has_zero_gradients() -> None:
    _, loss, gradients = logits_loss_gradients(build(), dummy_batch(SCHEMA))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
