"""What a request-only model must keep to, whatever its weights."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.models.embeddings import model_inputs, without_future_events
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import parse_schema
from tests.models.batches import SCHEMA as YAML
from tests.models.batches import random_batch, schema, take_impressions, take_requests
from tests.models.test_parity import build

SCHEMA = schema()
MODEL = build()
batches = st.builds(
    random_batch,
    st.just(SCHEMA),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 1000),
    empty_history=st.sampled_from([0.0, 0.3]),
)
few = settings(max_examples=15, deadline=None)


def logits(batch: RequestBatch, model: RankingModel = MODEL) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)  # type: ignore[no-any-return]


def user_vectors(batch: RequestBatch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return MODEL.dense.user_side(model_inputs(SCHEMA, batch, MODEL.sparse(batch))).vectors


@few
@given(batches, st.randoms(use_true_random=False))
def test_swapping_candidates_swaps_logits(batch: RequestBatch, random: object) -> None:
    order, start = [], 0
    for count in batch.num_impressions.tolist():
        within = list(range(start, start + count))
        random.shuffle(within)  # type: ignore[attr-defined]
        order += within
        start += count
    shuffled = take_impressions(batch, torch.tensor(order))
    torch.testing.assert_close(logits(shuffled), logits(batch)[order], rtol=1e-5, atol=1e-6)


@few
@given(batches)
def test_user_side_does_not_see_candidates(batch: RequestBatch) -> None:
    other = random_batch(SCHEMA, batch.num_impressions.tolist(), 12345)
    changed = replace(batch, impression_ids=other.impression_ids, impression_dense=other.impression_dense)
    before, after = user_vectors(batch), user_vectors(changed)
    for name, vector in before.items():
        assert torch.equal(vector, after[name]), name
    assert not torch.allclose(logits(batch), logits(changed))  # the logits do see them


@few
@given(batches, st.randoms(use_true_random=False))
def test_permuting_requests_permutes_logits(batch: RequestBatch, random: object) -> None:
    rows = list(range(batch.num_requests))
    random.shuffle(rows)  # type: ignore[attr-defined]
    parts = logits(batch).split(batch.num_impressions.tolist())
    expected = torch.cat([parts[row] for row in rows])
    torch.testing.assert_close(logits(take_requests(batch, rows)), expected, rtol=1e-5, atol=1e-6)


@few
@given(batches)
def test_one_request_alone_gives_what_it_gives_in_a_batch(batch: RequestBatch) -> None:
    alone = [logits(take_requests(batch, [row])) for row in range(batch.num_requests)]
    torch.testing.assert_close(torch.cat(alone), logits(batch), rtol=1e-5, atol=1e-6)


def with_event(batch: RequestBatch, request: int, place: int, seconds_after: float) -> RequestBatch:
    """The batch with one more history event in a request, at a time relative to the request's."""
    lengths = batch.request_ids["history.history_item"].lengths
    at = int(lengths[:request].sum()) + min(place, int(lengths[request]))
    longer = lengths.clone()
    longer[request] += 1

    def insert(values: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[:at], value.reshape(1, *values.shape[1:]), values[at:]])

    ids = dict(batch.request_ids)
    for key in ("history.history_item", "history.history_topic"):
        ids[key] = Jagged(insert(ids[key].values, torch.tensor([3])), longer)
    time = batch.request_time[request] + seconds_after
    return replace(
        batch,
        request_ids=ids,
        sequence_dense=batch.sequence_dense | {"history": insert(batch.sequence_dense["history"], torch.tensor([0.7]))},
        sequence_time=batch.sequence_time | {"history": insert(batch.sequence_time["history"], time)},
    )


@few
@given(batches, st.integers(0, 4), st.integers(0, 12), st.sampled_from([0.0, 1.0, 3600.0]))
def test_future_event_changes_nothing(batch: RequestBatch, request: int, place: int, after: float) -> None:
    injected = with_event(batch, request % batch.num_requests, place, after)
    torch.testing.assert_close(logits(injected), logits(batch), rtol=1e-6, atol=1e-7)


def test_past_event_changes_its_own_request_alone() -> None:
    batch = random_batch(SCHEMA, [2, 3], 3, history_lengths=[4, 5])
    injected = with_event(batch, 1, 5, -1.0)
    assert not torch.allclose(logits(injected)[2:], logits(batch)[2:])
    torch.testing.assert_close(logits(injected)[:2], logits(batch)[:2], rtol=1e-6, atol=1e-7)


def test_a_batch_without_future_events_is_not_copied() -> None:
    batch = random_batch(SCHEMA, [2, 3], 3)
    kept = without_future_events(batch, SCHEMA)
    assert kept.request_ids["history.history_item"].values is batch.request_ids["history.history_item"].values


def test_history_order_matters_with_hstu_and_time() -> None:
    batch = random_batch(SCHEMA, [2], 5, history_lengths=[6])
    key = "history.history_item"
    ids = batch.request_ids[key]
    swapped = replace(batch, request_ids=batch.request_ids | {key: Jagged(ids.values.flip(0), ids.lengths)})
    assert not torch.allclose(logits(swapped), logits(batch))


def test_models_without_history_or_without_candidate_ids() -> None:
    lines, skip = [], False
    for line in YAML.splitlines():
        if line.startswith("  - "):
            skip = "name: history" in line or "name: searches" in line
        elif not line.startswith("    "):
            skip = False
        if not skip:
            lines.append(line)
    no_history = "\n".join(lines)
    no_ids = "\n".join(line for line in YAML.splitlines() if not ("level: impression" in line and "kind: ids" in line))
    for text in (no_history, no_ids):
        of = parse_schema(text)
        batch = random_batch(of, [2, 1, 3], 0)
        model = build(of)
        out = logits(batch, model)
        assert out.shape == (6, 2)
        torch.testing.assert_close(logits(batch.explode(), model), out, rtol=1e-5, atol=1e-6)
