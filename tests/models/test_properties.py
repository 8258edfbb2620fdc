"""What a request-only model must keep to, whatever its architecture and weights."""

from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import Jagged, RequestBatch
from roo_ray.ingest.columns import dense_of
from roo_ray.models.architectures import ARCHITECTURES
from roo_ray.models.embeddings import model_inputs, without_future_events
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import parse_schema
from tests.models.batches import SCHEMA as YAML
from tests.models.batches import random_batch, schema, take_impressions, take_requests
from tests.models.test_parity import build, wide

SCHEMA = schema()
# float64: what is left of a difference is no rounding, but that of what TorchRec looks up
MODELS = {kind: build(kind=kind).double().eval() for kind in ARCHITECTURES}
# with random choices, which are keyed: they go with a request or an impression to its new place
TRAINING = {kind: build(kind=kind, dropout=0.3, stochastic_length=1.2).double() for kind in ARCHITECTURES}
both_modes = pytest.mark.parametrize("models", [MODELS, TRAINING], ids=["evaluation", "training"])
every_kind = pytest.mark.parametrize("kind", ARCHITECTURES)
batches = st.builds(
    random_batch,
    st.just(SCHEMA),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 1000),
    empty_history=st.sampled_from([0.0, 0.3]),
)
some = settings(max_examples=15, deadline=None)


def as_wide(batch: RequestBatch, model: RankingModel) -> RequestBatch:
    """The batch in the precision of the model's weights."""
    return batch.map(wide) if next(model.parameters()).dtype == torch.float64 else batch


def logits(batch: RequestBatch, model: str | RankingModel) -> torch.Tensor:
    model = MODELS[model] if isinstance(model, str) else model
    with torch.no_grad():
        return model(as_wide(batch, model))  # type: ignore[no-any-return]


def user_state(batch: RequestBatch, kind: str) -> dict[str, torch.Tensor]:
    model = MODELS[kind]
    with torch.no_grad():
        batch = as_wide(batch, model)
        state = model.dense.user_side(model_inputs(SCHEMA, batch, model.sparse(batch)))
    return state.vectors | state.tokens


def gradient_of_candidates(batch: RequestBatch, model: RankingModel, weights: torch.Tensor) -> torch.Tensor:
    """(B_NRO, D) gradient of the weighted sum of logits, weights (B_NRO,), in the candidates' dense features and
    embeddings (bags pooled)."""
    inputs = model.inputs(as_wide(batch, model))
    leaf = {name: pooled.detach().requires_grad_() for name, pooled in inputs.impression_ids.items()}
    dense = inputs.impression_dense.clone().requires_grad_()
    out = model.dense(replace(inputs, impression_dense=dense, impression_ids=leaf))
    assert leaf
    return torch.cat(torch.autograd.grad((out * weights.unsqueeze(1)).sum(), [dense, *leaf.values()]), dim=1)


@every_kind
@both_modes
@some
@given(batch=batches, random=st.randoms(use_true_random=False))
def test_swapping_candidates_swaps_logits_and_gradients(
    kind: str, models: dict[str, RankingModel], batch: RequestBatch, random: object
) -> None:
    model, order, start = models[kind], list[int](), 0
    for count in batch.num_impressions.tolist():
        within = list(range(start, start + count))
        random.shuffle(within)  # type: ignore[attr-defined]
        order += within
        start += count
    shuffled = take_impressions(batch, torch.tensor(order))
    torch.testing.assert_close(logits(shuffled, model), logits(batch, model)[order], rtol=1e-11, atol=1e-12)
    weights = torch.rand(len(order), generator=torch.Generator().manual_seed(0)).double()
    expected = gradient_of_candidates(batch, model, weights)[order]
    torch.testing.assert_close(gradient_of_candidates(shuffled, model, weights[order]), expected, rtol=1e-6, atol=1e-9)


@every_kind
@some
@given(batches, st.integers(0, 30))
def test_a_candidate_sees_no_other_candidate(kind: str, batch: RequestBatch, which: int) -> None:
    which %= batch.total_impressions
    only = torch.zeros(batch.total_impressions)
    only[which] = 1.0
    seen = gradient_of_candidates(batch, MODELS[kind], only).abs().sum(1)
    assert seen[which] > 0
    assert seen[only == 0].sum() == 0


