"""Mean ids per request: counted by the build, against counting in the rows; and what stands in where nothing was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from roo_ray.config import Build
from roo_ray.ingest.clustered import index_impressions
from roo_ray.requests import forget as forget_module
from roo_ray.requests.accounts import total_ledger, without
from roo_ray.requests.forget import forget_users
from roo_ray.requests.grouping import group_impressions
from roo_ray.requests.ledger import measure_bucket, measure_requests
from roo_ray.requests.lengths import MeanIds, count_kept, mean_ids, sequence_shares
from roo_ray.requests.manifest import DayAccount, Manifest, load_manifest, publish_manifest
from roo_ray.requests.rebuild import merge_accounts
from roo_ray.schema import Feature, Schema, parse_schema
from tests.ingest import shard_maker
from tests.ingest.shard_maker import random_rows, write_data_set
from tests.requests.data_sets import OPTIONS, publish, read_all
from tests.requests.in_process import run_tasks
from tests.requests.tables import Row, impression_logs, impression_row, request_row, small_schema, table_of

BUILD = Build(row_group_requests=2)
TWICE = """
  - {name: first_tags, level: request, kind: ids, columns: tags, table: word, pooling: mean, max_length: 1}
  - {name: ages, level: request, kind: ids, columns: shard, table: item, pooling: sum}
  - {name: first_word, level: impression, kind: ids, columns: words, table: word, pooling: sum, max_length: 2}
  - {name: recent, level: request, kind: sequence, max_length: 1, sequence: [{column: h_item, table: item}]}
