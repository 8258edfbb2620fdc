"""The profile of an impression table: whole requests in the sample, columns against a loop, a schema that works."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roo_ray.config import Build, Model
from roo_ray.errors import EXIT_BAD_INPUT, DataError
from roo_ray.requests.examine import check_requests, examine
from roo_ray.requests.grouping import explode_requests, group_impressions
from roo_ray.requests.ledger import parquet_bytes
from roo_ray.requests.profile import Sample, Use, analyse, open_table, take_sample
from roo_ray.requests.profile_cost import predict
from roo_ray.requests.profile_savings import predict_savings
from roo_ray.requests.profile_schema import Roles, suggest_schema
from roo_ray.schema import Schema, load_schema, parse_schema
from roo_ray.source_config import EbnerdSource, SyntheticSource
from roo_ray.sources import open_source
from roo_ray.sources.base import read
from roo_ray.sources.synthetic_slice import make_slice
from tests.requests.tables import canonical, impression_logs, impression_row, request_row, table_of

ROOT = Path(__file__).parents[2]
KEY = ["rid", "shard"]


def write(folder: Path, table: pa.Table, files: int = 2, group: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        rows = pa.array(np.arange(number, table.num_rows, files))
        pq.write_table(table.take(rows), folder / f"part-{number}.parquet", row_group_size=group)
    return folder


def log_table(requests: int = 40) -> pa.Table:
    rows = [impression_row(request_row(n), item) for n in range(requests) for item in range(1 + n % 4)]
    random.Random(1).shuffle(rows)
    return table_of(rows)


def profile_of(folder: Path, key: list[str], requests: int = 1000) -> tuple[Sample, Use]:
    sample = take_sample(open_table([str(folder)], key), requests)
    return sample, analyse(sample, key)


# ---- the sample ----------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(impression_logs().filter(bool), st.integers(1, 8))
def test_a_sample_holds_whole_requests(tmp_path: Path, rows: list[dict[str, Any]], wanted: int) -> None:
    folder = write(tmp_path / str(random.getrandbits(60)), table_of(rows), group=3)
    sample = take_sample(open_table([str(folder)], KEY), wanted)
    keys = {(row["rid"], row["shard"]) for row in rows}
    taken = {(row["rid"], row["shard"]) for row in sample.rows.to_pylist()}
    assert len(taken) == sample.requests == min(wanted, len(keys))
    assert canonical(sample.rows) == canonical(table_of([r for r in rows if (r["rid"], r["shard"]) in taken]))
    if wanted >= len(keys):
        assert (sample.all_requests, sample.exact) == (len(keys), True)


def test_the_number_of_requests_is_estimated_and_memory_is_bounded(tmp_path: Path) -> None:
    key = np.repeat(np.arange(20_000), 3)
    folder = write(tmp_path / "log", pa.table({"rid": key, "x": np.arange(60_000)}), files=3, group=5_000)
    table = open_table([str(folder)], ["rid"])
    sample = take_sample(table, 2_000)
    assert not sample.exact
    assert sample.requests == 2_000
    assert sample.rows.num_rows == 6_000
    assert abs(sample.all_requests / 20_000 - 1) < 0.1  # the estimate's deviation is 1 / sqrt(2000)
    small = take_sample(table, 2_000, most_bytes=20_000)
    assert small.rows.nbytes <= 20_000
    assert small.rows.num_rows == 3 * small.requests > 0
    assert small.all_requests == sample.all_requests


def test_null_keys_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "log", pa.table({"rid": [1, None, 1, 2], "x": [1, 2, 3, 4]}), files=1)
    sample = take_sample(open_table([str(folder)], ["rid"]), 10)
    assert (sample.null_keys, sample.requests, sample.rows.column("x").to_pylist()) == (1, 2, [1, 3, 4])
    folder = write(tmp_path / "nulls", pa.table({"rid": pa.array([None, None], pa.int64()), "x": [1, 2]}), files=1)
    with pytest.raises(DataError, match=r"request key \(rid\) is null in all 2 rows"):
        take_sample(open_table([str(folder)], ["rid"]), 10)


# ---- columns -------------------------------------------------------------------------------------


def test_how_often_columns_vary_against_a_loop(tmp_path: Path) -> None:
    table = log_table()
    spoiled = table.column("age").to_pylist()
    spoiled[5] = spoiled[17] = -1.0
    table = table.set_column(table.column_names.index("age"), "age", pa.array(spoiled, pa.float32()))
    _, use = profile_of(write(tmp_path / "log", table), KEY)
    requests: dict[Any, list[Any]] = {}
    for row in table.to_pylist():
        requests.setdefault((row["rid"], row["shard"]), []).append(row)
    several = [rows for rows in requests.values() if len(rows) > 1]
    for name, column in use.columns.items():
        varying = sum(any(row[name] != rows[0][name] for row in rows) for rows in several)
        assert (column.varying, column.several) == (varying, len(several)), name
    assert 0 < use.columns["age"].varying <= 2
    assert use.columns["age"].example.startswith("rid=r")
    assert use.columns["user"].distinct == 5


def synthetic() -> pa.Table:
    source = SyntheticSource(
        kind="synthetic", path="x", requests=600, users=150, items=500, history_length=20, requests_per_task=600
    )
    return next(make_slice(source, 0).tables(1))


def test_the_synthetic_log_gives_its_own_schema(tmp_path: Path) -> None:
    folder = write(tmp_path / "log", synthetic(), group=2000)
    sample, use = profile_of(folder, ["request_id"])
    roles = Roles()
    found = suggest_schema("again", sample.rows, use, ["request_id"], roles)
    known = load_schema(ROOT / "configs/schemas/synthetic.yaml")
    assert found == parse_schema(found.to_yaml())
    assert found.keys == known.keys
    assert set(found.request_columns) == set(known.request_columns)
    assert set(found.impression_columns) == set(known.impression_columns)
    assert [label.column for label in found.labels] == ["clicked"]
    (sequence,) = found.sequences
    assert sequence.time == "history_time"
    assert {c.column: c.table for c in sequence.sequence} == {"history_item": "item", "history_topic": "topic"}
    tables = {f.columns[0]: f.table for f in found.features if f.kind == "ids"}
    assert tables == {"item_id": "item", "topic_id": "topic", "country_id": "country"}
    assert found.carry.impression == ["click_probability"]  # close to the outcome: no feature
    assert all(table.hash for table in found.tables.values())
    assert found.tables["item"].rows >= 500
    assert roles.guessed == ["user: user_id", "time: request_time", "labels: clicked"]
    check_requests(group_impressions(sample.rows.select(found.columns), found), found)  # it builds


def test_the_small_log_gives_a_schema_that_builds(tmp_path: Path) -> None:
    """Strings, nulls, bags, a sequence with a dense column, several key columns."""
    rows = log_table()
    sample, use = profile_of(write(tmp_path / "log", rows), KEY)
    found = suggest_schema("small", sample.rows, use, KEY, Roles())
    assert set(found.columns) == set(rows.column_names)  # nothing is lost
    assert (found.keys.user, found.keys.time, found.keys.position) == ("user", "time", "position")
    (sequence,) = found.sequences
    assert sequence.source_columns == ["h_item", "h_dwell", "h_time"]
    bags = {f.columns[0]: (f.level, f.pooling) for f in found.features if f.pooling == "mean"}
    assert bags == {"tags": ("request", "mean"), "words": ("impression", "mean")}
    check_requests(group_impressions(rows.select(found.columns), found), found)


def test_ebnerd_exploded_gives_the_levels_of_its_schema(ebnerd_folder: Path, tmp_path: Path) -> None:
    known = load_schema(ROOT / "configs/schemas/ebnerd.yaml")
    source = open_source(EbnerdSource(kind="ebnerd", path=str(ebnerd_folder)), known)
    rows = pa.concat_tables([read(source, unit) for unit in source.units()])
    impressions = explode_requests(examine(rows, known, "requests", Build())[0], known)
    folder = write(tmp_path / "log", impressions, group=4000)
    sample, use = profile_of(folder, known.keys.request, 300)
    found = suggest_schema(
        "ebnerd", sample.rows, use, known.keys.request, Roles(user="user_id", time="impression_time")
    )
    assert set(found.request_columns) == set(known.request_columns)
    assert set(found.impression_columns) == set(known.impression_columns)
    assert found.labels[0].column == "clicked"
    (sequence,) = found.sequences
    assert sequence.time == "impression_time_fixed"
    assert {f.table for f in found.features if f.columns == ["article_id_inview"]} == {"article"}
    assert {c.table for c in sequence.sequence if c.column == "article_id_fixed"} == {"article"}
    check_requests(group_impressions(sample.rows.select(found.columns), found), found)


# ---- savings -------------------------------------------------------------------------------------


def test_savings_of_a_whole_table_are_measured_ones(tmp_path: Path) -> None:
    """With every request in the sample nothing is scaled: elements are exact, bytes those of written tables."""
    log = synthetic()
    folder = write(tmp_path / "log", log, group=2000)
    table = open_table([str(folder)], ["request_id"])
    sample = take_sample(table, 10_000)
    schema = suggest_schema("x", sample.rows, analyse(sample, table.key), table.key, Roles())
    savings = predict_savings(table, sample, schema, Model())
    requests = group_impressions(log.select(schema.columns), schema)
    events = sum(len(row) for row in log.column("history_item").to_pylist())
    history = savings.columns["history_item"]
    assert history.elements_logged == events
    assert history.elements_grouped == sum(len(row) for row in requests.column("history_item").to_pylist())
    by_request = parquet_bytes(explode_requests(requests, schema))
    assert {name: savings.columns[name].sorted for name in by_request} == by_request
    files = [pq.read_metadata(path) for path in folder.glob("*.parquet")]
    logged = [f.row_group(g).column(0).total_compressed_size for f in files for g in range(f.num_row_groups)]
    assert savings.columns["request_id"].logged == sum(logged)
    total = savings.total()
    assert total.grouped < total.sorted < total.logged
    half = predict_savings(table, take_sample(table, 300), schema, Model()).total()
    assert 0.8 < half.elements_logged / total.elements_logged < 1.25
    assert 0.7 < half.grouped / total.grouped < 1.4
    assert savings.cost.lookup_ratio > 3


def cost_schema() -> Schema:
    content = load_schema(ROOT / "configs/schemas/synthetic.yaml").model_dump(mode="json")
    for table in content["tables"].values():
        table["dim"] = 64
    next(f for f in content["features"] if f["kind"] == "sequence")["max_length"] = 400
    return Schema.model_validate(content)


# speed-ups of a prototype (dim 64, 2 HSTU layers, DCNv2), histories uniform in [L / 4, L]
MEASURED = [
    (0, 10, 1.25), (50, 5, 3.9), (50, 10, 4.2), (50, 20, 5.5), (200, 5, 5.9), (200, 10, 12.5), (200, 20, 25.5),
    (0, 1, 1.0), (50, 1, 1.0), (200, 1, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("longest", "impressions", "measured"), MEASURED)
def test_predicted_speed_ups_are_near_measured_ones(longest: int, impressions: int, measured: float) -> None:
    lengths = np.random.default_rng(0).integers(longest // 4, longest + 1, 1000)
    model = Model(dim=64, layers=2, user_dim=64, tower=[128, 64])
    found = predict(cost_schema(), model, np.full(1000, impressions), {"history": lengths})
    assert 0.5 < found.speed_up / measured < 2
    assert found.speed_up <= impressions
    if impressions == 1:
        assert found.speed_up == found.lookup_ratio == 1


# ---- bad input and the job -----------------------------------------------------------------------


def test_bad_input_is_named(tmp_path: Path) -> None:
    log = log_table()
    folder = str(write(tmp_path / "log", log))
    with pytest.raises(DataError, match=r"there is no column 'rids'; did you mean 'rid'"):
        open_table([folder], ["rids"])
    with pytest.raises(DataError, match=r"there is no column 'usr'; did you mean 'user'"):
        open_table([folder], KEY, ["usr"])
    with pytest.raises(DataError, match=r"'age' has type float; a request key needs integers"):
        open_table([folder], ["age"])
    with pytest.raises(DataError, match="source not found"):
        open_table([f"{folder}/nothing"], KEY)
    with pytest.raises(DataError, match=r"has one impression: the request key \(rid, shard, item\)"):
        profile_of(Path(folder), [*KEY, "item"])
    sample, use = profile_of(Path(folder), KEY)
    with pytest.raises(DataError, match=r"--user item varies within \d+ of 30 requests"):
        suggest_schema("x", sample.rows, use, KEY, Roles(user="item"))
    rest = sample.rows.drop_columns(["click"])
    with pytest.raises(DataError, match=r"looks like a label.*--label"):
        suggest_schema("x", rest, analyse(Sample(rest, 40, 40, True, 0), KEY), KEY, Roles())
    rest = sample.rows.drop_columns(["user"])
    with pytest.raises(DataError, match=r"looks like the request's user; name it with --user"):
        suggest_schema("x", rest, analyse(Sample(rest, 40, 40, True, 0), KEY), KEY, Roles())


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/profile_impressions.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_job(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "log", synthetic(), group=2000))
    out, figures = tmp_path / "schema.yaml", tmp_path / "profile.json"
    flags = ["--sample-requests", "200", "--out", out.as_uri(), "--json", str(figures), "--model", "configs/demo.yaml"]
    done = job(folder, "--request-key", "request_id", *flags)
    assert done.returncode == 0, done.stderr
    for words in ("200 whole requests", "Predicted savings", "a formula, nothing was run", "guessed: user: user_id"):
        assert words in done.stdout
    profile = json.loads(figures.read_text())
    assert load_schema(out) == parse_schema(profile["schema_yaml"])
    assert profile["sample"]["requests"] == 200
    assert profile["columns"]["history_item"]["share"] == 0
    assert profile["step"]["speed_up"] > 1
    wrong = job(folder, "--request-key", "request")
    assert wrong.returncode == EXIT_BAD_INPUT
    assert "there is no column 'request'; did you mean 'request_id'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr
