"""Managed tables: who has which row, and that models with them are the same in both forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.config import Embeddings, ManagedRows, Model
from roo_ray.errors import ConfigError
from roo_ray.ingest.batch import dummy_batch
from roo_ray.models.check import check_model
from roo_ray.models.initialise import begin_rows_anew, initialise_tables
from roo_ray.models.managed import ManagedIds, TableMap
from roo_ray.models.objective import training_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.schema import Schema, parse_schema
from tests.models.batches import SCHEMA, random_batch
from tests.models.sharded_ranks import MODELS
from tests.models.test_parity import wide

CPU = torch.device("cpu")
STEPS = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True), min_size=1, max_size=12)
MANAGED = SCHEMA.replace("item: {rows: 50, dim: 8}", "item: {rows: 50, dim: 8, managed: true}")
MANAGED = MANAGED.replace("tag: {rows: 20, dim: 4}", "tag: {rows: 20, dim: 4, managed: true}")


def managed_schema() -> Schema:
    return parse_schema(MANAGED)


def _map(rows: int, **settings: object) -> TableMap:
    return TableMap(rows, ManagedRows.model_validate({"every": 1, "buffer": 1000} | settings), CPU)


def test_ids_get_rows_of_their_own_and_others_share_the_last() -> None:
    of, ids = _map(20), torch.arange(1000, 1019)
    assert of.rows(ids).tolist() == [19] * 19  # none is known before it is met
    of.meet(ids)
    rows = of.rows(ids)
    assert sorted(rows.tolist()) == list(range(19))
    assert of.rows(torch.tensor([7, 1018, 5000])).tolist() == [19, int(rows[18]), 19]
    assert of.rows_used() == 19
    assert int(of.evicted) == 0


@given(steps=STEPS, policy=st.sampled_from(["lfu", "lru", "distance_lfu"]), buffer=st.integers(1, 40))
def test_no_two_ids_share_a_row_and_every_change_is_told(steps: list[list[int]], policy: str, buffer: int) -> None:
    """Whatever comes, with a buffer smaller than a step too."""
    of, every = _map(12, policy=policy, buffer=buffer, every=3), torch.arange(1, 61)
    gone = 0
    for step in steps:
        before = of.rows(every)
        changed = of.meet(torch.tensor(sorted(step)))
        after = of.rows(every)
        known = after[after < 11]
        assert len(known.unique()) == len(known) == of.rows_used()
        holders = [{int(row): i for i, row in enumerate(rows) if row < 11} for rows in (before, after)]
        moved = {row for row in range(11) if holders[0].get(row) != holders[1].get(row)}
        assert moved <= set(changed.tolist()) <= set(range(11))
        gone += sum(int(before[i]) < 11 and int(after[i]) == 11 for i in range(60))
    assert int(of.evicted) >= gone  # more where an id has come and gone within a step


def test_who_is_met_more_keeps_its_row_under_lfu_and_who_was_met_last_under_lru() -> None:
    often, late = torch.tensor([100, 101]), torch.tensor([200, 201])
    kept = {}
    for policy in ("lfu", "lru"):
        of = _map(3, policy=policy)  # two rows and the last one
        for ids in (often, often, often, late):
            of.meet(ids)
        kept[policy] = [int(row) < 2 for row in of.rows(torch.cat([often, late]))]
    assert kept == {"lfu": [True, True, False, False], "lru": [False, False, True, True]}


def test_rows_are_given_every_so_many_steps_sooner_at_first_or_when_the_buffer_is_full() -> None:
    of = _map(20, every=3, buffer=5)
    given = [of.meet(torch.tensor([100 + step])).numel() for step in range(9)]
    assert given == [1, 0, 2, 0, 0, 3, 0, 0, 3]
    assert of.meet(torch.arange(1, 8)).numel() == 5  # seven would wait where five can
    assert (of.rows(torch.arange(1, 8)) == 19).tolist() == [False] * 5 + [True] * 2
    assert [of.meet(torch.tensor([], dtype=torch.int64)).numel() for _ in range(2)] == [0, 2]
    assert of.rows_used() == 16


def test_its_state_is_all_in_its_buffers() -> None:
    """A map that goes on from another's state, in the middle of an interval, goes on as the other."""
    one, other = _map(8, every=3), _map(8, every=3)
    steps = [torch.randint(1, 40, (6,), generator=torch.Generator().manual_seed(s)).unique() for s in range(12)]
    for step in steps[:4]:
        one.meet(step)
    other.meet(torch.arange(500, 520))
    other.load_state_dict(one.state_dict())
    for step in steps[4:]:
        assert one.meet(step).tolist() == other.meet(step).tolist()
        assert one.rows(torch.arange(60)).tolist() == other.rows(torch.arange(60)).tolist()
    assert int(one.evicted) == int(other.evicted) > 0


def test_a_dummy_request_has_no_ids() -> None:
    of = managed_schema()
    managed = ManagedIds(of, ManagedRows())
    assert {table: ids.numel() for table, ids in managed.distinct(dummy_batch(of)).items()} == {"item": 0, "tag": 0}
    assert managed(dummy_batch(of)).impression_ids["item"].values.tolist() == [49]


