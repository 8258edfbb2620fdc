"""Retrieval: the loss against a loop, its masks, parity of both forms, the index and recall."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import Jagged, RequestBatch, dummy_batch
from roo_ray.models.item_index import ItemIndex, RetrievalEvaluation
from roo_ray.models.objective import retrieval_towers, training_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.models.retrieval import retrieval_loss
from tests.models.batches import random_batch, schema, take_requests
from tests.models.test_parity import build

SCHEMA = schema()
ONES = torch.ones(2)


def brute_force(model: RankingModel, batch: RequestBatch, log_q: bool) -> float:
    towers = model.dense
    with torch.no_grad():
        pairs = model(batch)
    users, items = pairs.chunk(2, dim=1)
    user = batch.user_key[batch.request_of_impression()].tolist()
    item = batch.impression_ids["item"].values.tolist()
    real = [i for i in range(len(item)) if batch.weights[i].sum() > 0]
    counts = {i: sum(item[r] == i for r in real) for i in item}

    def score(i: int, j: int) -> float:
        correction = math.log(max(counts[item[j]], 1) / max(len(real), 1)) if log_q else 0.0
        return float(users[i] @ items[j]) / towers.temperature - correction

    losses = []
    for i in range(len(item)):
        if batch.labels[i, 0] * batch.weights[i, 0] > 0:
            negatives = [j for j in real if user[j] != user[i] and item[j] != item[i]]
            losses.append(math.log(sum(math.exp(score(i, j)) for j in [i, *negatives])) - score(i, i))
    return sum(losses) / max(len(losses), 1)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 1000), st.booleans())
def test_loss_equals_loop(num_impressions: list[int], seed: int, log_q: bool) -> None:
    batch = random_batch(SCHEMA, num_impressions, seed)
    model = build(kind="retrieval", log_q=log_q)
    _, loss = training_loss(model, batch, ONES, ONES, 1)
    assert math.isclose(float(loss), brute_force(model, batch, log_q), rel_tol=1e-3, abs_tol=1e-4)


def loss_and_gradients(model: RankingModel, batch: RequestBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    _, loss = training_loss(model, batch, ONES, ONES, 1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 1000))
def test_both_forms_and_a_dummy_request_give_the_same(autocast: bool, num_impressions: list[int], seed: int) -> None:
    batch = random_batch(SCHEMA, num_impressions, seed)
    slack = 500.0 if autocast else 1.0
    loss, gradients = loss_and_gradients(build(kind="retrieval", autocast=autocast), batch)
    for other in (batch.explode(), RequestBatch.concat([batch, dummy_batch(SCHEMA)])):
        model = build(kind="retrieval", autocast=autocast)
        other_loss, others = loss_and_gradients(model, other)
        torch.testing.assert_close(other_loss, loss, rtol=1e-4 * slack, atol=1e-5 * slack)
        for name, gradient in gradients.items():
            difference = float((gradient - others[name]).abs().max())
            assert difference <= slack * (1e-4 * float(gradient.abs().max()) + 1e-5), f"{name}: {difference}"
        assert int(model.dense.item_counts.sum()) == int((batch.weights > 0).any(dim=1).sum())


def test_negatives_of_the_same_user_and_item_are_masked() -> None:
    batch = random_batch(SCHEMA, [2, 2, 1], 3, known=1.0)
    batch = replace(batch, labels=torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]))
    towers = build(kind="retrieval", log_q=False).dense
    pairs = torch.nn.functional.normalize(torch.randn(5, 16), dim=1).requires_grad_()

    def gradient_at_items(user_key: list[int], item: list[int]) -> list[bool]:
        ids = batch.impression_ids | {"item": Jagged(torch.tensor(item), torch.ones(5, dtype=torch.int64))}
        changed = replace(batch, user_key=torch.tensor(user_key), impression_ids=ids)
        (gradient,) = torch.autograd.grad(retrieval_loss(towers, pairs, changed, 1), [pairs])
        return (gradient[:, 8:].abs().sum(1) > 0).tolist()

    assert gradient_at_items([1, 2, 3], [10, 11, 12, 13, 14]) == [True, False, True, True, True]
    assert gradient_at_items([1, 1, 3], [10, 11, 12, 13, 14]) == [True, False, False, False, True]
    assert gradient_at_items([1, 2, 3], [10, 11, 10, 13, 14]) == [True, False, False, True, True]


def test_the_in_batch_softmax_depends_on_the_batch_by_definition() -> None:
    """What else is in the batch are the negatives: vectors of a request are its own, its loss is not."""
    batch = random_batch(SCHEMA, [3, 2], 3, known=1.0)
    batch = replace(batch, labels=torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]))
    model = build(kind="retrieval", log_q=False).eval()
    alone = take_requests(batch, [0])
    with torch.no_grad():
        pairs = model(batch)
        torch.testing.assert_close(model(alone), pairs[:3])
        own = {"alone": retrieval_loss(model.dense, pairs[:3], alone, 1)}
        own["in the batch"] = retrieval_loss(model.dense, pairs, batch, 1)
    assert float(own["alone"]) == 0.0  # no negative: the other items are of the same user
    assert float(own["in the batch"]) > 0.01


def test_log_q_takes_the_popularity_out() -> None:
    """An item that is drawn twice as often has its logit lowered by log 2."""
    towers = build(kind="retrieval").dense.eval()
    batch = random_batch(SCHEMA, [1, 1], 0, known=1.0)
    ids = batch.impression_ids | {"item": Jagged(torch.tensor([4, 5]), torch.ones(2, dtype=torch.int64))}
    batch = replace(batch, impression_ids=ids, user_key=torch.tensor([1, 2]), labels=torch.tensor([[1.0, 0], [0, 0]]))
    pairs = torch.zeros(2, 16)  # all scores 0: what remains is the correction
    towers.count_items(torch.tensor([4] * 10 + [5] * 20))
    assert towers.item_counts[[4, 5]].tolist() == [10, 20]
    assert int(towers.items_seen) == 30
    expected = math.log((1 / 10 + 1 / 20) / (1 / 10))
    assert math.isclose(float(retrieval_loss(towers, pairs, batch, 1)), expected, rel_tol=1e-5)


def test_log_q_costs_no_pass_over_the_table() -> None:
    """The correction touches rows of the table for the batch's items alone, whatever the table's size."""
    towers = build(kind="retrieval").dense
    towers.item_counts = torch.zeros(1 << 50, dtype=torch.int64, device="meta")  # a pass over it would need 8 PiB
    items = torch.randint(0, 1 << 50, (30,)).to("meta")
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.__name__.split(".")[0][-1] != "_":  # in place: what it returns is the buffer
                sizes.append(out.numel())
            return out

    with Sizes():
        towers.count_items(items)
        assert towers.log_frequency(items).shape == (30,)
    assert max(sizes) <= 30


def test_index_is_exact_keeps_the_last_and_survives_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([7, 3, 9, 3])
    vectors = torch.randn(4, 5)
    index = ItemIndex.of(ids, vectors)
    assert index.ids.tolist() == [3, 7, 9]
    assert torch.equal(index.vectors, vectors[[3, 0, 2]])
    users = torch.randn(6, 5)
    best = (users @ index.vectors.T).argsort(dim=1, descending=True)
    assert torch.equal(index.search(users, 2), index.ids[best[:, :2]])
    assert index.search(users, 50).shape == (6, 3)
    index.save(tmp_path / "items.parquet")
    loaded = ItemIndex.load(tmp_path / "items.parquet")
    assert torch.equal(loaded.ids, index.ids)
    assert torch.equal(loaded.vectors, index.vectors)


def test_recall_equals_loop() -> None:
    model = build(kind="retrieval").eval()
    towers = retrieval_towers(model)
    assert towers is not None
    evaluation = RetrievalEvaluation(towers)
    batches = [random_batch(SCHEMA, [4, 2, 6], 1), dummy_batch(SCHEMA), random_batch(SCHEMA, [3, 5], 2)]
    pairs = []
    with torch.no_grad():
        for batch in batches:
            pairs.append(model(batch))
            evaluation.update(pairs[-1], batch)
    index = evaluation.index()
    recalls = []
    for batch, of in zip(batches, pairs, strict=True):
        start = 0
        for count in batch.num_impressions.tolist():
            rows = range(start, start + count)
            wanted = [int(batch.impression_ids["item"].values[r]) for r in rows if batch.labels[r, 0] > 0]
            best = (index.vectors @ of[start, :8]).argsort(descending=True)[:5]
            top = index.ids[best].tolist()
            recalls += [sum(w in top for w in wanted) / len(wanted)] if wanted else []
            start += count
    values = evaluation.compute(index, at=[5])
    assert values["requests_with_positive"] == len(recalls) > 0
    assert math.isclose(values["recall_at_5"], sum(recalls) / len(recalls), rel_tol=1e-9)
    assert 0 < values["recall_at_5"] < 1


def test_what_retrieval_needs_of_a_schema() -> None:
    with pytest.raises(ConfigError, match=r"model\.positive 'like' is no label"):
        build(kind="retrieval", positive="like")
    with pytest.raises(ConfigError, match=r"names the item: model\.item is 'words'"):
        build(kind="retrieval", item="words")
