"""Impression sources: listing, units, pieces of bounded size, and one clear error for each kind of bad file."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_ray.errors import DataError
from roo_ray.schema import parse_schema
from roo_ray.source_config import ImpressionSource
from roo_ray.sources import base, open_source
from roo_ray.sources.base import plain_type, read
from roo_ray.sources.impressions import ImpressionLog, open_impressions

SCHEMA = parse_schema(
    "{name: s, keys: {request: rid, user: user, time: time}, tables: {t: {rows: 9, dim: 1, hash: true}}, "
    "features: [{name: f, level: impression, kind: ids, columns: word, table: t}, "
    "{name: h, level: request, kind: ids, columns: tags, table: t, pooling: sum}], "
    "labels: [{name: c, column: click}]}"
)


def table(count: int, start: int = 0) -> pa.Table:
    number = np.arange(start, start + count)
    return pa.table(
        {
            "unused": number,
            "click": number % 2,
            "word": [f"w{n}" for n in number],
            "rid": number // 3,
            "user": number // 6,
            "time": pa.array(number, pa.timestamp("us")),
            "tags": [[int(n)] * int(n % 3) for n in number],
        }
    )


def rows(source: ImpressionLog) -> pa.Table:
    return pa.concat_tables(read(source, unit) for unit in source.units())


def test_units_hold_every_row_once_with_the_schemas_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, start in (("b", 0), ("a/deep", 50), ("_logs", 900), (".hidden", 900)):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(table(50, start), tmp_path / folder / "part.parquet", row_group_size=7)
    pq.write_table(table(9, 900), tmp_path / "_part.parquet")
    (tmp_path / "README.txt").write_text("no Parquet")
    monkeypatch.setattr(base, "UNIT_BYTES", 1000)
    source = open_source(ImpressionSource(kind="impressions", path=str(tmp_path)), SCHEMA)
    units = source.units()
    assert len(units) == 8  # of 16 row groups
    assert [unit.index for unit in units] == list(range(len(units)))
    assert sum(unit.rows for unit in units) == 100
    source = pickle.loads(pickle.dumps(source))
    expected = pa.concat_tables([table(50, 50), table(50, 0)]).select(SCHEMA.columns)
    found = rows(source)
    assert found.schema == source.row_schema == expected.schema
    assert found.equals(expected)
    disk = source.disk_bytes()
    assert disk is not None
    assert set(disk) == set(SCHEMA.columns)
    sizes = [pq.read_metadata(tmp_path / f / "part.parquet") for f in ("b", "a/deep")]
    word = [m.row_group(g).column(2).total_compressed_size for m in sizes for g in range(m.num_row_groups)]
    assert disk["word"] == sum(word)
    assert source.codec == "snappy"


def test_a_large_row_group_comes_in_pieces(tmp_path: Path) -> None:
    pq.write_table(table(5000), tmp_path / "a.parquet")
    source = open_impressions([str(tmp_path / "a.parquet")], SCHEMA)
    (unit,) = source.units()
    sizes = [batch.num_rows for batch in base.stream_unit(unit, SCHEMA.columns, unit.bytes // 10)]
    assert sum(sizes) == 5000
    assert max(sizes) <= 500


def test_memory_is_estimated_through_dictionaries(tmp_path: Path) -> None:
    """Bytes in memory, where a dictionary hides them on disk: within a factor of two."""
    rng = np.random.default_rng(0)
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(0, 200_001, 100), pa.int32()), pa.array(rng.integers(0, 5, 200_000))
    )
    content = pa.table({"lists": lists, "number": np.zeros(2000)})
    pq.write_table(content, tmp_path / "a.parquet")
    (estimate,) = base.memory_estimate(pq.read_metadata(tmp_path / "a.parquet"), {"lists", "number"})
    assert 0.5 < estimate / content.nbytes < 2


def test_storage_variants_agree_and_nulls_fit_any_type(tmp_path: Path) -> None:
    """Dictionaries, large lists and strings, and a column that is all null in one file."""
    plain = table(6)
    large = plain.set_column(2, "word", plain["word"].cast(pa.large_string()).dictionary_encode())
    large = large.set_column(6, "tags", plain["tags"].cast(pa.large_list(pa.int64())))
    nulls = plain.set_column(1, "click", pa.nulls(6))
    for name, content in (("a", nulls), ("b", plain), ("c", large)):
        pq.write_table(content, tmp_path / f"{name}.parquet")
    source = open_impressions([str(tmp_path)], SCHEMA)
    found = rows(source)
    assert found.schema == plain.select(SCHEMA.columns).schema
    assert found.slice(6, 6).equals(plain.select(SCHEMA.columns))
    assert found.slice(12).equals(plain.select(SCHEMA.columns))
    assert found.slice(0, 6)["click"].null_count == 6
    assert plain_type(pa.list_(pa.list_(pa.large_string()), 2)) == pa.list_(pa.list_(pa.string()))


def test_bad_inputs_are_one_error_that_names_the_file(tmp_path: Path) -> None:
    for name in "abc":
        pq.write_table(table(9), tmp_path / f"{name}.parquet")
    bad = tmp_path / "b.parquet"
    content = bad.read_bytes()

    def refuse(message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_impressions([str(tmp_path)], SCHEMA)

    bad.write_bytes(content[: len(content) // 2])
    refuse(r"b\.parquet is not a complete Parquet file")
    bad.write_bytes(b"")
    refuse(r"b\.parquet is not a complete Parquet file")
    bad.write_text("user,time\n1,2\n")
    refuse(r"b\.parquet is not a complete Parquet file")
    pq.write_table(table(9).drop_columns("user"), bad)
    refuse(r"b\.parquet: column 'user' of the schema is missing \(in 1 of 3 files\)")
    pq.write_table(table(9).rename_columns(["unused", "clicked", "word", "rid", "user", "time", "tags"]), bad)
    refuse(r"b\.parquet: column 'click' of the schema is missing .*did you mean 'clicked'\?")
    wrong = table(9)
    pq.write_table(wrong.set_column(1, "click", wrong["click"].cast(pa.string())), bad)
    refuse(r"column 'click' has type int64 in .*a\.parquet and string in .*b\.parquet; write all files with one")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source not found: .*nowhere"):
        open_impressions([str(tmp_path / "nowhere")], SCHEMA)
    with pytest.raises(DataError, match=r"holds no Parquet files"):
        open_impressions([str(tmp_path)], SCHEMA)
    pq.write_table(table(0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"1 Parquet files without a single row"):
        open_impressions([str(tmp_path)], SCHEMA)


def test_pages_that_are_damaged_behind_a_good_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(2000), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = b"\x00" * (len(content) // 2 - 4)
    path.write_bytes(bytes(content))
    source = open_impressions([str(path)], SCHEMA)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        rows(source)