@pytest.mark.parametrize("kind", ["hstu_targets", "dcn", "retrieval"])
def test_map_loss_and_gradients_are_the_same_in_both_forms(kind: str) -> None:
    """An id counts once a step, however often its request's rows are repeated."""
    of, weights = managed_schema(), torch.tensor([1.0, 0.5])
    found: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
    for exploded in (False, True):
        torch.manual_seed(0)
        embeddings = Embeddings(managed=ManagedRows(every=2))
        model = RankingModel(of, MODELS[kind].model_copy(update={"embeddings": embeddings})).double()
        initialise_tables(model, 0)
        managed = model.sparse.managed
        for seed in range(5):
            batch = random_batch(of, [3, 1, 4, 2], seed).map(wide)
            batch = batch.explode() if exploded else batch
            for table, ids in managed.distinct(batch).items():
                managed.table(table).meet(ids)
        assert managed.table("item").evicted > 0
        _, loss = training_loss(model, batch, weights, batch.weights.sum(0), 1)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        rows = managed.table("item").rows(torch.arange(200))
        found.append((rows, loss.detach(), dict(zip(names, gradients, strict=True))))
    (rows, loss, gradients), (other_rows, other_loss, others) = found
    assert torch.equal(rows, other_rows)
    torch.testing.assert_close(loss, other_loss, rtol=1e-11, atol=1e-12)
    for name, gradient in gradients.items():
        relative = 1e-6 if name.startswith("sparse.") else 1e-11  # what TorchRec looks up is float32
        difference = float((gradient - others[name]).abs().max())
        assert difference <= relative * float(gradient.abs().max()) + 1e-13, f"{name}: {difference}"


def test_rows_begin_anew_with_their_initial_weights_and_no_state() -> None:
    model = RankingModel(managed_schema(), Model(dim=8, heads=2, user_dim=8, tower=[8]))
    initialise_tables(model, 3)
    name = "sparse.collections.dim_8.embeddings.item.weight"
    weight = dict(model.named_parameters())[name]
    first = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(9.0)
    state = {name: {"item.momentum1": torch.ones(50), "step": torch.tensor(3.0)}}
    state["dense.towers.item.weight"] = {"exp_avg": torch.ones(50)}  # a team's own, by chance of that name
    begin_rows_anew(model.sparse, 3, "item", torch.tensor([4, 30]), state)
    changed = torch.zeros(50, dtype=torch.bool)
    changed[[4, 30]] = True
    assert torch.equal(weight[changed], first[changed])
    assert bool((weight[~changed] == 9).all())
    assert state[name]["item.momentum1"].tolist() == (~changed).float().tolist()
    assert state["dense.towers.item.weight"]["exp_avg"].min() == 1
    assert state[name]["step"] == 3


def test_retrieval_tells_items_without_a_row_apart() -> None:
    """They share a row, and are each other's negatives all the same: a run's first steps would train nothing."""
    of = managed_schema()
    model = RankingModel(of, MODELS["retrieval"])
    initialise_tables(model, 0)
    batch = random_batch(of, [3, 1, 4], 1, known=1.0)
    batch = replace(batch, labels=torch.ones_like(batch.labels))
    assert len(model.sparse.managed(batch).impression_ids["item"].values.unique()) == 1
    _, loss = training_loss(model, batch, torch.ones(2), torch.ones(2), 1)
    loss.backward()
    assert float(loss) > 0
    assert float(model.dense.item_tower.output.weight.grad.abs().sum()) > 0


def test_retrieval_counts_items_by_row_from_when_a_row_got_its_item() -> None:
    towers = RankingModel(managed_schema(), MODELS["retrieval"]).dense
    rows, last = torch.tensor([4] * 10 + [5] * 20), torch.tensor([49] * 70)
    towers.count_items(torch.cat([rows, last]))
    assert int(towers.items_seen) == 100
    assert int(towers.item_counts.sum()) == 30  # the last row is no item's
    of = torch.tensor([4, 5, 6, 49])
    expected = torch.tensor([11, 21, 1, 1]) / (100 + 50)
    torch.testing.assert_close(towers.log_frequency(of).exp(), expected)
    towers.forget_items(torch.tensor([5]))
    torch.testing.assert_close(towers.log_frequency(of[:2]).exp(), torch.tensor([11 / 150, 1 / 50]))
    towers.count_items(torch.tensor([5] * 30 + [4] * 10))
    torch.testing.assert_close(towers.log_frequency(of[:2]).exp(), torch.tensor([21 / 190, 31 / 90]))


def test_the_loss_counts_by_row() -> None:
    of = managed_schema()
    model = RankingModel(of, MODELS["retrieval"])
    batch = random_batch(of, [3, 1], 1, known=1.0)
    of_items = model.sparse.managed.table("item")
    of_items.meet(model.sparse.managed.distinct(batch)["item"])
    training_loss(model, batch, torch.ones(2), torch.ones(2), 1)
    rows = of_items.rows(batch.impression_ids["item"].values)
    assert torch.equal(model.dense.item_counts, torch.bincount(rows, minlength=50))


def test_what_managed_rows_cannot_do_anything_for_is_said() -> None:
    settings = Model.model_validate({"embeddings": {"managed": {"every": 10}}})
    assert any("managed does nothing" in line for line in check_model(parse_schema(SCHEMA), settings, "cpu"))
    assert not any("managed" in line for line in check_model(managed_schema(), settings, "cpu"))


def test_uvm_is_refused_for_a_managed_table() -> None:
    settings = Model.model_validate({"embeddings": {"uvm": ["item"]}})
    with pytest.raises(ConfigError, match="uvm names table 'item', which the schema has as managed"):
        check_model(managed_schema(), settings, "cuda")


@pytest.mark.parametrize(
    ("table", "message"),
    [("rows: 50, dim: 8, managed: true, hash: true", "take one"), ("rows: 1, dim: 8, managed: true", "2 rows or more")],
)
def test_a_table_has_one_way_for_ids(table: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_schema(SCHEMA.replace("rows: 50, dim: 8", table))
