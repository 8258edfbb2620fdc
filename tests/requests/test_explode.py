"""Request shards back to impressions: the input again, up to row order, whatever its types, nulls and lists."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.config import Build
from roo_ray.errors import DataError
from roo_ray.requests.explode import ExplodePlan, explode_data_set, explode_file
from roo_ray.requests.grouping import group_impressions
from roo_ray.requests.manifest import Manifest, publish_manifest
from roo_ray.requests.shards import write_options, write_shards
from roo_ray.schema import parse_schema
from tests.requests.tables import Row, canonical, impression_logs, impression_row, request_row, small_schema, table_of

SCHEMA = small_schema()
OPTIONS = write_options(Build(row_group_requests=2))

TYPES = [
    (pa.int8(), st.integers(-128, 127)),
    (pa.uint16(), st.integers(0, 2**16 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    (pa.bool_(), st.booleans()),
    (pa.string(), st.text(max_size=4)),
    (pa.binary(), st.binary(max_size=4)),
    (pa.date32(), st.dates()),
    (pa.timestamp("ms"), st.integers(0, 10**12)),
    (pa.timestamp("ns", tz="UTC"), st.integers(0, 10**18)),
    (pa.struct([("a", pa.int16()), ("b", pa.list_(pa.string()))]), st.builds(lambda a, b: {"a": a, "b": b},
        st.one_of(st.none(), st.integers(-9, 9)), st.one_of(st.none(), st.lists(st.text(max_size=2), max_size=2)))),
    (pa.list_(pa.list_(pa.int32())), st.lists(st.one_of(st.none(), st.lists(st.integers(-9, 9), max_size=2)),
        max_size=3)),
]  # fmt: skip
NESTED = """
name: nested
keys: {request: [rid], user: user, time: time}
tables: {word: {rows: 50, dim: 4, hash: true}}
features: [{name: user, level: request, kind: ids, columns: user, table: word}]
labels: [{name: click, column: click}]
carry: {request: [shared], impression: [own]}
"""


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """Hundreds of tiny files: what a power failure would leave of them is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def publish(folder: Path, impressions: pa.Table, schema: object = SCHEMA) -> Manifest:
    """A version made of an impression table, without Ray."""
    requests = group_impressions(impressions, schema)  # type: ignore[arg-type]
    files = [file for file, _ in write_shards(requests, schema, OPTIONS, str(folder), 1, 0)]  # type: ignore[arg-type]
    text, digest = schema.to_yaml(), schema.digest  # type: ignore[attr-defined]
    manifest = Manifest(version=1, schema_yaml=text, schema_digest=digest, files=files)
    publish_manifest(str(folder), manifest)
    return manifest


def exploded(folder: Path, manifest: Manifest) -> pa.Table:
    """All its impressions, by the tasks of the job."""
    out = folder / "out"
    out.mkdir()
    plan = ExplodePlan(str(folder), manifest.request_schema(), str(out), 1)
    for number, file in enumerate(manifest.files):
        assert explode_file(plan, file, number).impressions == file.impressions
    tables = [pq.read_table(path) for path in sorted(out.glob("*.parquet"))]
    return pa.concat_tables(tables)


@settings(deadline=None, max_examples=40)
@given(impression_logs())
def test_build_then_explode_gives_the_log_again(rows: list[Row]) -> None:
    if not rows:
        return
    table = table_of(rows).select(SCHEMA.columns)
    folder = Path(tempfile.mkdtemp())
    try:
        back = exploded(folder, publish(folder, table))
    finally:
        shutil.rmtree(folder)
    assert back.schema.equals(table.schema)
    assert canonical(back) == canonical(table)


@st.composite
def typed_logs(draw: st.DrawFn) -> pa.Table:
    """A log with a request-level and an impression-level column of any type, nulls among the values."""
    (shared_type, shared), (own_type, own) = draw(st.sampled_from(TYPES)), draw(st.sampled_from(TYPES))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    requests = [number for number, size in enumerate(sizes) for _ in range(size)]
    values = [draw(st.one_of(st.none(), shared)) for _ in sizes]
    own_values = [draw(st.one_of(st.none(), own)) for _ in requests]
    return pa.table(
        {
            "rid": pa.array(requests, pa.uint32()),
            "user": pa.array([number % 3 for number in requests], pa.int16()),
            "time": pa.array([10**9 + 40_000 * number for number in requests], pa.int64()),
            "shared": pa.array([values[number] for number in requests], shared_type),
            "click": pa.array([draw(st.sampled_from([0, 1, None])) for _ in requests], pa.int8()),
            "own": pa.array(own_values, own_type),
        }
    )


@settings(deadline=None, max_examples=40)
@given(typed_logs())
def test_every_type_comes_back_as_it_was(table: pa.Table) -> None:
    schema = parse_schema(NESTED)
    folder = Path(tempfile.mkdtemp())
    try:
        back = exploded(folder, publish(folder, table, schema))
    finally:
        shutil.rmtree(folder)
    assert back.schema.equals(table.select(schema.columns).schema)
    assert canonical(back) == canonical(table)


def log(requests: int = 20) -> list[Row]:
    return [impression_row(request_row(n), item) for n in range(requests) for item in range(1 + n % 4)]


def test_the_table_is_complete_or_absent(tmp_path: Path, local_ray: None) -> None:
    table = table_of(log()).select(SCHEMA.columns)
    data_set, out = tmp_path / "requests", tmp_path / "out"
    manifest = publish(data_set, table)
    left = tmp_path / "out.incomplete" / "dead"
    left.mkdir(parents=True)
    (left / "part-00000.parquet").write_bytes(b"half")
    done = explode_data_set(str(data_set), str(out), lambda line: None)
    assert (done.files, done.impressions, done.version) == (len(manifest.files), table.num_rows, 1)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["_SUCCESS", *(f"part-{number:05d}.parquet" for number in range(done.files))]
    assert done.bytes == sum(path.stat().st_size for path in out.glob("*.parquet"))
    assert not left.parent.exists()
    back = pq.read_table(out)
    assert back.schema.equals(table.schema)
    assert canonical(back) == canonical(table)
    with pytest.raises(DataError, match="out is not empty; name another folder"):
        explode_data_set(str(data_set), str(out), lambda line: None)

    (data_set / manifest.files[-1].path).write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="is truncated or damaged"):
        explode_data_set(str(data_set), str(tmp_path / "second"), lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "requests"]