@every_kind
@some
@given(batches)
def test_user_side_does_not_see_candidates(kind: str, batch: RequestBatch) -> None:
    other = random_batch(SCHEMA, batch.num_impressions.tolist(), 12345)
    changed = replace(batch, impression_ids=other.impression_ids, impression_dense=other.impression_dense)
    before, after = user_state(batch, kind), user_state(changed, kind)
    for name, vector in before.items():
        assert torch.equal(vector, after[name]), name
    assert not torch.allclose(logits(batch, kind), logits(changed, kind))  # the logits do see them


@every_kind
@both_modes
@some
@given(batch=batches, random=st.randoms(use_true_random=False))
def test_permuting_requests_permutes_logits(
    kind: str, models: dict[str, RankingModel], batch: RequestBatch, random: object
) -> None:
    rows = list(range(batch.num_requests))
    random.shuffle(rows)  # type: ignore[attr-defined]
    parts = logits(batch, models[kind]).split(batch.num_impressions.tolist())
    expected = torch.cat([parts[row] for row in rows])
    torch.testing.assert_close(logits(take_requests(batch, rows), models[kind]), expected, rtol=1e-11, atol=1e-12)


def test_random_choices_are_made_in_training() -> None:
    batch = random_batch(SCHEMA, [3, 2, 4], 5, empty_history=0.0)
    for kind, model in TRAINING.items():
        assert not torch.allclose(logits(batch, model), logits(batch, kind)), kind


@every_kind
@some
@given(batches)
def test_one_request_alone_gives_what_it_gives_in_a_batch(kind: str, batch: RequestBatch) -> None:
    alone = [logits(take_requests(batch, [row]), kind) for row in range(batch.num_requests)]
    torch.testing.assert_close(torch.cat(alone), logits(batch, kind), rtol=1e-11, atol=1e-12)


def test_batch_statistics_alone_depend_on_the_batch() -> None:
    """The normalisation that depends on the batch by definition, in training alone."""
    batch = random_batch(SCHEMA, [2, 3, 1], 4)
    model = build(normalisation="batch")
    model(batch)
    alone = [logits(take_requests(batch, [row]), model.train()) for row in range(batch.num_requests)]
    assert not torch.allclose(torch.cat(alone), logits(batch, model.train()), atol=1e-3)
    alone = [logits(take_requests(batch, [row]), model.eval()) for row in range(batch.num_requests)]
    torch.testing.assert_close(torch.cat(alone), logits(batch, model.eval()), rtol=1e-5, atol=1e-6)


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


@every_kind
@some
@given(batches, st.integers(0, 4), st.integers(0, 12), st.sampled_from([0.0, 1.0, 3600.0]))
def test_future_event_changes_nothing(kind: str, batch: RequestBatch, request: int, place: int, after: float) -> None:
    injected = with_event(batch, request % batch.num_requests, place, after)
    torch.testing.assert_close(logits(injected, kind), logits(batch, kind), rtol=1e-11, atol=1e-12)


@every_kind
def test_past_event_changes_its_own_request_alone(kind: str) -> None:
    batch = random_batch(SCHEMA, [2, 3], 3, history_lengths=[4, 5])
    injected = with_event(batch, 1, 5, -1.0)
    assert not torch.allclose(logits(injected, kind)[2:], logits(batch, kind)[2:])
    torch.testing.assert_close(logits(injected, kind)[:2], logits(batch, kind)[:2], rtol=1e-5, atol=1e-6)


def test_a_batch_without_future_events_is_not_copied() -> None:
    batch = random_batch(SCHEMA, [2, 3], 3)
    kept = without_future_events(batch, SCHEMA)
    assert kept.request_ids["history.history_item"].values is batch.request_ids["history.history_item"].values


@every_kind
def test_history_order_matters_with_recency(kind: str) -> None:
    batch = random_batch(SCHEMA, [2], 5, history_lengths=[6])
    key = "history.history_item"
    ids = batch.request_ids[key]
    swapped = replace(batch, request_ids=batch.request_ids | {key: Jagged(ids.values.flip(0), ids.lengths)})
    assert not torch.allclose(logits(swapped, kind), logits(batch, kind))


