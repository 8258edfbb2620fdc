"""Parcels: what travels together is each window once, in order, of one rank, up to a size."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.config import Holdout, Ingest
from roo_ray.ingest.clustered import index_impressions
from roo_ray.ingest.pack import pack_window
from roo_ray.ingest.parcels import PARCEL_BYTES, PackedSize, parcel_bytes, parcels, split_parcel
from roo_ray.ingest.plan import Window
from roo_ray.ingest.stream import StreamSettings
from roo_ray.ingest.units import UnitRef
from tests.ingest import shard_maker
from tests.ingest.shard_maker import Row
from tests.requests.tables import START, impression_row, request_row, small_schema, table_of

SIZE = PackedSize(shard_maker.schema())


def windows(impressions: list[int], lanes: int) -> list[Window]:
    """A window of each number of impressions, dealt to lanes in turn."""
    return [
        Window(0, i % lanes, i // lanes, (UnitRef("f", i, 1, None, count, count),), None)
        for i, count in enumerate(impressions)
    ]


@given(
    st.lists(st.integers(1, 5000), max_size=120),
    st.integers(1, 6),
    st.integers(1, 200_000),
    st.integers(1, 9),
    st.data(),
)
def test_every_window_travels_once_in_order_and_within_the_size(
    impressions: list[int], lanes: int, most_bytes: int, most_windows: int, data: st.DataObject
) -> None:
    owner = {lane: data.draw(st.integers(0, lanes - 1)) for lane in range(lanes)}
    given_ = windows(impressions, lanes)
    made = list(parcels(given_, owner, SIZE, most_bytes, most_windows))
    for rank in range(lanes):
        mine = [parcel for parcel in made if parcel.rank == rank]
        assert [w for parcel in mine for w in parcel.windows] == [w for w in given_ if owner[w.lane] == rank]
        assert all(len(parcel.windows) <= 2**i for i, parcel in enumerate(mine))
    for parcel in made:
        assert 0 < len(parcel.windows) <= most_windows
        assert parcel.bytes == sum(SIZE.of(w.units) for w in parcel.windows)
        assert parcel.bytes <= most_bytes or len(parcel.windows) == 1


def test_a_rank_that_has_everything_gets_full_parcels() -> None:
    made = list(parcels(windows([1000] * 100, 2), {0: 0, 1: 0}, SIZE, most_bytes=10**9, most_windows=16))
    assert [len(parcel.windows) for parcel in made] == [1, 2, 4, 8, 16, 16, 16, 16, 16, 5]


def test_the_parcels_of_many_ranks_fit_into_a_small_object_store() -> None:
    assert parcel_bytes(200e9, 2) == PARCEL_BYTES
    assert parcel_bytes(500e6, 8) * 8 * 8 <= 500e6
    assert parcel_bytes(0, 8) == 0  # a window each
    assert {len(p.windows) for p in parcels(windows([10] * 9, 2), {0: 0, 1: 1}, SIZE, most_bytes=0)} == {1}


def test_the_estimate_is_near_what_is_packed(data: tuple[StreamSettings, list[Row]]) -> None:
    """Bags and lists are short here, so lengths and tags weigh more than in real data; an estimate, all the same."""
    packing, (plan, *_) = data[0].open()
    some = list(plan.reading_order(range(4)))
    real = sum(pack_window(packing, window).nbytes for window in some)
    assert 0.4 < sum(PackedSize(data[0].schema).of(window.units) for window in some) / real < 1.5


def test_the_estimate_of_an_impression_table_is_near_too(tmp_path: Path) -> None:
    """Whose index knows the mean history of requests; most of the bytes are histories here. Uneven ends: the last
    unit is a small one."""
    history = {"h_item": list(range(40)), "h_dwell": [0.5] * 40, "h_time": [START] * 40}
    rows = [impression_row(request_row(r, **history), n) for r in range(70) for n in range(1 + r % 3)]
    (tmp_path / "log").mkdir()
    pq.write_table(table_of(rows), tmp_path / "log/a.parquet")
    schema = small_schema(lambda text: text.replace("max_length: 8", "max_length: 40"))
    manifest = index_impressions(str(tmp_path / "index"), [str(tmp_path / "log")], schema, unit_requests=16)
    (file,) = manifest.files
    assert [unit.tokens for unit in file.units] == [40 * unit.requests for unit in file.units]
    assert file.tokens == 40 * 70
    ingest = Ingest(lanes=2, batch_impressions=50, window_units=2, reader="thread")
    everything = Holdout(by="all")
    how = StreamSettings(str(tmp_path / "index"), 1, schema, ingest, everything, "evaluation", 0, (0,), "sequential")
    packing, (plan, *_) = how.open()
    some = list(plan.reading_order(range(2)))
    real = sum(pack_window(packing, window).nbytes for window in some)
    assert 0.4 < sum(PackedSize(schema).of(window.units) for window in some) / real < 1.5


@pytest.mark.parametrize("one_chunk", [False, True])
def test_a_parcel_is_split_into_its_windows_without_a_copy(
    data: tuple[StreamSettings, list[Row]], one_chunk: bool
) -> None:
    """Also where Ray has joined its chunks; windows of different lanes, epochs and numbers of batches."""
    packing, plans = data[0].open()
    packed = [pack_window(packing, window) for plan in plans for window in list(plan.reading_order([0, 2]))[:4]]
    table = pa.concat_tables(packed)
    table = table.combine_chunks() if one_chunk else table
    parts = list(split_parcel(table))
    for part, window in zip(parts, packed, strict=True):
        assert part.drop_columns(["oracle"]).equals(window.drop_columns(["oracle"]))  # that has NaNs
    held = {chunk.values.buffers()[1].address for chunk in table.column("labels").chunks}
    assert {part.column("labels").chunk(0).values.buffers()[1].address for part in parts} == held
    assert all(part.column("labels").num_chunks == 1 for part in parts)
    assert all(
        a.column("window")[0] != b.column("window")[0] or a.column("lane")[0] != b.column("lane")[0]
        for a, b in pairwise(parts)
    )