labels:"""
SCHEMA = small_schema(lambda text: text.replace("max_length: 8", "max_length: 2").replace("\nlabels:", TWICE))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forget_module, "run_tasks", run_tasks)


def left_of(feature: Feature, value: Any) -> int:
    """Ids that one list of a feature looks up."""
    bag = value if isinstance(value, list) else [] if value is None else [value]
    if feature.kind == "ids" and feature.pooling == "none":
        return 1
    return min(len(bag), feature.max_length or len(bag))


def by_hand(rows: list[Row], schema: Schema) -> dict[str, float]:
    """Mean ids per request, from request rows."""
    means = {}
    for feature in schema.features:
        if feature.kind == "dense":
            continue
        columns = [event.column for event in feature.sequence_ids] or feature.columns
        for column in columns:
            lists = [row[column] for row in rows]
            if feature.level == "impression":
                lists = [value for row in rows for value in row[column]]
            name = f"{feature.name}.{column}" if feature.kind == "sequence" else feature.name
            means[name] = sum(left_of(feature, value) for value in lists) / max(len(rows), 1)
    return means


@settings(max_examples=40, deadline=None)
@given(impression_logs())
def test_counts_against_counting_in_rows(rows: list[Row]) -> None:
    """Null and empty lists, slices of longer tables, a column that several features read, single values as bags."""
    requests = group_impressions(table_of(rows), SCHEMA)
    cut = requests.num_rows // 2
    whole, *halves = (count_kept(table, SCHEMA) for table in (requests, requests.slice(0, cut), requests.slice(cut)))
    assert whole.keys() == {"tags", "h_item", "shard", "words"}
    assert {column: set(kept) for column, kept in whole.items()} == {
        "tags": {"all", "1"}, "h_item": {"2", "1"}, "shard": {"all"}, "words": {"all", "2"},
    }  # fmt: skip
    expected = by_hand(requests.to_pylist(), SCHEMA)
    for name, column, length in (
        ("tags", "tags", "all"), ("first_tags", "tags", "1"), ("history.h_item", "h_item", "2"),
        ("ages", "shard", "all"), ("recent.h_item", "h_item", "1"), ("words", "words", "all"),
        ("first_word", "words", "2"),
    ):  # fmt: skip
        assert whole[column][length] == pytest.approx(expected[name] * requests.num_rows)
        assert whole[column][length] == sum(half[column][length] for half in halves)
    assert measure_requests(requests, SCHEMA)["words"]["kept"] == whole["words"]


def log(requests: int = 40) -> list[Row]:
    """Users 0 .. 4 over nine days; histories of 0 to 3 events, some null, and bags of 0 to 2 words."""
    none = {"h_item": None, "h_dwell": None, "h_time": None}
    words = [None, [], ["x"], ["x"] * 3]
    return [
        impression_row(request_row(n, **(none if n % 8 == 3 else {})), item, words=words[item % 4])
        for n in range(requests)
        for item in range(1 + n % 6)
    ]


def means_of(data_set: Path, manifest: Manifest, schema: Schema = SCHEMA) -> MeanIds:
    return mean_ids(schema, manifest, str(data_set))


def assert_counted(data_set: Path, manifest: Manifest) -> None:
    found = means_of(data_set, manifest)
    assert found.per_request == pytest.approx(by_hand(read_all(data_set, manifest).to_pylist(), SCHEMA))
    assert found.how == "counted when the data set was built"


def test_counted_over_days_shards_and_what_was_forgotten(tmp_path: Path, in_process: None) -> None:
    first = publish(tmp_path, table_of(log()), SCHEMA, shards=2)
    assert len(first.days) > 5
    assert_counted(tmp_path, first)
    before = means_of(tmp_path, first).per_request
    forget_users(str(tmp_path), "3,1", BUILD, lambda line: None)
    second = load_manifest(str(tmp_path))
    assert second.requests < first.requests
    assert_counted(tmp_path, second)
    assert means_of(tmp_path, second).per_request != before

    # days of two versions together
    merged = merge_accounts(first.days[:2], {day: second.accounts[day] for day in first.days[:2]}, first)
    for day in first.days:
        source = second if day in first.days[:2] else first
        assert merged[day].sizes["words"]["kept"] == source.accounts[day].sizes["words"]["kept"]


def uncounted(account: DayAccount) -> DayAccount:
    """The account of a day that an earlier version built."""
    sizes = {name: {k: v for k, v in kinds.items() if k != "kept"} for name, kinds in account.sizes.items()}
    return account.model_copy(update={"sizes": sizes})


def test_days_that_did_not_count_what_is_kept(tmp_path: Path, in_process: None) -> None:
    """A version some of whose days come from before: its values are counted, the cut is of the mean. Forgetting
    takes nothing from what was not counted."""
    whole = publish(tmp_path, table_of(log()), SCHEMA)
    exact = means_of(tmp_path, whole).per_request
    accounts = whole.accounts | {whole.days[0]: uncounted(whole.accounts[whole.days[0]])}
    ledger = total_ledger(accounts, SCHEMA, whole.files, "zstd", 3)
    mixed = whole.model_copy(update={"version": 2, "accounts": accounts, "ledger": ledger})
    publish_manifest(str(tmp_path), mixed)
    assert all("kept" not in entry for entry in mixed.ledger["columns"].values())
    found = means_of(tmp_path, mixed)
    assert found.how.endswith("is cut to max_length: history.h_item, first_tags, first_word, recent.h_item")
    for name, mean in exact.items():
        assert found.per_request[name] >= mean - 1e-12
    for name in ("tags", "words", "item", "ages"):  # not cut: the same
        assert found.per_request[name] == pytest.approx(exact[name])
    events = whole.ledger["columns"]["h_item"]["elements"]["request"] / whole.requests
    assert events < 2
    assert found.per_request["history.h_item"] == pytest.approx(events)
    assert found.per_request["recent.h_item"] == 1 < events

    forget_users(str(tmp_path), "3", BUILD, lambda line: None)
    after = load_manifest(str(tmp_path))
    assert "kept" not in after.accounts[whole.days[0]].sizes["words"]
    rows = read_all(tmp_path, after).to_pylist()
    assert means_of(tmp_path, after).per_request["words"] == pytest.approx(by_hand(rows, SCHEMA)["words"])

    requests = group_impressions(table_of(log(6)), SCHEMA)
    sizes = measure_bucket(requests, SCHEMA, OPTIONS, "off", 0, 1)
    old = uncounted(DayAccount(sizes=sizes))
    assert without(old, {}, sizes, 1, 0).sizes["words"].keys() == old.sizes["words"].keys()


def test_another_max_length_cuts_the_mean(tmp_path: Path) -> None:
    manifest = publish(tmp_path, table_of(log()), SCHEMA)
    longer = small_schema(lambda text: text.replace("max_length: 8", "max_length: 50"))
    found = means_of(tmp_path, manifest, longer)
    assert found.how.endswith("; the mean, not each list, is cut to max_length: history.h_item")
    # the manifest's events are those of both sequences, which read one column
    assert found.per_request["history.h_item"] == pytest.approx(manifest.tokens / 2 / manifest.requests)
    assert found.per_request["tags"] == means_of(tmp_path, manifest).per_request["tags"]
    # one of two sequences is cut to one event a request
    shares = sequence_shares(SCHEMA, manifest, means_of(tmp_path, manifest))
    assert manifest.tokens / manifest.requests * shares["recent"] == pytest.approx(
        means_of(tmp_path, manifest).per_request["recent.h_item"]
    )


def test_without_a_ledger_footers_stand_in(tmp_path: Path) -> None:
    """Of shards: exact where nothing is cut, as far as the files are read."""
    wide = shard_maker.SCHEMA.replace("max_length: 4", "max_length: 9").replace("max_length: 3", "max_length: 9")
    schema = parse_schema(wide.replace("max_length: 2", "max_length: 9"))
    rows = random_rows([1 + n % 7 for n in range(60)], 4, days=2)
    manifest = write_data_set(tmp_path, rows, schema)
    found = means_of(tmp_path, manifest, schema)
    assert found.how == "estimated from the footers of 4 of 4 files; the mean is cut to max_length"
    assert found.per_request == pytest.approx(by_hand(rows, schema))
    cut = means_of(tmp_path, manifest, shard_maker.schema()).per_request
    assert cut["interests"] == min(found.per_request["interests"], 3)

    for file in manifest.files[:2]:  # one is gone, one is damaged
        (tmp_path / file.path).write_bytes(b"PAR1")
    (tmp_path / manifest.files[0].path).unlink()
    assert means_of(tmp_path, manifest, schema).how.startswith("estimated from the footers of 2 of 4 files")
    for file in manifest.files[2:]:
        (tmp_path / file.path).unlink()
    guessed = means_of(tmp_path, manifest, schema)
    assert guessed.how == "not counted: history events divided evenly among the sequences, a bag taken as one id"
    assert guessed.per_request["tags"] == manifest.impressions / manifest.requests
    assert guessed.per_request["interests"] == guessed.per_request["country"] == 1
    assert guessed.per_request["history.history_item"] == manifest.tokens / manifest.requests


def test_impression_tables_as_they_are(tmp_path: Path) -> None:
    """Impression-level bags as they are stored; request-level ones weighted by impressions."""
    schema = small_schema()
    rows = sorted(log(), key=lambda row: str(row["rid"]))
    (tmp_path / "log").mkdir()
    pq.write_table(table_of(rows), tmp_path / "log" / "part.parquet", row_group_size=50)
    manifest = index_impressions(str(tmp_path / "indexed"), [str(tmp_path / "log")], schema)
    found = means_of(tmp_path / "indexed", manifest, schema)
    requests = group_impressions(table_of(rows), schema).to_pylist()
    expected = by_hand(requests, schema)
    assert found.how.startswith("estimated from the footers of 1 of 1 files")
    assert {name: found.per_request[name] for name in ("item", "words")} == pytest.approx(
        {name: expected[name] for name in ("item", "words")}
    )
    weighted = sum(len(row["tags"]) for row in rows) / len(rows)
    assert found.per_request["tags"] == pytest.approx(weighted)


def test_described_in_a_line() -> None:
    text = MeanIds({f"f{n}": float(n) for n in range(14)}, "by hand").describe()
    assert text.startswith("mean ids per request: f13 13.00, f12 12.00, ")
    assert text.endswith(", f2 2.00 and 2 more (by hand)")
    assert MeanIds({}, "by hand").describe() == "mean ids per request: no id features (by hand)"


def test_an_empty_data_set_has_no_ids(tmp_path: Path) -> None:
    manifest = Manifest(version=1, schema_yaml=SCHEMA.to_yaml(), schema_digest=SCHEMA.digest, files=[])
    found = means_of(tmp_path, manifest)
    assert found.per_request["words"] == 0
    assert sequence_shares(SCHEMA, manifest, found) == {}
