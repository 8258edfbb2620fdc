"""The builder on real files and real Ray: nothing lost, nothing half-published, one message for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_ray.config import Config, load_config
from roo_ray.errors import DataError
from roo_ray.requests.grouping import explode_requests
from roo_ray.requests.join import build_requests, default_buckets
from roo_ray.requests.ledger import ledger_metrics, ledger_table
from roo_ray.requests.manifest import load_manifest, manifest_versions, publish_manifest
from tests.requests.reference import schema, to_table
from tests.requests.test_grouping import base_row

ROOT = Path(__file__).parents[2]
DAY = 86_400_000_000


def quiet(line: str) -> None:
    """Progress goes nowhere."""


def log_rows(requests: int = 40) -> list[dict[str, Any]]:
    """A log of requests 0 .. n-1 over three days with 1 to 5 impressions each."""
    rows = []
    for number in range(requests):
        time = 1_700_000_000_000_000 + (number % 3) * DAY
        events = number % 4
        request = base_row(number=number, user=number % 5, time=time, note=f"n{number}")
        request |= {"history_item": list(range(events)), "dwell": [0.5] * events}
        request["history_time"] = [time - 1_000_000 * (events - i) for i in range(events)]
        rows += [request | {"item": i, "position": i, "clicked": i % 2} for i in range(1 + number % 5)]
    return rows


def write_log(folder: Path, rows: list[dict[str, Any]], files: int = 3) -> None:
    """The rows dealt to several files, so that requests span files and nothing is sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        pq.write_table(to_table(rows[number::files][::-1]), folder / f"part-{number}.parquet")


def config_for(folder: Path, **overrides: Any) -> Config:
    config = Config(
        name="test",
        request_schema=schema(),
        source={"kind": "impressions", "path": str(folder / "log")},  # type: ignore[arg-type]
        requests=str(folder / "requests"),
    )
    return config.model_copy(update=overrides)


def read_all(data_set: str, version: int | None = None) -> pa.Table:
    manifest = load_manifest(data_set, version)
    return pa.concat_tables(pq.read_table(f"{data_set}/{file.path}", partitioning=None) for file in manifest.files)


def test_build_loses_nothing_and_is_described(local_ray: None, tmp_path: Path) -> None:
    rows = log_rows()
    write_log(tmp_path / "log", rows)
    config = config_for(tmp_path)
    manifest = build_requests(config, quiet)
    assert (manifest.requests, manifest.impressions, manifest.version) == (40, len(rows), 1)
    assert manifest.tokens == sum(number % 4 for number in range(40))
    assert len(manifest.days) == 3
    table = read_all(config.requests)
    exploded = explode_requests(table, schema())
    expected = to_table(rows).select(schema().columns)
    assert sorted(map(repr, exploded.to_pylist())) == sorted(map(repr, expected.to_pylist()))
    for file in manifest.files:
        assert sum(unit.requests for unit in file.units) == file.requests
        assert sum(unit.impressions for unit in file.units) == file.impressions
        assert (Path(config.requests) / file.path).stat().st_size == file.bytes
    assert not (Path(config.requests) / "_staging").exists()
    assert manifest.request_schema() == schema()


def test_same_input_gives_the_same_bytes(local_ray: None, tmp_path: Path) -> None:
    rows = log_rows()
    write_log(tmp_path / "log", rows)
    config = config_for(tmp_path)
    contents = []
    for version in (1, 2):
        build_requests(config, quiet)
        if version == 1:
            write_log(tmp_path / "log", rows)  # the same again, written anew
        manifest = load_manifest(config.requests, version)
        files = {
            path.path.split("/", 2)[2]: (Path(config.requests) / path.path).read_bytes() for path in manifest.files
        }
        contents.append(files)
    assert contents[0] == contents[1]
    assert manifest_versions(config.requests) == [1, 2]


