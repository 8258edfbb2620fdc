"""RequestBatch: concat and explode against the requests taken apart in plain Python; map; the dummy."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.ingest.batch import Jagged, RequestBatch, dummy_batch, segment_positions
from tests.ingest import shard_maker
from tests.ingest.unpack import observed, same
from tests.models import batches as random_batches

SCHEMA = random_batches.schema()
counts_strategy = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def tensors(batch: RequestBatch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch by name."""
    found = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(part, Jagged):
                found[f"{field.name} {key} values"], found[f"{field.name} {key} lengths"] = (
                    part.values,
                    part.lengths,
                )
            elif part is not None:
                found[f"{field.name} {key}"] = part
    return found


@given(st.lists(st.integers(0, 5), max_size=20))
@settings(max_examples=50, deadline=None)
def test_segment_positions(lengths: list[int]) -> None:
    got = segment_positions(torch.tensor(lengths, dtype=torch.int64)).tolist()
    assert got == [i for n in lengths for i in range(n)]


@given(st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=8), st.data())
@settings(max_examples=50, deadline=None)
def test_jagged_take(lists: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=12))
    values = torch.tensor([v for of in lists for v in of], dtype=torch.int64)
    taken = Jagged(values, torch.tensor([len(of) for of in lists])).take(torch.tensor(rows, dtype=torch.int64))
    assert taken.lengths.tolist() == [len(lists[r]) for r in rows]
    assert taken.values.tolist() == [v for r in rows for v in lists[r]]


@given(st.lists(counts_strategy, min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_concat_is_the_requests_of_all_parts_in_order(parts: list[list[int]]) -> None:
    made = [random_batches.random_batch(SCHEMA, counts, seed) for seed, counts in enumerate(parts)]
    joined = RequestBatch.concat(made)
    assert same(observed(joined), [row for part in made for row in observed(part)])


@given(counts_strategy, st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_explode_gives_every_impression_its_request(counts: list[int], seed: int) -> None:
    batch = random_batches.random_batch(SCHEMA, counts, seed)
    per_impression = {"impression_index", "impression_dense", "labels", "weights", "oracle"}
    per_impression |= {f.name for f in SCHEMA.features if f.level == "impression" and f.kind == "ids"}
    wanted = []
    for request in observed(batch):
        for i in range(request["num_impressions"]):
            row = {k: [v[i]] if k in per_impression else v for k, v in request.items()}
            wanted.append(row | {"num_impressions": 1})
    exploded = batch.explode()
    assert same(observed(exploded), wanted)
    assert exploded.total_impressions == exploded.num_requests == sum(counts)
    again = exploded.explode()
    assert all(torch.equal(v.nan_to_num(7), tensors(again)[k].nan_to_num(7)) for k, v in tensors(exploded).items())


def test_request_of_impression() -> None:
    batch = random_batches.random_batch(SCHEMA, [2, 1, 3], 0)
    assert batch.request_of_impression().tolist() == [0, 0, 1, 2, 2, 2]


def test_map_reaches_every_tensor_once() -> None:
    batch = random_batches.random_batch(SCHEMA, [2, 3], 0)
    seen: list[int] = []
    mapped = batch.map(lambda tensor: (seen.append(id(tensor)), tensor.clone())[1])
    assert sorted(seen) == sorted(id(t) for t in tensors(batch).values())
    assert tensors(mapped).keys() == tensors(batch).keys()
    assert all(tensors(mapped)[k] is not v and torch.equal(tensors(mapped)[k].nan_to_num(7), v.nan_to_num(7))
               for k, v in tensors(batch).items())  # fmt: skip
    assert all(t.device.type == "meta" for t in tensors(batch.to("meta")).values())


@pytest.mark.parametrize("schema", [SCHEMA, shard_maker.schema()], ids=["models", "ingest"])
def test_the_dummy_has_one_weightless_impression_and_joins_any_batch(schema: random_batches.Schema) -> None:
    dummy = dummy_batch(schema)
    (row,) = observed(dummy)
    assert row["num_impressions"] == 1
    assert dummy.weights.sum() == dummy.labels.sum() == 0
    assert dummy.oracle.isnan().all()
    batch = random_batches.random_batch(schema, [2, 3], 1)
    joined = RequestBatch.concat([batch, dummy])
    assert same(observed(joined), [*observed(batch), row])
    assert {k: t.dtype for k, t in tensors(joined).items()} == {k: t.dtype for k, t in tensors(batch).items()}
