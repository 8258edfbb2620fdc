"""The reading function against a plain-Python reading: every value, every request exactly once, every error."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roo_ray.config import Holdout
from roo_ray.ingest.batch import RequestBatch
from roo_ray.ingest.budget import batch_bounds
from roo_ray.ingest.lists import ranges
from roo_ray.ingest.pack import PackSettings, pack_window
from roo_ray.ingest.plan import Side, Window
from roo_ray.ingest.tensors import PackedBatches
from roo_ray.ingest.units import UnitRef, units_of
from roo_ray.models.retrieval import retrieval_loss
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema, parse_schema
from tests.ingest import shard_maker
from tests.ingest.unpack import observed, same

SCHEMA = shard_maker.schema()
COUNTS = [1 + i * 5 % 9 for i in range(40)]


def window_of(manifest: Manifest, shuffle: int | None = 1, known: bool = True) -> Window:
    """One window of all units; ``known``: with what tells another file from theirs."""
    units = units_of(manifest.files)
    refs = tuple(units.ref(unit) for unit in range(len(units.file)))
    if not known:
        refs = tuple(UnitRef(ref.path, ref.row_group, ref.requests) for ref in refs)
    return Window(epoch=3, lane=2, index=5, units=refs, shuffle=shuffle)


def pack_settings(folder: Path, budget: int = 20, schema: Schema = SCHEMA, side: Side = "train") -> PackSettings:
    return PackSettings(str(folder), schema, Holdout(by="day"), side, budget)


def batches_of(folder: Path, manifest: Manifest, budget: int = 20, shuffle: int | None = 1) -> list[RequestBatch]:
    packed = PackedBatches(pack_window(pack_settings(folder, budget), window_of(manifest, shuffle)), SCHEMA)
    return [packed.batch(row) for row in range(packed.rows)]


# ---- packing ----------------------------------------------------------------------------------------------


def greedy(sizes: list[int], budget: int) -> list[int]:
    """Batch bounds by the rule as it is said, one request after the other."""
    bounds, used = [0], 0
    for request, size in enumerate(sizes):
        if used and used + size > budget:
            bounds.append(request)
            used = 0
        used += size
    return [*bounds, len(sizes)] if sizes else [0]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_batch_bounds_are_greedy(sizes: list[int], budget: int) -> None:
    bounds = batch_bounds([(np.array(sizes, np.int64), budget)], len(sizes)).tolist()
    assert bounds == greedy(sizes, budget)
    for start, end in pairwise(bounds):
        assert sum(sizes[start:end]) <= budget or end - start == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    budget=st.integers(1, 60),
    row_group=st.integers(1, 20),
    shuffle=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 10_000),
)
def test_every_request_once_and_equal_to_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    budget: int,
    row_group: int,
    shuffle: int | None,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    rows = shard_maker.random_rows(counts, seed, days=2)
    rows = [row | {"user_id": None} if n % 3 == seed % 5 else row for n, row in enumerate(rows)]
    manifest = shard_maker.write_data_set(folder, rows, SCHEMA, row_group=row_group)
    batches = batches_of(folder, manifest, budget, shuffle)
    expected = {row["request_key"]: row for row in (shard_maker.reference(SCHEMA, row) for row in rows)}
    keys = [key for batch in batches for key in batch.request_key.tolist()]
    assert sorted(keys) == sorted(expected)
    for batch in batches:
        assert batch.total_impressions <= budget or batch.num_requests == 1
        for request in observed(batch):
            assert same(request, expected[request["request_key"]])
    if shuffle is None:
        assert keys == list(expected)


def test_tags_types_and_views(tmp_path: Path) -> None:
    manifest = shard_maker.write_data_set(tmp_path, shard_maker.random_rows(COUNTS[:30], 1), SCHEMA)
    table = pack_window(pack_settings(tmp_path), window_of(manifest))
    packed = PackedBatches(table, SCHEMA)
    assert packed.tags["batch"].tolist() == list(range(packed.rows))
    for tag, value in {"epoch": 3, "lane": 2, "window": 5, "batches": packed.rows}.items():
        assert set(packed.tags[tag].tolist()) == {value}
    batch = packed.batch(1)
    lists = table.column("impression_dense").chunk(0)
    first = np.asarray(lists.values).ctypes.data
    assert batch.impression_dense.data_ptr() == first + 4 * lists.offsets[1].as_py()  # a view, not a copy
    types: list[torch.dtype] = []
    batch.map(lambda tensor: (types.append(tensor.dtype), tensor)[1])
    assert set(types) == {torch.int64, torch.float32, torch.float64}


def test_slices_and_merged_tables_give_the_same_batches(tmp_path: Path) -> None:
    """Ray may cut and join blocks between rows."""
    manifest = shard_maker.write_data_set(tmp_path, shard_maker.random_rows(COUNTS[:30], 1), SCHEMA)
    table = pack_window(pack_settings(tmp_path), window_of(manifest))
    whole = PackedBatches(table, SCHEMA)
    joined = PackedBatches(pa.concat_tables([table.slice(2), table.slice(0, 2)]), SCHEMA)
    tail = PackedBatches(table.slice(2), SCHEMA)
    for row in range(2, whole.rows):
        expected = observed(whole.batch(row))
        assert same(observed(tail.batch(row - 2)), expected)
        assert same(observed(joined.batch(row - 2)), expected)


def test_shuffle_depends_on_the_seed_alone(tmp_path: Path) -> None:
    manifest = shard_maker.write_data_set(tmp_path, shard_maker.random_rows(COUNTS[:40], 1), SCHEMA)

    def order(shuffle: int | None) -> list[int]:
        return [k for b in batches_of(tmp_path, manifest, shuffle=shuffle) for k in b.request_key.tolist()]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(None)
    assert sorted(order(1)) == sorted(order(None))


def test_a_window_without_requests_of_the_side_is_marked(tmp_path: Path) -> None:
    manifest = shard_maker.write_data_set(tmp_path, shard_maker.random_rows(COUNTS[:5], 1), SCHEMA)
    settings = PackSettings(str(tmp_path), SCHEMA, Holdout(by="request", fraction=1e-9), "evaluation", 20)
    packed = PackedBatches(pack_window(settings, window_of(manifest)), SCHEMA)
    assert packed.rows == 1
    assert (packed.tags["batch"][0], packed.tags["batches"][0]) == (-1, 0)


def test_columns_that_no_feature_reads_are_not_read(tmp_path: Path) -> None:
    rows = shard_maker.random_rows(COUNTS[:5], 1)
    only_item = parse_schema(
        """
        name: small
        keys: {request: [request_id, site], user: user_id, time: request_time}
        tables: {item: {rows: 50, dim: 8, hash: true}}
        features: [{name: item, level: impression, kind: ids, columns: item_id, table: item}]
        labels: [{name: click, column: clicked}]
        """
    )
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    settings = pack_settings(tmp_path, schema=only_item)
    batch = PackedBatches(pack_window(settings, window_of(manifest)), only_item).batch(0)
    assert batch.request_dense.shape == (batch.num_requests, 0)
    assert batch.impression_dense.shape == (batch.total_impressions, 0)
    assert batch.oracle.isnan().all()
    assert list(batch.request_ids) == []


# ---- forms, budgets, counts -------------------------------------------------------------------------------


def variant(folder: Path, manifest: Manifest, **changes: Any) -> list[RequestBatch]:
    """The batches of all units with other settings."""
    settings = replace(pack_settings(folder), **changes)
    packed = PackedBatches(pack_window(settings, window_of(manifest)), SCHEMA)
    return [packed.batch(row) for row in range(packed.rows)]


def values_of(batch: RequestBatch) -> list[Any]:
    """All its tensors as lists, NaN as None."""
    found: list[Any] = []
    batch.map(lambda tensor: (found.append((tensor.dtype, tensor.nan_to_num(-7).tolist())), tensor)[1])
    return found


@pytest.mark.parametrize("oversize", ["own", "split"])
def test_the_impression_form_is_the_exploded_batch_to_the_bit(tmp_path: Path, oversize: str) -> None:
    rows = shard_maker.random_rows([*COUNTS[:25], 50], 1)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    requests = variant(tmp_path, manifest, oversize=oversize)
    impressions = variant(tmp_path, manifest, oversize=oversize, form="impression")
    assert [values_of(batch.explode()) for batch in requests] == [values_of(batch) for batch in impressions]


def test_split_requests_have_the_same_user_side_and_every_impression_once(tmp_path: Path) -> None:
    rows = shard_maker.random_rows([*COUNTS[:10], 50, 3, 41], 1)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    whole = {row["request_key"]: row for row in (shard_maker.reference(SCHEMA, row) for row in rows)}
    seen: dict[int, list[int]] = {}
    parts = 0
    for batch in variant(tmp_path, manifest, oversize="split"):
        assert batch.total_impressions <= 20
        assert batch.split is not None
        for request, mark in zip(observed(batch), batch.split.tolist(), strict=True):
            expected = whole[request["request_key"]]
            assert (mark > 0) == (expected["num_impressions"] > 20)
            parts += mark > 0
            for name, value in request.items():
                if name in ("impression_index", "num_impressions"):
                    continue
                stored = expected[name]
                if name in ("impression_dense", "labels", "weights", "oracle", "item", "topic", "tags"):
                    stored = [stored[i] for i in request["impression_index"]]
                assert same(value, stored), name
            seen.setdefault(request["request_key"], []).extend(request["impression_index"])
    assert {key: sorted(index) for key, index in seen.items()} == {k: r["impression_index"] for k, r in whole.items()}
    assert parts == 3 + 3


def test_batches_by_cost_count_the_events_that_are_kept(tmp_path: Path) -> None:
    rows = shard_maker.random_rows(COUNTS[:40], 3)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    coefficients = (1.0, 2.0, 0.5, 1.0, 0.25)
    settings = replace(pack_settings(tmp_path), batch_impressions=None, batch_cost=60.0, cost=coefficients)
    table = pack_window(settings, window_of(manifest))
    packed = PackedBatches(table, SCHEMA)
    assert packed.rows > 5
    for row in range(packed.rows):
        batch = packed.batch(row)
        t, n = batch.request_ids["history.history_item"].lengths.double(), batch.num_impressions.double()
        cost = (1 + 2 * t + 0.5 * t * t + n + 0.25 * n * t).sum().item()
        assert packed.counts["cost"][row] == pytest.approx(cost)
        assert cost <= 60 or batch.num_requests == 1


def test_counts_of_a_batch(tmp_path: Path) -> None:
    rows = shard_maker.random_rows(COUNTS[:40], 3)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    for changes in ({}, {"interleave": 1}, {"oversize": "split", "batch_impressions": 4}):
        settings = replace(pack_settings(tmp_path), **changes)  # type: ignore[arg-type]
        packed = PackedBatches(pack_window(settings, window_of(manifest)), SCHEMA)
        for row in range(packed.rows):
            batch = packed.batch(row)
            counts = {name: packed.counts[name][row] for name in packed.counts}
            assert counts["users"] == len(set(batch.user_key.tolist()))
            assert counts["cost"] == batch.total_impressions
            starts = batch.num_requests if batch.split is None else int((batch.split < 2).sum())
            assert counts["requests"] == starts
            owners = batch.user_key[batch.request_of_impression()].tolist()
            items = batch.impression_ids["item"].values.tolist()
            known = (batch.weights > 0).any(1).tolist()
            pool = [
                (u, i, y) for u, i, y, k in zip(owners, items, batch.labels[:, 0].tolist(), known, strict=True) if k
            ]
            pairs = [(a, b) for x, a in enumerate(pool) if a[2] for y, b in enumerate(pool) if x != y]
            assert counts["negative_pairs"] == len(pairs)
            assert counts["false_pairs"] == sum(a[0] == b[0] or a[1] == b[1] for a, b in pairs)
        everything = sum(packed.counts["requests"])
        assert everything == 40


def test_false_negatives_are_what_the_retrieval_loss_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss itself, of each batch: the pairs that it masks, but for a positive and itself."""
    rows = [row | {"user_id": f"u{n % 6}"} for n, row in enumerate(shard_maker.random_rows(COUNTS[:40], 3))]
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    packed = PackedBatches(
        pack_window(replace(pack_settings(tmp_path), batch_impressions=60), window_of(manifest)), SCHEMA
    )
    masks: list[torch.Tensor] = []
    real = torch.Tensor.masked_fill
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda t, mask, v: (masks.append(mask), real(t, mask, v))[1])
    towers: Any = SimpleNamespace(
        item="item", positive=0, training=False, log_q=False, temperature=1.0, scores=lambda pairs: pairs.sum(1)
    )
    for row in range(packed.rows):
        batch = packed.batch(row)
        retrieval_loss(towers, torch.zeros(batch.total_impressions, 4), batch, 1)
        masked, positives = masks[-1], len(masks[-1])
        assert packed.counts["negative_pairs"][row] == masked.numel() - positives
        assert packed.counts["false_pairs"][row] == int(masked.sum()) - positives
    assert len(masks) == packed.rows > 1
    assert 0 < sum(packed.counts["false_pairs"]) < sum(packed.counts["negative_pairs"])


