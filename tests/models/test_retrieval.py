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
from roo_ray.models import item_index
from roo_ray.models.item_index import ItemIndex, RetrievalEvaluation
from roo_ray.models.objective import retrieval_towers, training_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.models.retrieval import retrieval_loss
from tests.models.batches import random_batch, schema, take_requests
from tests.models.test_parity import assert_gradients_within_bfloat16, build, wide

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


def check_both_forms(batch: RequestBatch, precision: str, **options: Any) -> None:
    """The exploded batch, and the batch with a dummy request, give its loss and gradients, within the rounding of
    ``precision``: float32, float64 (what is left of a difference then is no rounding) or bfloat16."""

    def in_precision(of: RequestBatch) -> tuple[RankingModel, torch.Tensor, dict[str, torch.Tensor]]:
        model = build(kind="retrieval", autocast=precision == "bfloat16", **options)
        return model, *(
            loss_and_gradients(model.double(), of.map(wide))
            if precision == "float64"
            else loss_and_gradients(model, of)
        )

    _, loss, gradients = in_precision(batch)
    for other in (batch.explode(), RequestBatch.concat([batch, dummy_batch(SCHEMA)])):
        model, other_loss, others = in_precision(other)
        if precision == "bfloat16":
            torch.testing.assert_close(other_loss, loss, rtol=0.01, atol=0.0)
            assert_gradients_within_bfloat16(gradients, others)
        else:
            assert precision == str(loss.dtype).removeprefix("torch.")
            exact = precision == "float64"
            relative, absolute = (1e-11, 1e-12) if exact else (1e-4, 1e-5)
            torch.testing.assert_close(other_loss, loss, rtol=relative, atol=absolute)
            for name, gradient in gradients.items():
                difference = float((gradient - others[name]).abs().max())
                looked_up = exact and name.startswith("sparse.")  # TorchRec's gradients are float32
                bound = (1e-6 if looked_up else relative) * float(gradient.abs().max()) + absolute
                assert difference <= bound, f"{name}: {difference}"
        assert int(model.dense.item_counts.sum()) == int((batch.weights > 0).any(dim=1).sum())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 1000))
def test_both_forms_and_a_dummy_request_give_the_same(num_impressions: list[int], seed: int) -> None:
    check_both_forms(random_batch(SCHEMA, num_impressions, seed), "float32")


VARIANTS: list[dict[str, Any]] = [
    {},
    {"normalisation": "batch"},
    {"dropout": 0.3, "stochastic_length": 1.2},
    {"layers": 0},
    {"normalisation": "rms", "position_feature": "distance"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v), "default"))
@settings(max_examples=10, deadline=None)
@given(num_impressions=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_variants_give_the_same_in_both_forms(variant: dict[str, Any], num_impressions: list[int], seed: int) -> None:
    check_both_forms(random_batch(SCHEMA, num_impressions, seed), "float64", **variant)


# batches at hand: in one of a hundred a gradient cancels to less than bfloat16's rounding of its terms
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_forms_give_the_same_within_bfloat16(seed: int) -> None:
    check_both_forms(random_batch(SCHEMA, [4, 1, 5, 2], seed), "bfloat16")


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


@pytest.mark.parametrize("merge_at", [None, 5])
def test_recall_equals_loop(merge_at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if merge_at is not None:  # several merges, and several searches
        monkeypatch.setattr(item_index, "MERGE_AT", merge_at)
        monkeypatch.setattr(item_index, "_SCORES_AT_ONCE", 30)
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


def test_an_evaluation_holds_a_vector_per_distinct_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many impressions are held out. Users are kept of requests with a positive, on the host."""
    monkeypatch.setattr(item_index, "MERGE_AT", 50)
    model = build(kind="retrieval").eval()
    towers = retrieval_towers(model)
    assert towers is not None
    evaluation = RetrievalEvaluation(towers)
    impressions, seen, held = 0, set[int](), 0
    with torch.no_grad():
        for seed in range(60):
            batch = random_batch(SCHEMA, [6, 9, 5], seed, known=1.0)
            evaluation.update(model(batch), batch)
            impressions += batch.total_impressions
            seen |= set(batch.impression_ids["item"].values.tolist())
            tensors = [t for part in evaluation._items._parts for t in part]
            held = max(held, sum(len(t) for t in tensors[::2]))
    assert impressions == 1200
    assert held <= max(50, 2 * len(seen)) + batch.total_impressions
    assert held < impressions / 4
    assert evaluation.index().ids.tolist() == sorted(seen)
    lengths = torch.cat([positives.lengths for positives in evaluation._positives])
    assert lengths.min() > 0
    assert len(lengths) == sum(len(users) for users in evaluation._users)


def test_what_retrieval_needs_of_a_schema() -> None:
    with pytest.raises(ConfigError, match=r"model\.positive 'like' is no label"):
        build(kind="retrieval", positive="like")
    with pytest.raises(ConfigError, match=r"names the item: model\.item is 'words'"):
        build(kind="retrieval", item="words")
