"""Builds through Ray Data: nothing lost, the same bytes twice, and a build that fails leaves nothing."""

import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_ray.config import Build, Config, load_config
from roo_ray.errors import BadInput, ConfigError, DataError
from roo_ray.requests import join
from roo_ray.requests.grouping import explode_requests, group_impressions
from roo_ray.requests.join import build_requests
from roo_ray.requests.ledger import ledger_metrics
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.requests.shards import read_row_group
from roo_ray.source_config import EbnerdSource, ImpressionSource
from tests.requests.tables import Row, canonical, impression_row, request_row, small_schema, table_of

ROOT = Path(__file__).parents[2]
SCHEMA = small_schema()
pytestmark = pytest.mark.usefixtures("local_ray")


def log_rows(requests: int = 60) -> list[Row]:
    rows = [impression_row(request_row(n), item) for n in range(requests) for item in range(1 + n % 7)]
    random.Random(0).shuffle(rows)
    return rows


def write_log(folder: Path, rows: list[Row], files: int = 3) -> None:
    """An unsorted log whose requests span files and row groups."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        table = table_of(rows[number::files])
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=20, compression="zstd")


def config(folder: Path, **build: Any) -> Config:
    return Config(
        name="test",
        schema=SCHEMA,
        source=ImpressionSource(kind="impressions", path=[str(folder / "log")]),
        requests=str(folder / "requests"),
        build=Build(row_group_requests=4, **build),
    )


def build(settings: Config) -> Manifest:
    return build_requests(settings, lambda line: None)


def read_all(data_set: str, manifest: Manifest) -> pa.Table:
    units = [(file.path, unit) for file in manifest.files for unit in range(len(file.units))]
    return pa.concat_tables(read_row_group(data_set, *unit) for unit in units)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_unsorted_log_in_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = log_rows()
    rows[0]["click"] = None
    write_log(tmp_path / "log", rows)
    monkeypatch.setattr("roo_ray.sources.base.UNIT_BYTES", 1)  # every row group a unit of its own
    lines: list[str] = []
    settings = config(tmp_path, buckets=5)
    manifest = build_requests(settings, lines.append)
    assert manifest == load_manifest(settings.requests)
    assert any("60 requests" in line for line in lines)

    stored = read_all(settings.requests, manifest)
    assert canonical(explode_requests(stored, SCHEMA)) == canonical(table_of(rows).select(SCHEMA.columns))
    assert canonical(stored) == canonical(group_impressions(table_of(rows), SCHEMA))
    expected = {
        "units_read": 12,
        "rows_read": len(rows),
        "impressions_read": len(rows),
        "impressions": len(rows),
        "requests": 60,
        "null_labels": 1,
        "empty_histories": 15,
        "leaking_history_events": 0,
    }
    assert {name: manifest.counts[name] for name in expected} == expected
    assert (manifest.requests, manifest.impressions, manifest.version) == (60, len(rows), 1)
    assert manifest.tokens == sum(n % 4 for n in range(60))
    assert manifest.request_schema().digest == manifest.schema_digest == SCHEMA.digest
    assert len({file.path.rsplit("/", 1)[1] for file in manifest.files}) > 1
    found = files_below(tmp_path / "requests")
    assert found == sorted(["_manifests/v000001.json", *(file.path for file in manifest.files)])

    totals = manifest.ledger["columns"]
    assert totals["age"]["elements"] == {"impression": len(rows), "request": 60}
    events = sum((n % 4) * (1 + n % 7) for n in range(60))
    assert totals["h_item"]["elements"] == {"impression": events, "request": manifest.tokens}
    footers = [pq.read_metadata(path) for path in (tmp_path / "log").glob("*.parquet")]
    logged = [m.row_group(g).column(0).total_compressed_size for m in footers for g in range(m.num_row_groups)]
    assert totals["rid"]["disk_bytes"]["impression"] == sum(logged)
    shards = [pq.read_metadata(tmp_path / "requests" / file.path) for file in manifest.files]
    stored_bytes = [m.row_group(g).column(0).total_compressed_size for m in shards for g in range(m.num_row_groups)]
    assert totals["rid"]["disk_bytes"]["request"] == sum(stored_bytes)
    assert ledger_metrics(manifest.ledger)["dedup_ratio_elements"] > 1


def test_a_second_build_is_a_new_version_of_the_same_bytes(tmp_path: Path) -> None:
    rows = log_rows()
    write_log(tmp_path / "log", rows)
    settings = config(tmp_path, buckets=3)
    first = build(settings)
    before = {path: (tmp_path / "requests" / path).read_bytes() for path in files_below(tmp_path / "requests")}
    write_log(tmp_path / "log", sorted(rows, key=lambda row: row["item"]), files=3)  # another order
    second = build(settings)
    assert (first.version, second.version) == (1, 2)
    assert load_manifest(settings.requests) == second
    assert load_manifest(settings.requests, 1) == first
    for path, content in before.items():
        assert (tmp_path / "requests" / path).read_bytes() == content
    assert len(first.files) == len(second.files)
    for one, other in zip(first.files, second.files, strict=True):
        assert other.path == one.path.replace("v000001", "v000002")
        assert before[one.path] == (tmp_path / "requests" / other.path).read_bytes()


def test_ebnerd(ebnerd_folder: Path, tmp_path: Path) -> None:
    whole = load_config(ROOT / "configs" / "ebnerd.yaml", [f"requests={tmp_path / 'requests'}"])
    settings = whole.model_copy(update={"source": EbnerdSource(kind="ebnerd", path=str(ebnerd_folder))})
    manifest = build(settings)
    assert (manifest.requests, manifest.impressions) == (1046, 10_848)
    assert manifest.counts["impressions_read"] == manifest.counts["impressions"] == 10_848
    assert manifest.counts["requests_without_history"] == 0
    assert manifest.counts["leaking_history_events"] == 0
    behaviors = pq.read_table(ebnerd_folder / "behaviors.parquet").to_pylist()
    history = pq.read_table(ebnerd_folder / "history.parquet").to_pylist()
    events = {row["user_id"]: row["article_id_fixed"] for row in history}
    stored = read_all(settings.requests, manifest).to_pylist()
    key = ("impression_id", "user_id", "impression_time")
    by_key = {tuple(row[name] for name in key): row for row in stored}
    assert len(by_key) == len(behaviors)
    for row in behaviors:
        request = by_key[tuple(row[name] for name in key)]
        assert request["article_id_inview"] == row["article_ids_inview"]
        shown = zip(request["article_id_inview"], request["clicked"], strict=True)
        assert {article for article, click in shown if click} == set(row["article_ids_clicked"])
        assert request["article_id_fixed"] == events[row["user_id"]]
    assert manifest.tokens == sum(len(events[row["user_id"]]) for row in behaviors)
    sizes = manifest.ledger["totals"]["disk_bytes"]
    assert sizes["request"] > 0
    assert sizes["impression"] > sizes["request"]
    assert "exploded" in manifest.ledger["how"]


def wrong_click(rows: list[Row]) -> None:
    rows[17]["click"] = 2


def conflict(rows: list[Row]) -> None:
    next(row for row in rows if row["rid"] == "r6" and row["item"] == 2)["age"] = 99.0


def duplicate(rows: list[Row]) -> None:
    rows.append(dict(next(row for row in rows if row["rid"] == "r6")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_click, r"^column 'click': 1 values are neither 0 nor 1"),
        (conflict, r"^column 'age' varies within 1 requests \(first: rid=r6, shard=0"),
        (
            duplicate,
            r"^1 impressions repeat the key of another one of their request \(first: item=\d in request rid=r6",
        ),
    ],
)
def test_a_failing_check_publishes_and_leaves_nothing(
    spoil: Callable[[list[Row]], None], message: str, tmp_path: Path
) -> None:
    rows = log_rows()
    spoil(rows)
    write_log(tmp_path / "log", rows)
    settings = config(tmp_path, buckets=4)
    with pytest.raises(DataError, match=message) as caught:
        build(settings)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match="is not a request data set"):
        load_manifest(settings.requests)
    assert list((tmp_path / "requests").iterdir()) == []

    write_log(tmp_path / "log", log_rows())
    good = build(settings)
    write_log(tmp_path / "log", rows)
    before = files_below(tmp_path / "requests")
    with pytest.raises(DataError, match=message):
        build(settings)
    assert load_manifest(settings.requests) == good  # readers keep the version before
    assert files_below(tmp_path / "requests") == before


def test_conflicts_settled_by_config_are_counted(tmp_path: Path) -> None:
    rows = log_rows()
    conflict(rows)
    write_log(tmp_path / "log", rows)
    manifest = build(config(tmp_path, on_request_conflict="first"))
    assert manifest.counts["request_conflicts.age"] == 1
    stored = read_all(str(tmp_path / "requests"), manifest).to_pylist()
    assert next(row["age"] for row in stored if row["rid"] == "r6") == 26.0
    assert manifest.impressions == len(rows)


def test_bad_files_stop_the_build_before_anything_is_written(tmp_path: Path) -> None:
    write_log(tmp_path / "log", log_rows())
    bad = tmp_path / "log" / "part-1.parquet"
    content, table = bad.read_bytes(), pq.read_table(bad)
    settings = config(tmp_path)

    bad.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"part-1\.parquet is not a complete Parquet file"):
        build(settings)
    pq.write_table(table.drop_columns("note"), bad)
    with pytest.raises(DataError, match=r"part-1\.parquet: column 'note' of the schema is missing"):
        build(settings)
    pq.write_table(table.set_column(1, "shard", table["shard"].cast(pa.string())), bad)
    with pytest.raises(DataError, match=r"column 'shard' has type int64 in .*part-0.* and string in .*part-1"):
        build(settings)
    assert not (tmp_path / "requests").exists()

    damaged = bytearray(content)
    damaged[4:400] = b"\xff" * 396  # the footer is whole, the pages are not: found by a task
    bad.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"^.*part-1\.parquet cannot be read") as caught:
        build(settings)
    assert "Traceback" not in str(caught.value)
    assert list((tmp_path / "requests").iterdir()) == []


def test_types_that_the_schema_cannot_use(tmp_path: Path) -> None:
    write_log(tmp_path / "log", log_rows(), files=1)
    path = tmp_path / "log" / "part-0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(14, "click", table["click"].cast(pa.string())), path)
    with pytest.raises(DataError, match="column 'click' has type string, but label 'click' needs 0, 1 or null"):
        build(config(tmp_path))


def test_lost_rows_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The accounting: a stage that loses rows (here the driver drops a bucket's result) publishes nothing."""
    write_log(tmp_path / "log", log_rows())
    whole = join.run_tasks

    def lossy(plan: Any, what: str, *rest: Any) -> list[Any]:
        results = whole(plan, what, *rest)
        return results[1:] if what == "writing" else results

    monkeypatch.setattr(join, "run_tasks", lossy)
    with pytest.raises(Exception, match="rows were lost or doubled"):
        build(config(tmp_path, buckets=4))
    assert list((tmp_path / "requests").iterdir()) == []


def test_two_builds_at_once_and_what_a_killed_one_left(tmp_path: Path) -> None:
    write_log(tmp_path / "log", log_rows())
    settings = config(tmp_path)
    left = [
        tmp_path / "requests" / "data" / "v000001" / "day=2023-02-27" / "part-00099.parquet",
        tmp_path / "requests" / "_staging" / "dead" / "unit-000000.arrow",
    ]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    lock = os.open(tmp_path / "requests", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another build is writing .*requests; wait for it or stop it"):
            build(settings)
        assert all(path.exists() for path in left)
    finally:
        os.close(lock)
    manifest = build(settings)
    assert manifest.version == 1
    assert not any(path.exists() for path in left)


def test_config_mistakes(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with pytest.raises(ConfigError, match="no 'source' section"):
        build(settings.model_copy(update={"source": None}))
    with pytest.raises(ConfigError, match="are the same folder"):
        build(settings.model_copy(update={"requests": str(tmp_path / "log")}))
    with pytest.raises(BadInput, match="source not found"):
        build(settings)
