"""Random choices: their distribution, and what they depend on."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.models.keyed_random import KeyedDropout, combine_keys, token_keys, uniform
from roo_ray.models.stochastic_length import StochasticLength
from roo_ray.schema import parse_schema
from tests.models.batches import random_batch, schema
from tests.models.test_parity import build

SCHEMA = schema()


def test_draws_look_uniform_and_unrelated() -> None:
    draws = uniform(12345, torch.arange(4000), 16).double()
    assert abs(float(draws.mean()) - 0.5) < 0.005
    counts = torch.histc(draws.float(), bins=20, min=0, max=1) / draws.numel()
    assert float((counts - 0.05).abs().max()) < 0.004
    assert float((torch.corrcoef(draws.T) - torch.eye(16)).abs().max()) < 0.1
    assert len(combine_keys(torch.arange(100).repeat(100), torch.arange(100).repeat_interleave(100)).unique()) == 10_000


def test_dropout_keeps_the_mean_and_its_rows_mask() -> None:
    dropout = KeyedDropout(0.25, "here")
    keys = torch.arange(2000)
    out = dropout(torch.ones(2000, 8), keys)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(float(out.mean()) - 1) < 0.02
    assert torch.equal(dropout(torch.ones(2, 8), keys[[7, 3]]), out[[7, 3]])
    assert not torch.equal(KeyedDropout(0.25, "there")(torch.ones(2000, 8), keys), out)
    assert torch.equal(dropout.eval()(out, keys), out)


def test_candidates_and_events_of_a_request_have_masks_of_their_own() -> None:
    """They go through the same layers, with the same dropout modules, in ``hstu_targets``."""
    model = build(kind="hstu_targets", dropout=0.5)
    drawn: dict[str, list[torch.Tensor]] = {}
    for name, module in model.dense.named_modules():
        if isinstance(module, KeyedDropout) and "stacks.history" in name:
            module.register_forward_pre_hook(lambda _, args, name=name: drawn.setdefault(name, []).append(args[1]))
    model(random_batch(SCHEMA, [8] * 200, 0, history_lengths=[8] * 200))
    assert len(drawn) == 2
    for events, candidates in drawn.values():
        assert len(events) == len(candidates) == 1600
        assert len(torch.cat([events, candidates]).unique()) == 3200
        masks = [uniform(7, keys, 8).flatten() >= 0.5 for keys in (events, candidates)]
        agree = float((masks[0] == masks[1]).float().mean())
        assert abs(agree - 0.5) < 0.02  # of event j and candidate j


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 1000))
def test_histories_are_kept_whole_or_cut_to_the_short_length(lengths: list[int], seed: int) -> None:
    batch = random_batch(SCHEMA, [1] * len(lengths), seed, history_lengths=lengths)
    cut = StochasticLength(SCHEMA, 1.2)(batch)
    short = round(12 ** (1.2 / 2))
    key = "history.history_item"
    before, after = batch.request_ids[key], cut.request_ids[key]
    parts, left = before.values.split(before.lengths.tolist()), after.values.split(after.lengths.tolist())
    times = cut.sequence_time["history"].split(after.lengths.tolist())
    for whole, kept, time in zip(parts, left, times, strict=True):
        assert len(kept) in {len(whole), min(short, len(whole))}
        assert bool((time.diff() >= 0).all())  # the order of events is kept
        if len(kept) == len(whole):
            assert torch.equal(kept, whole)
    assert len(cut.sequence_dense["history"]) == len(after.values)
    assert torch.equal(cut.request_ids["history.history_topic"].lengths, after.lengths)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**70), 2**70))
def test_a_number_and_a_tensor_make_the_same_key(key: int, more: int) -> None:
    keys = torch.tensor([key])
    wrapped = (more + 2**63) % 2**64 - 2**63  # as int64
    assert torch.equal(combine_keys(keys, more), combine_keys(keys, torch.tensor([wrapped])))


def test_each_of_many_sequences_is_shortened_by_its_own_draws() -> None:
    names = [f"seen{place}" for place in range(5)]
    sequences = "".join(
        f"""
  - name: {name}
    level: request
    kind: sequence
    max_length: 12
    sequence: [{{column: {name}_item, table: item}}]"""
        for name in names
    )
    of = parse_schema(
        f"""
name: many
keys: {{request: request_id, user: user_id, time: request_time}}
tables: {{item: {{rows: 50, dim: 8}}}}
features:{sequences}
  - {{name: item, level: impression, kind: ids, columns: item_id, table: item}}
labels: [{{name: click, column: clicked}}]
"""
    )
    batch = random_batch(of, [1] * 50, 0, history_lengths=[12] * 50)
    places = torch.arange(12).repeat(50)  # what is kept is then seen
    ids = {key: replace(lists, values=places) for key, lists in batch.request_ids.items()}
    cut = StochasticLength(of, 1.2)(replace(batch, request_ids=ids))
    kept = [tuple(cut.request_ids[f"{name}.{name}_item"].values.tolist()) for name in names]
    assert all(0 < len(of_one) < 600 for of_one in kept)
    assert len(set(kept)) == len(names)


def test_long_histories_are_kept_whole_as_often_as_published() -> None:
    shorten = StochasticLength(SCHEMA, 1.2)
    lengths = torch.full((4000,), 12)
    kept = shorten.kept_events(torch.arange(4000), lengths, 4).view(4000, 12)
    whole = kept.all(dim=1)
    assert abs(float(whole.float().mean()) - (4 / 12) ** 2) < 0.02
    places = kept[~whole].float().mean(0)  # every place is as likely to be kept
    assert float((places - 4 / 12).abs().max()) < 0.04
    assert len(token_keys(torch.arange(4000), lengths).unique()) == 48_000