def test_ledger_is_arithmetic(local_ray: None, tmp_path: Path) -> None:
    rows = log_rows()
    write_log(tmp_path / "log", rows)
    ledger = build_requests(config_for(tmp_path), quiet).ledger
    history = ledger["columns"]["history_item"]["elements"]
    assert history == {"impression": sum(len(r["history_item"]) for r in rows), "request": 60}
    assert ledger["columns"]["age"]["elements"] == {"impression": len(rows), "request": 40}
    assert ledger["columns"]["item"]["elements"] == {"impression": len(rows), "request": len(rows)}
    assert ledger["columns"]["history_item"]["memory_bytes"]["request"] == 60 * 4
    footers = [pq.read_metadata(path) for path in (tmp_path / "log").glob("*.parquet")]
    logged = sum(f.row_group(0).column(i).total_compressed_size for f in footers for i in range(f.num_columns))
    assert ledger["totals"]["disk_bytes"]["impression"] == logged
    metrics = ledger_metrics(ledger)
    assert metrics["dedup_ratio_elements"] == pytest.approx(
        ledger["totals"]["elements"]["impression"] / ledger["totals"]["elements"]["request"]
    )
    header, table = ledger_table(ledger)
    assert all(len(row) == len(header) for row in table)
    assert table[-1][0] == "all"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clicked": 2}, r"column 'clicked', request session=a, number=7: a label is 2"),
        ({"age": 99.0}, r"column 'age' is request-level and varies within 1 requests; request session=a, number=7"),
        ({"item": 1}, r"1 duplicate impressions: request session=a, number=7 has item=1"),
        ({"history_item": [1, 2, 3, 4]}, "column 'history_item' is request-level and varies"),
    ],
)
def test_a_build_that_breaks_a_check_publishes_nothing(
    change: dict[str, Any], message: str, local_ray: None, tmp_path: Path
) -> None:
    rows = log_rows()
    victim = next(i for i, row in enumerate(rows) if row["number"] == 7 and row["position"] == 2)
    rows[victim] = rows[victim] | change
    write_log(tmp_path / "log", rows)
    config = config_for(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        build_requests(config, quiet)
    assert "Traceback" not in str(error.value)
    with pytest.raises(DataError, match="is not a request data set"):
        load_manifest(config.requests)
    assert not list(Path(config.requests).rglob("*.parquet"))
    assert not list(Path(config.requests).rglob("*.arrow"))


def test_a_failed_rebuild_leaves_the_old_version(local_ray: None, tmp_path: Path) -> None:
    write_log(tmp_path / "log", log_rows())
    config = config_for(tmp_path)
    build_requests(config, quiet)
    before = read_all(config.requests)
    write_log(tmp_path / "log", [*log_rows(), base_row(number=999, clicked=5)])
    with pytest.raises(DataError, match="a label is 5"):
        build_requests(config, quiet)
    assert manifest_versions(config.requests) == [1]
    assert read_all(config.requests).equals(before)


def test_second_writer_of_a_version_is_refused(local_ray: None, tmp_path: Path) -> None:
    write_log(tmp_path / "log", log_rows())
    config = config_for(tmp_path)
    manifest = build_requests(config, quiet)
    with pytest.raises(DataError, match="version 1 was published by another writer"):
        publish_manifest(config.requests, manifest)


def test_broken_inputs_are_named(local_ray: None, tmp_path: Path) -> None:
    config = config_for(tmp_path)
    with pytest.raises(DataError, match=r"source not found: .*log"):
        build_requests(config, quiet)
    write_log(tmp_path / "log", log_rows())
    victim = tmp_path / "log/part-1.parquet"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-1\.parquet is not a complete Parquet file"):
        build_requests(config, quiet)
    table = pq.read_table(pa.BufferReader(whole))
    pq.write_table(table.drop_columns(["age"]), victim)
    with pytest.raises(DataError, match=r"part-1\.parquet: column 'age' of the schema is missing \(in 1 of 3 files\)"):
        build_requests(config, quiet)
    ages = table.column("age").cast(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("age"), "age", ages), victim)
    with pytest.raises(DataError, match=r"column 'age' has type float in .*part-0.* and string in .*part-1"):
        build_requests(config, quiet)


def test_real_ebnerd(local_ray: None, ebnerd_folder: Path, tmp_path: Path) -> None:
    config = load_config(
        ROOT / "configs/ebnerd.yaml", [f"source.path={ebnerd_folder}", f"requests={tmp_path}/requests"]
    )
    manifest = build_requests(config, quiet)
    assert (manifest.requests, manifest.impressions) == (1046, 10848)
    table = read_all(config.requests)
    assert sum(sum(clicks) for clicks in table.column("clicked").to_pylist()) == round(0.0965 * 10848)
    lengths = [len(items) for items in table.column("article_id_fixed").to_pylist()]
    assert sum(lengths) / len(lengths) == pytest.approx(369, abs=1)
    behaviors = pq.read_table(ebnerd_folder / "behaviors.parquet")
    shown = {(r["impression_id"], r["user_id"]): r["article_ids_inview"] for r in behaviors.to_pylist()}
    for row in table.select(["impression_id", "user_id", "article_id_inview"]).to_pylist():
        assert sorted(shown[row["impression_id"], row["user_id"]]) == sorted(row["article_id_inview"])


def test_repeated_request_keys_of_a_request_source_are_refused(
    local_ray: None, ebnerd_folder: Path, tmp_path: Path
) -> None:
    """As in the full data set, where 200,000 rows share impression_id 0."""
    behaviors = pq.read_table(ebnerd_folder / "behaviors.parquet")
    pq.write_table(pa.concat_tables([behaviors, behaviors.slice(0, 3)]), tmp_path / "behaviors.parquet")
    (tmp_path / "history.parquet").write_bytes((ebnerd_folder / "history.parquet").read_bytes())
    config = load_config(ROOT / "configs/ebnerd.yaml", [f"source.path={tmp_path}", f"requests={tmp_path}/requests"])
    with pytest.raises(DataError, match=r"requests repeat the key of another.*name more columns in keys\.request"):
        build_requests(config, quiet)


def test_number_of_buckets_follows_the_size() -> None:
    assert default_buckets(1) == 1
    assert default_buckets(20_000_000) == 3
    assert default_buckets(300_000_000) == 4
    assert default_buckets(128_000_000_000) == 1000