@pytest.mark.parametrize("kind", sorted(set(ARCHITECTURES) - {"retrieval"}))
def test_position_is_fixed_for_serving_and_seen_by_nothing_else(kind: str) -> None:
    model = build(kind=kind, position_feature="distance", position_value=2.0)
    batch = random_batch(SCHEMA, [2, 3], 5)
    moved = replace(batch, impression_dense=batch.impression_dense + torch.tensor([0.0, 3.0, 0.0]))
    shift = logits(moved, model.train()) - logits(batch, model.train())
    assert shift.abs().min() > 0
    assert torch.equal(logits(moved, model.eval()), logits(batch, model.eval()))
    fixed = batch.impression_dense.clone()
    fixed[:, 1] = 2.0
    at_value = logits(replace(batch, impression_dense=fixed), model.train())
    torch.testing.assert_close(at_value, logits(batch, model.eval()))
    with torch.no_grad():  # an additive term, so two candidates at one position keep their order and distance
        position = (model.dense.top if hasattr(model.dense, "top") else model.dense).position
        without = [position(torch.zeros(5, 2), model.train().inputs(b)) for b in (moved, batch)]
    torch.testing.assert_close(shift, without[0] - without[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [3.0, -2.0])
@pytest.mark.parametrize(("scale", "other"), [("log1p", None), ("log1p", "none"), ("none", "log1p")])
def test_a_fixed_position_is_on_the_scale_that_its_column_is_read_on(
    value: float, scale: str, other: str | None
) -> None:
    """``other``: the scale on which a later feature reads the column too, as an ordinary feature."""
    line = "{name: price, level: impression, kind: dense, columns: [price, distance, freshness]"
    assert line in YAML
    text = YAML.replace(line, f"{line}, scale: {scale}")
    if other is not None:
        again = f"  - {{name: again, level: impression, kind: dense, columns: distance, scale: {other}}}\n"
        text = text.replace("labels:", f"{again}labels:")
    of = parse_schema(text)
    ingested = dense_of(pa.array([value]), "distance", str, None, scale)
    model = build(of, position_feature="distance", position_value=value)
    batch = random_batch(of, [2, 3], 5)
    fixed = batch.impression_dense.clone()
    fixed[:, 1] = float(ingested[0])
    torch.testing.assert_close(model.eval().inputs(batch).impression_dense, fixed)
    at_value = logits(replace(batch, impression_dense=fixed), model.train())
    torch.testing.assert_close(at_value, logits(batch, model.eval()))


def test_position_is_kept_out_of_retrieval_which_has_no_term_for_it() -> None:
    batch = random_batch(SCHEMA, [2, 3], 5)
    moved = replace(batch, impression_dense=batch.impression_dense + torch.tensor([0.0, 3.0, 0.0]))
    model = build(kind="retrieval", position_feature="distance").train()
    assert torch.equal(model(moved), model(batch))
    seeing = build(kind="retrieval").train()
    assert not torch.allclose(seeing(moved), seeing(batch))


def test_own_towers_are_given_the_position_in_training_and_its_value_later() -> None:
    batch = random_batch(SCHEMA, [2, 3], 5)
    model = build(towers="tests.models.own_towers:OwnTowers", position_feature="distance", position_value=2.0)
    assert torch.equal(model.train().inputs(batch).impression_dense, batch.impression_dense)
    assert model.eval().inputs(batch).impression_dense[:, 1].tolist() == [2.0] * 5
    moved = replace(batch, impression_dense=batch.impression_dense + torch.tensor([0.0, 3.0, 0.0]))
    assert torch.equal(logits(moved, model.train()), logits(batch, model.train()))  # CandidateFeatures leaves it out


def test_position_feature_must_be_a_column() -> None:
    with pytest.raises(ConfigError, match="'place' is no impression-level dense column"):
        build(position_feature="place")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_without_history_or_without_candidate_ids(kind: str) -> None:
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
    for text in (no_history,) if kind == "retrieval" else (no_history, no_ids):
        of = parse_schema(text)
        batch = random_batch(of, [2, 1, 3], 0)
        model = build(of, kind=kind)
        out = logits(batch, model)
        assert out.shape == (6, 16 if kind == "retrieval" else 2)  # retrieval gives pairs of vectors
        torch.testing.assert_close(logits(batch.explode(), model), out, rtol=1e-5, atol=1e-6)
