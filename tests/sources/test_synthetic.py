"""The synthetic log: what a logger would write, and a click model whose optimum is known and needs history."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from roo_ray.errors import BadInput, DataError, RooError
from roo_ray.schema import load_schema
from roo_ray.source_config import SyntheticSource
from roo_ray.sources import planted
from roo_ray.sources.synthetic import SUMMARY, entropy, generate, load_summary, require_complete
from roo_ray.sources.synthetic_slice import (
    bias_of,
    catalogue_of,
    generate_slice,
    impressions_cdf,
    make_slice,
    tasks_of,
)

ROOT = Path(__file__).parents[2]
SCHEMA = load_schema(ROOT / "configs" / "schemas" / "synthetic.yaml")


def make_source(**changes: Any) -> SyntheticSource:
    return SyntheticSource(**{"kind": "synthetic", "path": "unused", **changes})


def quiet(_: str) -> None:
    pass


def whole_log(source: SyntheticSource) -> pa.Table:
    return pa.concat_tables([generate_slice(source, task) for task in range(tasks_of(source))])


@pytest.fixture(scope="module")
def demo() -> tuple[SyntheticSource, pa.Table]:
    source = make_source(requests=21_000)
    return source, whole_log(source)


small_sources = st.builds(
    make_source,
    requests=st.integers(1, 60),
    requests_per_task=st.integers(7, 80),
    users=st.integers(1, 30),
    items=st.integers(24, 400),
    topics=st.integers(2, 24),
    mean_impressions=st.floats(1, 8),
    max_impressions=st.integers(8, 12),
    history_length=st.integers(0, 20),
    days=st.integers(1, 20),
    seed=st.integers(-5, 2**40),
)


def brute_force_probability(source: SyntheticSource, row: dict[str, Any]) -> float:
    """The module's formula, from one logged row and the catalogue's tables."""
    catalogue = catalogue_of(source)
    on_topic = everything = 0.0
    for age, topic in enumerate(reversed(row["history_topic"])):
        everything += math.exp(-age / planted.RECENCY)
        on_topic += math.exp(-age / planted.RECENCY) * (topic == row["topic_id"])
    share = on_topic / everything if everything else 0.0
    logit = (
        bias_of(source)
        + planted.AFFINITY * share / (share + planted.HALF_SHARE)
        + catalogue.quality[row["item_id"]]
        + catalogue.country_effect[row["country_id"]]
        + planted.POSITION * math.log(row["position"])
        + planted.FRESHNESS * math.log1p(row["item_age_days"])
        + planted.AGE * (row["user_age"] - 40) / 20
    )
    return 1 / (1 + math.exp(-logit))


@settings(max_examples=25, deadline=None)
@given(small_sources)
def test_rows_are_what_a_logger_writes(source: SyntheticSource) -> None:
    log = whole_log(source)
    rows = log.to_pylist()
    catalogue = catalogue_of(source)
    by_request: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_request.setdefault(row["request_id"], []).append(row)
    assert len(by_request) == source.requests
    start = rows[0]["request_time"].replace(year=2025, month=1, day=6, hour=0, minute=0, second=0, microsecond=0)
    history_of: dict[tuple[int, Any], tuple[int, int]] = {}
    for request in by_request.values():
        first = request[0]
        assert all(row[name] == first[name] for row in request for name in SCHEMA.request_columns)
        assert sorted(row["position"] for row in request) == list(range(1, len(request) + 1))
        assert len(request) <= source.max_impressions
        assert len({row["item_id"] for row in request}) == len(request)
        assert 0 <= (first["request_time"] - start).total_seconds() < source.days * 86_400
        times = first["history_time"]
        assert len(times) == len(first["history_item"]) == len(first["history_topic"]) <= source.history_length
        assert times == sorted(set(times))
        assert not times or times[-1] < first["request_time"]
        for event in zip(times, first["history_item"], first["history_topic"], strict=True):
            assert history_of.setdefault((first["user_id"], event[0]), event[1:]) == event[1:]
            assert catalogue.topic[event[1]] == event[2]
    for row in rows:
        assert 0 <= row["user_id"] < source.users
        assert 0 <= row["country_id"] < planted.COUNTRIES
        assert catalogue.topic[row["item_id"]] == row["topic_id"] < source.topics
        assert row["item_age_days"] > 0
        assert row["click_probability"] == pytest.approx(brute_force_probability(source, row), rel=1e-5)


@settings(max_examples=10, deadline=None)
@given(small_sources)
def test_a_slice_depends_on_the_settings_alone(source: SyntheticSource) -> None:
    task = tasks_of(source) - 1
    first = generate_slice(source, task)
    catalogue_of.cache_clear()
    bias_of.cache_clear()
    impressions_cdf.cache_clear()
    generate_slice(source, 0)
    assert generate_slice(source, task).equals(first)
    moved = source.model_copy(update={"path": "elsewhere", "reuse": False})
    assert generate_slice(moved, task).equals(first)
    other = source.model_copy(update={"seed": source.seed + 1})
    assert not generate_slice(other, task).equals(first)


def test_columns_and_types_are_the_schemas() -> None:
    source = make_source(requests=50)
    log = generate_slice(source, 0)
    assert sorted(log.column_names) == sorted(SCHEMA.columns)
    moment = pa.timestamp("us", tz="UTC")
    types = dict(zip(log.schema.names, log.schema.types, strict=True))
    assert types == {
        "request_id": pa.int64(),
        "user_id": pa.int64(),
        "request_time": moment,
        "user_age": pa.int32(),
        "user_activity": pa.float32(),
        "country_id": pa.int32(),
        "history_item": pa.list_(pa.int32()),
        "history_topic": pa.list_(pa.int32()),
        "history_time": pa.list_(moment),
        "item_id": pa.int32(),
        "position": pa.int32(),
        "topic_id": pa.int32(),
        "item_age_days": pa.float32(),
        "clicked": pa.int8(),
        "click_probability": pa.float32(),
    }
    assert sum(column.null_count for column in log.columns) == 0
    assert SCHEMA.tables["item"].rows == source.items
    assert SCHEMA.tables["topic"].rows == source.topics
    assert SCHEMA.tables["country"].rows == planted.COUNTRIES


def test_sizes_are_skewed_and_the_demo_is_large_enough(demo: tuple[SyntheticSource, pa.Table]) -> None:
    source, log = demo
    requests = log.group_by("request_id").aggregate([("position", "max"), ("position", "count")])
    shown = requests["position_count"].to_numpy()
    assert requests.num_rows == source.requests >= 20_000
    assert log.num_rows >= 200_000
    assert shown.mean() == pytest.approx(source.mean_impressions, rel=0.03)
    assert np.median(shown) < 0.8 * shown.mean()
    assert shown.max() > 4 * shown.mean()
    first = log.filter(pc.equal(log["position"], 1))
    lengths = pc.list_value_length(first["history_item"]).to_numpy()
    assert 0.01 < (lengths == 0).mean() < 0.15
    assert 0.02 < (lengths == source.history_length).mean() < 0.4
    items = np.sort(np.bincount(log["item_id"].to_numpy(), minlength=source.items))[::-1]
    assert items[: source.items // 100].sum() > 0.15 * log.num_rows, "item popularity is not skewed"
    days = np.unique(first["request_time"].cast(pa.int64()).to_numpy() // planted.DAY_US)
    assert len(days) == source.days


@pytest.mark.parametrize(("mean", "most"), [(1.0, 100), (10.0, 100), (3.7, 5), (50.0, 60), (7.0, 7), (1.0, 1)])
def test_mean_impressions_hold_after_the_cut(mean: float, most: int) -> None:
    chances = np.diff(impressions_cdf(mean, most), prepend=0)
    assert (chances * np.arange(1, most + 1)).sum() == pytest.approx(mean, rel=1e-3)


def test_clicks_are_drawn_from_the_logged_probability(demo: tuple[SyntheticSource, pa.Table]) -> None:
    _, log = demo
    p, clicked = log["click_probability"].to_numpy().astype(np.float64), log["clicked"].to_numpy()
    assert set(np.unique(clicked)) == {0, 1}
    assert 0.10 < clicked.mean() < 0.15
    deciles = np.searchsorted(np.quantile(p, np.arange(0.1, 0.95, 0.1)), p)
    for decile in range(10):
        inside = deciles == decile
        error = math.sqrt((p[inside] * (1 - p[inside])).sum())
        assert abs(clicked[inside].sum() - p[inside].sum()) < 4.5 * error, f"decile {decile}"


@pytest.mark.parametrize("size", [{}, {"users": 100_000, "items": 50_000, "topics": 50}])
def test_the_optimum_needs_history(size: dict[str, int]) -> None:
    """Learned from everything but the history's content, at most 40 % of the gap closes; with the topic's
    share in the history, nearly all of it."""
    source = make_source(requests=16_000, **size)
    catalogue = catalogue_of(source)
    parts = [make_slice(source, task) for task in range(tasks_of(source))]
    blind, seeing = [], []
    for part in parts:
        age, country = part.profile.age[part.row], part.profile.country[part.row]
        known = planted.other_effects(catalogue, part.item, part.position, part.item_age_days, age, country)
        shown, events = np.bincount(part.row)[part.row], part.history.lengths[part.row]
        activity = part.profile.activity[part.row]
        columns = [known, catalogue.quality[part.item], part.topic, part.position, part.item_age_days]
        blind.append(np.stack([*columns, age, country, activity, shown, events], axis=1))
        seeing.append(np.column_stack([blind[-1], part.share]))
    p = np.concatenate([part.probability for part in parts]).astype(np.float64)
    clicked = np.concatenate([part.clicked for part in parts])
    half = len(p) // 2
    base = entropy(p[half:].mean(keepdims=True))[0]
    bayes = entropy(p[half:]).mean() / base
    assert 0.75 < bayes < 0.85
    assert 0.75 < roc_auc_score(clicked, p) < 0.85

    def closed(features: np.ndarray) -> float:
        model = HistGradientBoostingClassifier(max_iter=60, learning_rate=0.08, max_leaf_nodes=8, min_samples_leaf=300)
        with threadpool_limits(1):  # spinning threads crawl on a busy machine
            model.fit(features[:half], clicked[:half])
            q = model.predict_proba(features[half:])[:, 1]
        losses = -(p[half:] * np.log(q) + (1 - p[half:]) * np.log(1 - q))  # in expectation over the labels
        return float((1 - losses.mean() / base) / (1 - bayes))

    assert closed(np.concatenate(blind)) < 0.4
    assert closed(np.concatenate(seeing)) > 0.9


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mean_impressions": 20, "max_impressions": 10}, "source.mean_impressions"),
        ({"items": 15, "topics": 20, "mean_impressions": 2, "max_impressions": 3}, "source.topics"),
        ({"items": 30, "max_impressions": 20}, "source.max_impressions"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        generate_slice(make_source(**changes), 0)


# ---- on disk -----------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("local_ray")
def test_the_written_log(tmp_path: Path) -> None:
    first = make_source(path=str(tmp_path / "a"), requests=900, requests_per_task=200)
    summary = generate(first, quiet)
    assert generate(first.model_copy(update={"path": str(tmp_path / "b")}), quiet) == summary
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")

    parts = sorted((tmp_path / "a").glob("*.parquet"))
    logs = [pq.read_table(path) for path in parts]
    assert pa.concat_tables(logs).equals(whole_log(first)), "Ray's tasks and the pure function differ"
    assert len(parts) == summary.files == 5 * 4
    footer = pq.ParquetFile(parts[0]).metadata
    assert {footer.row_group(0).column(i).compression for i in range(footer.num_columns)} == {"ZSTD"}
    files_per_request = Counter(request for log in logs for request in set(log["request_id"].to_pylist()))
    large = Counter(request for log in logs for request in log["request_id"].to_pylist())
    scattered = [files_per_request[request] > 1 for request, shown in large.items() if shown >= 5]
    assert np.mean(scattered) > 0.95
    ids = logs[0]["request_id"].to_numpy()
    assert (ids[1:] == ids[:-1]).mean() < 0.05, "rows of a request lie side by side"

    log = pa.concat_tables(logs)
    p, clicked = log["click_probability"].to_numpy().astype(np.float64), log["clicked"].to_numpy()
    assert (summary.requests, summary.impressions) == (900, log.num_rows)
    assert summary.clicks == clicked.sum()
    assert summary.bytes == sum(path.stat().st_size for path in parts)
    assert summary.base_rate == pytest.approx(clicked.mean())
    assert summary.mean_probability == pytest.approx(p.mean())
    rate = clicked.mean()
    base = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert summary.bayes_ne == pytest.approx(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean() / base)
    both = np.repeat([1, 0], len(p))
    expected_auc = roc_auc_score(both, np.concatenate([p, p]), sample_weight=np.concatenate([p, 1 - p]))
    assert summary.bayes_auc == pytest.approx(expected_auc, abs=2e-6)
    assert json.loads((tmp_path / "a" / SUMMARY).read_text()) == summary.model_dump(mode="json")


@pytest.mark.usefixtures("local_ray")
def test_reuse_and_replacement(tmp_path: Path) -> None:
    source = make_source(path=str(tmp_path / "log"), requests=40, requests_per_task=20)
    summary = generate(source, quiet)
    said: list[str] = []
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "log").iterdir()}
    assert generate(source, said.append) == summary
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "log").iterdir()} == written
    assert "reused" in said[-1]

    fewer = source.model_copy(update={"requests": 15})
    assert generate(fewer, quiet).requests == 15
    assert len(list((tmp_path / "log").glob("*.parquet"))) == 4, "files of the earlier log are left"
    assert require_complete(source.path).requests == 15

    damaged = next((tmp_path / "log").glob("*.parquet"))
    damaged.unlink()
    assert generate(fewer, quiet).requests == 15
    assert damaged.exists()


@pytest.mark.usefixtures("local_ray")
def test_an_interrupted_generation_is_not_complete(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    source = make_source(path=str(folder), requests=60, requests_per_task=20)
    before = generate(source, quiet)
    complete = files_of(folder)

    def interrupt(message: str) -> None:
        if message.startswith("generated"):
            raise KeyboardInterrupt

    other = source.model_copy(update={"seed": 1})
    with pytest.raises(KeyboardInterrupt):
        generate(other, interrupt)
    assert list(folder.glob("*.parquet"))
    assert load_summary(source.path) is None
    with pytest.raises(DataError, match="interrupted"):
        require_complete(source.path)
    (folder / ".part-000000-0.parquet.1.tmp").write_bytes(b"half")
    assert generate(source, quiet) == before
    assert files_of(folder) == complete


@pytest.mark.usefixtures("local_ray")
def test_a_failing_task_is_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    source = make_source(path=str(folder), requests=20)

    def block(message: str) -> None:
        if message.startswith("generating"):
            (folder / "part-000000-0.parquet" / "in the way").mkdir(parents=True)

    with pytest.raises(RooError, match=r"log failed: .*part-000000-0") as failure:
        generate(source, block)
    assert len(str(failure.value).splitlines()) == 1
    assert load_summary(source.path) is None


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"notes\.txt"):
        generate(make_source(path=str(tmp_path)), quiet)
    with pytest.raises(BadInput, match="is a file"):
        generate(make_source(path=str(tmp_path / "notes.txt")), quiet)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "part-000000-0.parquet").write_bytes(b"someone's")
    with pytest.raises(BadInput, match="not overwritten"):
        generate(make_source(path=str(tmp_path / "log")), quiet)
    assert (tmp_path / "log" / "part-000000-0.parquet").read_bytes() == b"someone's"
    with pytest.raises(DataError, match="no synthetic log"):
        require_complete(str(tmp_path / "log"))
