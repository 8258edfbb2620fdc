"""The new sources through the build itself: published request shards equal what the source says, counts included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_ray.config import Build, Config, load_config
from roo_ray.errors import DataError
from roo_ray.requests.join import build_requests
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.requests.shards import read_row_group
from roo_ray.schema import Schema
from roo_ray.sources import open_source
from tests.requests.tables import canonical
from tests.sources import test_kuairand as kuairand_files
from tests.sources import test_mind as mind_files
from tests.sources.joined import assemble
from tests.sources.made_logs import SCHEMA, click, dwell, impression, purchase, request, source_of, write_logs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("local_ray")


def built(folder: Path, schema: Schema, source: Any, **build: Any) -> tuple[Manifest, pa.Table]:
    """The published version, and all its request rows."""
    target = str(folder / "requests-out")
    config = Config(name="t", schema=schema, source=source, requests=target, build=Build(**build))
    manifest = build_requests(config, lambda line: None)
    assert manifest == load_manifest(target)
    units = [(file.path, unit) for file in manifest.files for unit in range(len(file.units))]
    return manifest, pa.concat_tables(read_row_group(target, *unit) for unit in units)


def equal_to_the_source(manifest: Manifest, rows: pa.Table, schema: Schema, source: Any) -> None:
    """Rows, counts and rows kept aside are those of the join in one process."""
    expected = assemble(open_source(source, schema))  # type: ignore[arg-type]
    assert canonical(rows.select(schema.columns)) == canonical(expected.rows)
    assert {name: manifest.counts[name] for name in expected.counts} == expected.counts
    assert {reason: kept.rows for reason, kept in manifest.aside.items()} == {
        reason: table.num_rows for reason, table in expected.aside.items()
    }
    assert manifest.requests == expected.rows.num_rows


def test_building_event_logs(tmp_path: Path) -> None:
    shown = [impression(n, item, item, 1000 * n) for n in range(42) for item in range(1 + n % 4)]
    logs = {
        "requests": [request(n, 1000 * n) for n in range(40)] + [request(3, 3000), request(90, 5)],
        "impressions": shown,
        "clicks": [click(n, 0, 1000 * n + 300 * n) for n in range(45)] + [click(5, 77, 9000)],
        "dwell": [dwell(n, 1, 1000 * n + 5, float(n)) for n in range(40)],
        "purchases": [purchase(7, 1, 9000), purchase(7, 2, 6999)],
    }
    write_logs(tmp_path, files=2, **logs)
    source = source_of(tmp_path)
    manifest, rows = built(tmp_path, SCHEMA, source)
    equal_to_the_source(manifest, rows, SCHEMA, source)
    assert manifest.counts["impressions_without_request"] == 3  # requests 40 and 41
    assert manifest.counts["requests_without_impressions"] == 1
    assert manifest.counts["events_after_window.clicked"] > 0
    (kept,) = manifest.aside["events_without_impression.clicks"].files
    assert pq.read_table(tmp_path / "requests-out" / kept).column("item_id").to_pylist() == ["i77"]
    broken = [*logs["requests"], request(4, 4000, age=1.0)]
    write_logs(tmp_path, files=2, **(logs | {"requests": broken}))
    with pytest.raises(DataError, match=r"two rows for request_id=r4 that differ in column 'age'"):
        built(tmp_path, SCHEMA, source)
    assert load_manifest(str(tmp_path / "requests-out")) == manifest


def test_late_events_rewrite_the_days_that_they_touch(tmp_path: Path) -> None:
    spread = 86_400 / 10  # 40 requests over days 2024-03-01 to 03-05
    logs = {
        "requests": [request(n, spread * n) for n in range(40)],
        "impressions": [impression(n, item, item, spread * n) for n in range(40) for item in range(2)],
        "clicks": [click(n, 0, spread * n + 10) for n in range(0, 40, 3)],
        "dwell": [],
        "purchases": [],
    }
    write_logs(tmp_path, **logs)
    source = source_of(tmp_path)
    first, _ = built(tmp_path, SCHEMA, source, buckets=1)
    late = [click(8, 1, spread * 8 + 20), click(30, 1, spread * 30 + 20)]  # of 2024-03-02 and, not asked for, 03-04
    write_logs(tmp_path, **(logs | {"clicks": logs["clicks"] + late}))
    second, rows = built(tmp_path, SCHEMA, source, buckets=1, days=["2024-03-02"])
    assert (second.version, second.origin.days) == (2, ["2024-03-02"])
    before = {file.path for file in first.files}
    assert {file.day for file in second.files if file.path not in before} == {"2024-03-02"}
    assert {file.day for file in second.files if file.path in before} == set(first.days) - {"2024-03-02"}
    write_logs(tmp_path, **(logs | {"clicks": [*logs["clicks"], late[0]]}))
    expected = assemble(open_source(source, SCHEMA))  # type: ignore[arg-type]
    assert canonical(rows.select(SCHEMA.columns)) == canonical(expected.rows)
    assert second.counts["rows_outside_days"] > 0


def test_building_mind(tmp_path: Path) -> None:
    lines = mind_files.BEHAVIORS.splitlines()
    content = "".join(f"{n}{lines[n % 3][1:]}\n" for n in range(50))
    source = load_config(ROOT / "configs" / "mind.yaml", [f"source.path={mind_files.write(tmp_path, content)}"]).source
    manifest, rows = built(tmp_path, mind_files.SCHEMA, source)
    equal_to_the_source(manifest, rows, mind_files.SCHEMA, source)
    assert manifest.counts["news"] == 7
    assert manifest.counts["unknown_news_in_history"] == 17
    assert {file.day for file in manifest.files} == {"2019-11-11", "2019-11-12", "2019-11-14"}
    mind_files.write(tmp_path, content + "1\tU1\n")
    with pytest.raises(DataError, match=r"behaviors\.tsv, line 51: 2 fields, but a line has 5"):
        built(tmp_path, mind_files.SCHEMA, source)


def test_building_kuairand(tmp_path: Path) -> None:
    source = load_config(
        ROOT / "configs" / "kuairand.yaml",
        [f"source.path={kuairand_files.write(tmp_path)}", "source.max_impressions=2"],
    ).source
    manifest, rows = built(tmp_path, kuairand_files.SCHEMA, source)
    equal_to_the_source(manifest, rows, kuairand_files.SCHEMA, source)
    assert manifest.requests == 5
    assert manifest.counts["impressions_of_unknown_videos"] == 1
    assert manifest.aside["users_without_impressions"].rows == 1
    assert manifest.counts["leaking_history_events"] == 0
