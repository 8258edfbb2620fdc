"""The lookup against indexing, pooling against a loop, and schemas that it cannot hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import impression_id_keys, request_id_keys
from roo_ray.models.contract import ModelInputs, UserState, fan_out
from roo_ray.models.embeddings import EmbeddingLookup, lookup_features, model_inputs
from roo_ray.models.initialise import initialise_tables
from roo_ray.models.jagged import segment_last, segment_mean, segment_softmax, segment_sum, sum_lengths
from roo_ray.schema import parse_schema
from tests.models.batches import SCHEMA as YAML
from tests.models.batches import random_batch, schema

SCHEMA = schema()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 1000))
def test_lookup_and_pooling(num_impressions: list[int], seed: int) -> None:
    batch = random_batch(SCHEMA, num_impressions, seed)
    lookup = EmbeddingLookup(SCHEMA)
    initialise_tables(lookup, 0)
    weights = {name.split(".")[-2]: p for name, p in lookup.named_parameters()}
    found = lookup(batch)
    ids = batch.request_ids | batch.impression_ids
    for key, table in request_id_keys(SCHEMA) + impression_id_keys(SCHEMA):
        assert torch.equal(found.per_id[key].values, weights[table][ids[key].values]), key
        assert torch.equal(found.per_id[key].lengths, ids[key].lengths), key
    assert not found.pooled
    inputs = model_inputs(SCHEMA, batch, found)
    for name, mean, pooled in (
        ("words", False, inputs.impression_ids["words"]),
        ("tags", True, inputs.impression_ids["tags"]),
        ("interests", True, inputs.request_ids["interests"]),
    ):
        start = 0
        for row, length in enumerate(ids[name].lengths.tolist()):
            bag = found.per_id[name].values[start : start + length]
            expected = bag.sum(0) / (max(length, 1) if mean else 1)
            torch.testing.assert_close(pooled[row], expected)
            start += length


def test_shared_tables_are_one_parameter_per_table_in_one_lookup_per_dim() -> None:
    lookup = EmbeddingLookup(SCHEMA, torch.device("meta"))
    assert sorted(name for name, _ in lookup.named_parameters()) == [
        "collections.dim_4.embeddings.tag.weight",
        "collections.dim_4.embeddings.word.weight",
        "collections.dim_8.embeddings.item.weight",
        "collections.dim_8.embeddings.topic.weight",
    ]
    assert all(p.is_meta for p in lookup.parameters())
    assert lookup_features(SCHEMA)["item"] == ["history.history_item", "item"]
    assert lookup_features(SCHEMA)["topic"] == ["country", "history.history_topic", "topic"]


def test_names_that_the_lookup_cannot_hold() -> None:
    with pytest.raises(ConfigError, match="history_item is given twice"):
        lookup_features(parse_schema(YAML.replace("column: history_topic", "column: history_item")))
    with pytest.raises(ConfigError, match=r"table 'it\.em' has a dot"):
        lookup_features(parse_schema(YAML.replace("  item: {", "  it.em: {").replace("table: item}", "table: it.em}")))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_segments(lengths: list[int]) -> None:
    of = torch.tensor(lengths)
    values = torch.randn(sum(lengths), 3, requires_grad=True)
    parts = values.split(lengths)
    zero = torch.zeros(3)
    torch.testing.assert_close(segment_sum(values, of), torch.stack([part.sum(0) for part in parts]))
    means = [part.mean(0) if len(part) else zero for part in parts]
    torch.testing.assert_close(segment_mean(values, of), torch.stack(means))
    last = [part[-1] if len(part) else zero for part in parts]
    torch.testing.assert_close(segment_last(values, of), torch.stack(last))
    weight = torch.randn(len(lengths), 3)
    for ours, theirs in (
        (segment_sum(values, of), torch.stack([part.sum(0) for part in parts])),
        (segment_last(values, of), torch.stack(last)),
    ):
        (a,) = torch.autograd.grad((ours * weight).sum(), [values])
        b = torch.autograd.grad((theirs * weight).sum(), [values], allow_unused=True)[0] if sum(lengths) else a
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=5))
def test_sum_lengths(groups: list[list[int]]) -> None:
    flat = torch.tensor([length for group in groups for length in group])
    assert sum_lengths(flat, torch.tensor([len(g) for g in groups])).tolist() == [sum(g) for g in groups]


def test_fan_out_of_a_state_is_that_of_its_vectors() -> None:
    counts = torch.tensor([2, 1, 3])
    state = UserState({"a": torch.randn(3, 2), "b": torch.randn(3, 4)})
    inputs = ModelInputs(
        counts, torch.zeros(3, 0), torch.zeros(6, 0), {}, {}, {}, counts, torch.arange(6), torch.ones(6) > 0
    )
    spread = state.fan_out(inputs)
    for name, vector in state.vectors.items():
        assert torch.equal(spread.vectors[name], vector[[0, 0, 1, 2, 2, 2]])
        assert torch.equal(fan_out(vector, counts), vector[[0, 0, 1, 2, 2, 2]])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_softmax_within_segments(lengths: list[int]) -> None:
    scores = 5 * torch.randn(sum(lengths), requires_grad=True)
    ours = segment_softmax(scores, torch.tensor(lengths))
    expected = torch.cat([torch.zeros(0), *(part.softmax(0) for part in scores.split(lengths))])
    torch.testing.assert_close(ours, expected)
    weight = torch.randn(sum(lengths))
    (one,) = torch.autograd.grad((ours * weight).sum(), [scores])
    if lengths and sum(lengths):
        (other,) = torch.autograd.grad((expected * weight).sum(), [scores])
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
