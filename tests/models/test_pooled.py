"""Pooled tables give what pooling after the lookup gives, in both forms of a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec import EmbeddingBagCollection

from roo_ray.config import Embeddings, Model
from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import RequestBatch, dummy_batch
from roo_ray.models.check import check_model
from roo_ray.models.embeddings import EmbeddingLookup
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.pooled import pooled_levels, pooled_problems, unpooled_name
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import parse_schema
from tests.models.bags import POOLED, bags_schema
from tests.models.batches import random_batch
from tests.models.test_parity import assert_parity, assert_parity_in_float64, build, logits_loss_gradients

SCHEMA = bags_schema()


def both(kind: str = "dcn", weights: str = "fp32") -> tuple[RankingModel, RankingModel]:
    """(pooled, pooled after the lookup), with the same weights."""
    after = Embeddings(weights=weights)  # type: ignore[arg-type]
    pooled = Embeddings(weights=weights, pooled=POOLED)  # type: ignore[arg-type]
    return build(SCHEMA, kind=kind, embeddings=pooled), build(SCHEMA, kind=kind, embeddings=after)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {unpooled_name(name): value for name, value in tensors.items()}


@pytest.mark.parametrize("kind", ["dcn", "hstu_targets", "two_tower"])
@settings(max_examples=8, deadline=None)
@given(
    num_impressions=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_values_loss_and_gradients_are_those_of_pooling_after_the_lookup(
    kind: str, num_impressions: list[int], seed: int, empty: float
) -> None:
    batch = random_batch(SCHEMA, num_impressions, seed, empty_history=empty)
    pooled, after = both(kind)
    ours, theirs = pooled.inputs(batch), after.inputs(batch)
    for name, expected in (theirs.request_ids | theirs.impression_ids).items():
        found = (ours.request_ids | ours.impression_ids)[name]
        assert found.shape == expected.shape, name
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=name)
    logits, loss, gradients = logits_loss_gradients(pooled, batch)
    after_logits, after_loss, after_gradients = logits_loss_gradients(after, batch)
    torch.testing.assert_close(logits, after_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, after_loss, rtol=1e-5, atol=1e-6)
    gradients = renamed(gradients)
    assert gradients.keys() == after_gradients.keys()
    for name, gradient in after_gradients.items():
        difference = float((gradient - gradients[name]).abs().max())
        assert difference <= 2e-5 * float(gradient.abs().max()) + 1e-6, f"{name}: {difference}"


def test_empty_bags_are_zero_and_their_tables_get_no_gradient() -> None:
    pooled, _ = both()
    batch = random_batch(SCHEMA, [2, 3], 1, empty_history=1.0)
    inputs = pooled.inputs(batch)
    for name in ("hobbies", "dislikes", "interests"):
        assert torch.equal(inputs.request_ids[name], torch.zeros(2, inputs.request_ids[name].shape[1]))
    for name in ("brands", "genres", "themes", "tags"):
        assert torch.equal(inputs.impression_ids[name], torch.zeros(5, inputs.impression_ids[name].shape[1]))
    _, _, gradients = logits_loss_gradients(pooled, batch)
    assert all(not gradient.any() for name, gradient in gradients.items() if "embedding_bags" in name)


@settings(max_examples=8, deadline=None)
@given(
    num_impressions=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_request_form_equals_impression_form(num_impressions: list[int], seed: int, empty: float) -> None:
    batch = random_batch(SCHEMA, num_impressions, seed, empty_history=empty)
    assert_parity_in_float64(both()[0], batch, batch.explode())
    assert_parity(both()[0], batch, batch.explode())


def test_parity_would_notice_bags_of_another_impression() -> None:
    batch = random_batch(SCHEMA, [3, 2], 0, empty_history=0.0)
    order = torch.tensor([1, 0, 2, 3, 4])
    swapped = {name: ids.take(order) if name == "brands" else ids for name, ids in batch.impression_ids.items()}
    wrong = RequestBatch(**{**vars(batch), "impression_ids": swapped})
    with pytest.raises(AssertionError):
        assert_parity(both()[0], wrong, batch.explode())


def test_a_dummy_request_is_looked_up() -> None:
    _, loss, gradients = logits_loss_gradients(both()[0], dummy_batch(SCHEMA))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_bags_of_half_precision_are_summed_in_float32() -> None:
    pooled, after = both(weights="fp16")
    assert {p.dtype for n, p in pooled.named_parameters() if n.startswith("sparse.")} == {torch.float16}
    batch = random_batch(SCHEMA, [2, 3, 1], 5)
    with torch.no_grad():
        ours, theirs = pooled.inputs(batch), after.inputs(batch)
    for name, expected in (theirs.request_ids | theirs.impression_ids).items():
        found = (ours.request_ids | ours.impression_ids)[name]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), name


def test_a_collection_per_dim_and_level() -> None:
    assert pooled_levels(SCHEMA, POOLED) == {
        "tag": "impression", "hobby": "request", "brand": "impression", "genre": "impression"
    }  # fmt: skip
    lookup = EmbeddingLookup(SCHEMA, torch.device("meta"), pooled=POOLED)
    assert sorted(name for name, p in lookup.named_parameters() if p.is_meta) == [
        "collections.dim_4.embeddings.word.weight",
        "collections.dim_8.embeddings.item.weight",
        "collections.dim_8.embeddings.topic.weight",
        "pooled.collections.dim_4_impression.embedding_bags.genre.weight",
        "pooled.collections.dim_4_impression.embedding_bags.tag.weight",
        "pooled.collections.dim_8_impression.embedding_bags.brand.weight",
        "pooled.collections.dim_8_request.embedding_bags.hobby.weight",
    ]
    assert all(isinstance(c, EmbeddingBagCollection) for c in lookup.pooled.collections.values())


def test_initial_weights_do_not_depend_on_the_collection() -> None:
    pooled, after = (EmbeddingLookup(SCHEMA, pooled=names) for names in (POOLED, []))
    for lookup in (pooled, after):
        initialise_tables(lookup, 4)
    ours, theirs = (
        {name.split(".")[-2]: weight for name, weight in lookup.state_dict().items()} for lookup in (pooled, after)
    )
    assert ours.keys() == theirs.keys() == set(SCHEMA.tables)
    for table, weight in theirs.items():
        assert torch.equal(ours[table], weight), table


def test_every_table_may_be_pooled() -> None:
    of = parse_schema("""