@pytest.mark.parametrize("changes", [{}, {"interleave": 1}, {"oversize": "split", "batch_impressions": 4}])
def test_anonymous_requests_are_negatives_of_each_other(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Requests of null users are no user's: retrieval trains on them, and nothing takes them for one user's."""
    rows = [row | {"user_id": None} for row in shard_maker.random_rows(COUNTS[:12], 3)]
    rows = [row | {"item_id": [f"i{n}-{i}" for i in range(row["num_impressions"])]} for n, row in enumerate(rows)]
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    settings = replace(pack_settings(tmp_path), **({"batch_impressions": 60} | changes))
    packed = PackedBatches(pack_window(settings, window_of(manifest)), SCHEMA)
    towers: Any = SimpleNamespace(
        item="item", positive=0, training=False, log_q=False, temperature=1.0, scores=lambda pairs: pairs.sum(1)
    )
    trained = 0
    for row in range(packed.rows):
        batch = packed.batch(row)
        assert torch.equal(batch.user_key, batch.request_key)
        requests = set(batch.request_key.tolist())
        assert packed.counts["users"][row] == len(requests)
        assert packed.counts["crowded"][row] <= batch.num_requests - len(requests)
        pairs = torch.randn(batch.total_impressions, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        retrieval_loss(towers, pairs, batch, 1).backward()
        assert pairs.grad is not None
        trained += int((pairs.grad.abs().sum() > 0) and len(requests) > 1)
    assert trained > 0


def test_in_order_of_time(tmp_path: Path) -> None:
    rows = shard_maker.random_rows(COUNTS[:40], 3)
    manifest = shard_maker.write_data_set(tmp_path, rows, SCHEMA)
    window = replace(window_of(manifest, None), by_time=True)
    packed = PackedBatches(pack_window(pack_settings(tmp_path), window), SCHEMA)
    times = [time for row in range(packed.rows) for time in packed.batch(row).request_time.tolist()]
    assert times == sorted(times)
    assert len(times) == 40


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 6)), max_size=40))
def test_ranges_are_the_integers_from_each_start_on(lists: list[tuple[int, int]]) -> None:
    starts, lengths = np.array(lists, np.int64).reshape(-1, 2).T
    expected = [start + i for start, length in lists for i in range(length)]
    assert ranges(starts, lengths).tolist() == expected