name: bags
keys: {request: r, user: u, time: t}
tables: {word: {rows: 9, dim: 4}}
features:
  - {name: asked, level: request, kind: ids, columns: asked, table: word, pooling: mean}
  - {name: shown, level: impression, kind: ids, columns: shown, table: word, pooling: sum}
labels: [{name: click, column: clicked}]
""")
    lookup = EmbeddingLookup(of, pooled=["word"])
    found = lookup(random_batch(of, [2, 3], 0))
    assert not found.per_id
    assert {name: tuple(value.shape) for name, value in found.pooled.items()} == {"asked": (2, 4), "shown": (5, 4)}


def test_the_name_without_pooling() -> None:
    weight = "sparse.pooled.collections.dim_8_impression.embedding_bags.brand.weight"
    assert unpooled_name(weight) == "sparse.collections.dim_8.embeddings.brand.weight"
    for name in ("sparse.collections.dim_8.embeddings.item.weight", "dense.tower.0.weight", "brand.momentum_1"):
        assert unpooled_name(name) == name


def test_tables_that_cannot_be_pooled_are_refused_in_one_message() -> None:
    embeddings = Embeddings(
        pooled=["item", "word", "country", "tag", "tag"],
        sharding={"tag": "grid", "item": "data_parallel", "topic": "grid", "brand": "data_parallel"},
    )
    with pytest.raises(ConfigError) as error:
        check_model(SCHEMA, Model(embeddings=embeddings), "cpu")
    for part in (
        "table 'item', which is also read by the sequence 'history' (history_item) and the feature 'item', whose",
        "table 'word', which is also read by the sequence 'searches' (search_word)",
        "model.embeddings.pooled names table 'country', which nothing looks up",
        "sharding of 'topic' is grid, which shards pooled tables alone",
        "sharding of 'brand' is data_parallel, whose gradients are wrong on CPU where a table is not pooled",
    ):
        assert part in str(error.value)
    assert "table 'tag'" not in str(error.value)
    assert "of 'tag'" not in str(error.value)
    assert not pooled_problems(SCHEMA, POOLED)
    with pytest.raises(ConfigError, match="table 'word', which is also read"):
        EmbeddingLookup(SCHEMA, pooled=["word"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pooled_tables_may_be_placed_as_others_may_not(device: str) -> None:
    placed = Embeddings(pooled=POOLED, sharding={"tag": "data_parallel", "brand": "grid"})
    check_model(SCHEMA, Model(embeddings=placed), device)
