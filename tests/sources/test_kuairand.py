"""KuaiRand: small files in its publisher's format; requests and histories against a row-by-row reference."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.config import load_config
from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import Schema
from roo_ray.source_config import KuairandSource
from roo_ray.sources import kuairand, open_source, text
from roo_ray.sources.kuairand import LOG_COLUMNS, USER_COLUMNS, VIDEO_COLUMNS, Kuairand
from roo_ray.sources.sessions import SessionRules, derive_requests
from tests.sources.joined import assemble

ROOT = Path(__file__).parents[2]
SCHEMA = load_config(ROOT / "configs" / "kuairand.yaml").request_schema
START = 1_649_400_000_000  # 2022-04-08 06:40 UTC
Row = dict[str, int]


def shown(user: int, video: int, second: float, tab: int = 1, **signals: int) -> Row:
    """A line of a log."""
    row = dict.fromkeys(LOG_COLUMNS, 0) | {"user_id": user, "video_id": video, "tab": tab, "date": 20220408}
    row |= {"time_ms": START + round(second * 1000), "hourmin": 1440, "duration_ms": 1000 * video}
    return row | {"play_time_ms": 10 * video} | signals


LINES = [
    shown(0, 10, 0, is_click=1),
    shown(0, 20, 30, long_view=1),
    shown(0, 30, 30.5, is_click=1, is_like=1),
    shown(0, 10, 200, is_click=1),
    shown(1, 20, 10, is_click=1),
    shown(1, 20, 20, tab=0),
    shown(1, 40, 20, tab=0, is_rand=1),
]
USERS = {
    0: ["full_active", 0, 0, 0, 5, "(0,10]", 0, "0", 0, "0", 107, "61-90", 1, 153, *[""] * 16],
    1: ["high_active", 0, 0, 1, 386, "(250,500]", 4, "[1,10)", 2, "[1,5)", 327, "181-365", 0, 638, *[0.0] * 16],
    7: ["UNKNOWN", -124, 0, 0, 5, "(0,10]", 0, "0", 0, "0", 107, "61-90", 1, 153, *[""] * 16],
}
VIDEOS = {
    10: [123, "NORMAL", "2022-04-10", "LongImport", 0.0, 87433.0, 720.0, 1280.0, 9155697141, 9.0, "39"],
    20: [456, "NORMAL", "2022-04-10", "Kmovie", 0.0, "", 720.0, 1280.0, 6355810746, 9.0, "12,65"],
    30: [789, "AD", "2022-04-09", "ShortImport", 1.0, 9233.0, 720.0, 1280.0, 6618412736, 4.0, ""],
}


def lines_of(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """CSV as the publisher writes it: only what holds a comma is quoted."""

    def cell(value: Any) -> str:
        return f'"{value}"' if "," in str(value) else str(value)

    return "".join(",".join(map(cell, row)) + "\n" for row in [list(header), *rows])


def write(folder: Path, lines: list[Row] = LINES, logs: int = 2) -> Path:
    """The files of KuaiRand-1K, the rows dealt to so many logs."""
    folder.mkdir(exist_ok=True, parents=True)
    names = ["log_standard_4_08_to_4_21_1k.csv", "log_random_4_22_to_5_08_1k.csv", "log_standard_4_22_to_5_08_1k.csv"]
    for number in range(logs):
        content = lines_of(LOG_COLUMNS, [list(row.values()) for row in lines[number::logs]])
        (folder / names[number]).write_text(content)
    users = lines_of(["user_id", *USER_COLUMNS], [[user, *values] for user, values in USERS.items()])
    (folder / "user_features_1k.csv").write_text(users)
    videos = lines_of(["video_id", *VIDEO_COLUMNS], [[video, *values] for video, values in VIDEOS.items()])
    (folder / "video_features_basic_1k.csv").write_text(videos)
    (folder / "video_features_statistic_1k.csv").write_text("not,read\n")
    return folder


def opened(folder: Path, schema: Schema = SCHEMA, **changes: Any) -> Kuairand:
    config = KuairandSource.model_validate({"kind": "kuairand", "path": str(folder)} | changes)
    source = open_source(config, schema)
    assert isinstance(source, Kuairand)
    return source


def moment(second: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(START / 1000 + second, datetime.timezone.utc).replace(tzinfo=None)


def test_the_publishers_files(tmp_path: Path) -> None:
    source = opened(write(tmp_path))
    result = assemble(source)
    assert result.rows.column_names == SCHEMA.columns
    rows = result.rows.to_pylist()
    keys = [(row["user_id"], row["request_time"], row["tab"], row["video_id"]) for row in rows]
    assert keys == [
        (0, moment(0), 1, [10, 20, 30]),
        (0, moment(200), 1, [10]),
        (1, moment(10), 1, [20]),
        (1, moment(20), 0, [20, 40]),
    ]
    assert [row["history_video_id"] for row in rows] == [[], [10, 30], [], [20]]
    assert rows[1]["history_time"] == [moment(0), moment(30.5)]
    assert rows[1]["history_play_time_ms"] == [100, 300]
    assert [row["position"] for row in rows] == [[0, 1, 2], [0], [0], [0, 1]]
    assert rows[0]["is_click"] == [1, 0, 1]
    assert rows[0]["is_like"] == [0, 0, 1]
    assert rows[0]["tag"] == [[39], [12, 65], []]
    assert rows[3]["author_id"] == [456, None]
    assert rows[3]["is_rand"] == [0, 1]
    assert [row["user_active_degree"] for row in rows] == ["full_active"] * 2 + ["high_active"] * 2
    assert rows[3]["follow_user_num"] == 386
    assert source.counts() == {"log_files": 2}
    assert result.counts == {
        "repeated_impressions": 0,
        "impressions_of_unknown_videos": 1,
        "requests_of_users_without_features": 0,
        "users_without_impressions": 1,
    }
    assert result.aside["users_without_impressions"].column("user_id").to_pylist() == [7]
    assert {unit.log for unit in source.units()} == {"impressions", "users"}
    dealt = assemble(source, buckets=3, seed=5)
    assert dealt.rows.sort_by([("user_id", "ascending"), ("request_time", "ascending")]).equals(result.rows)
    assert dealt.counts == result.counts


def test_rules_by_config(tmp_path: Path) -> None:
    write(tmp_path, [*LINES, LINES[0]])
    by_view = assemble(opened(tmp_path, history_of=["long_view", "is_like"], history_length=1)).rows
    assert by_view.column("history_video_id").to_pylist() == [[], [30], [], []]
    by_time = assemble(opened(tmp_path, gap_seconds=0))
    assert by_time.rows.column("video_id").to_pylist() == [[10], [20], [30], [10], [20], [20, 40]]
    assert by_time.counts["repeated_impressions"] == 1
    short = assemble(opened(tmp_path, gap_seconds=1000, max_impressions=2)).rows
    assert short.column("video_id").to_pylist() == [[10, 20], [30, 10], [20], [20, 40]]
    standard = opened(tmp_path, logs=["log_standard_*.csv"])
    assert standard.counts() == {"log_files": 1}
    assert assemble(standard).rows.column("video_id").to_pylist() == [[10, 30], [20], [40]]


def test_only_what_the_schema_reads_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for name in ("user_features_1k.csv", "video_features_basic_1k.csv"):
        (folder / name).unlink()
    with pytest.raises(
        DataError, match=r"has no file user_features_\*\.csv; source\.path must be the folder with Kuai"
    ):
        opened(folder)
    content = SCHEMA.model_dump()
    kept = ("tab", "history", "video", "duration")
    content["features"] = [feature for feature in content["features"] if feature["name"] in kept]
    result = assemble(opened(folder, Schema.model_validate(content)))
    assert result.rows.num_rows == 4
    assert result.counts == {"repeated_impressions": 0}
    content["carry"]["impression"] = ["is_liked"]
    with pytest.raises(ConfigError, match=r"impression-level column 'is_liked' is not in KuaiRand"):
        opened(folder, Schema.model_validate(content))


def test_large_files_come_in_units_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    lines = [shown(rng.randrange(20), rng.randrange(1, 50), rng.randrange(4000), rng.randrange(2)) for _ in range(900)]
    folder = write(tmp_path, lines, logs=3)
    whole = assemble(opened(folder))
    monkeypatch.setattr(text, "UNIT_BYTES", 9000)
    monkeypatch.setattr(text, "BLOCK_BYTES", 1500)
    source = opened(folder)
    assert len(source.units()) > 6
    again = assemble(source, seed=2)
    assert again.rows.equals(whole.rows)
    assert again.counts == whole.counts
    total = sum(map(len, whole.rows.column("video_id").to_pylist()))
    assert total + whole.counts["repeated_impressions"] == 900


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "log_standard_4_08_to_4_21_1k.csv",
            ",is_click,",
            ",isclick,",
            r"log_standard.*'is_click' is missing; did you mean",
        ),
        (
            "log_random_4_22_to_5_08_1k.csv",
            "\n0,20,",
            "\n0,2x0,",
            r"log_random.*line 2, column 'video_id': '2x0' is no whole",
        ),
        ("log_random_4_22_to_5_08_1k.csv", "\n0,20,", "\n0,", r"log_random.*line 2: 18 fields, but a line has 19"),
        ("log_random_4_22_to_5_08_1k.csv", "\n0,20,", "\n0,,", r"log_random.*line 2: column 'video_id' is empty"),
        (
            "log_random_4_22_to_5_08_1k.csv",
            "user_id,video_id,",
            "tab,video_id,",
            r"line 1: the header names column 'tab' twice",
        ),
        (
            "video_features_basic_1k.csv",
            "\n30,789,",
            "\n30,78.5,",
            r"video_features.*line 4, column 'author_id': '78.5' is no whole",
        ),
        (
            "video_features_basic_1k.csv",
            '"12,65"',
            '"12,x"',
            r"video_features.*line 3, column 'tag': 'x' is no whole number",
        ),
        ("video_features_basic_1k.csv", "\n30,", "\n20,", r"1 values of video_id have several rows \(first: 20\)"),
        ("user_features_1k.csv", "\n7,", "\n1,", r"1 values of user_id have several rows \(first: 1\)"),
        ("user_features_1k.csv", "register_days,", "registered,", r"user_features.*column 'register_days' is missing"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    path = write(tmp_path) / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        assemble(opened(tmp_path))


def test_missing_and_empty_logs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder not found: .*nowhere"):
        opened(tmp_path / "nowhere")
    folder = write(tmp_path / "a")
    with pytest.raises(DataError, match=r"has no file log_27k\*\.csv"):
        opened(folder, logs=["log_27k*.csv"])
    with pytest.raises(DataError, match=r"the logs \(log_random.*have no rows"):
        opened(write(tmp_path / "b", []))
    (folder / "log_random_4_22_to_5_08_1k.csv").write_text("")
    with pytest.raises(DataError, match=r"log_random.*the file is empty; its first line must name the columns"):
        opened(folder)


# ---- requests against a reference ----------------------------------------------------------------

LOGGED = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": st.integers(0, 2),
            "video_id": st.integers(0, 3),
            "tab": st.integers(0, 1),
            "time_ms": st.integers(0, 25),
            "is_click": st.integers(0, 1),
        }
    ),
    min_size=1,
    max_size=30,
)


def requests_by_hand(rows: list[Row], gap: int, most: int | None, length: int) -> list[dict[str, Any]]:
    """One row at a time."""
    order = ("user_id", "time_ms", "tab", "video_id", "is_click")
    distinct = sorted({tuple(row[name] for name in order) for row in rows})
    runs: list[list[tuple[int, ...]]] = []
    for row in distinct:
        last = runs[-1][-1] if runs else None
        if last is None or (last[0], last[2]) != (row[0], row[2]) or row[1] - last[1] > gap:
            runs.append([])
        runs[-1].append(row)
    found = []
    for run in runs:
        parts: dict[int, list[tuple[int, ...]]] = {}
        for row in run:
            place = [other[1] for other in run].index(row[1])  # rows of one time stay together
            parts.setdefault(0 if most is None else place // most, []).append(row)
        found += parts.values()
    made = []
    for request in found:
        user, time, tab = request[0][:3]
        clicks = [row for row in distinct if row[0] == user and row[1] < time and row[4]]
        made.append(
            {
                "user_id": user,
                "request_time": time,
                "tab": tab,
                "history_video_id": [row[3] for row in clicks][max(0, len(clicks) - length) :],
                "history_time": [row[1] for row in clicks][max(0, len(clicks) - length) :],
                "video_id": [row[3] for row in request],
                "time_ms": [row[1] for row in request],
                "position": list(range(len(request))),
            }
        )
    return made


@settings(max_examples=100, deadline=None)
@given(LOGGED, st.integers(0, 8), st.sampled_from([None, 1, 2, 3]), st.integers(0, 4), st.integers(0, 9))
def test_requests_equal_a_row_by_row_reference(
    rows: list[Row], gap: int, most: int | None, length: int, seed: int
) -> None:
    columns = ("user_id", "request_time", "tab", "history_video_id", "history_time")
    rules = SessionRules(gap, most, ("is_click",), length, columns, ("video_id", "time_ms", "position"))
    table = pa.Table.from_pylist(rows)
    made, counts = derive_requests(table, rules)
    expected = requests_by_hand(rows, gap, most, length)
    times = made.set_column(1, "request_time", made.column("request_time").cast(pa.int64()))
    times = times.set_column(4, "history_time", times.column("history_time").cast(pa.list_(pa.int64())))
    assert times.to_pylist() == expected
    assert counts == {"repeated_impressions": len(rows) - sum(len(row["video_id"]) for row in expected)}
    keys = [(row["user_id"], row["request_time"], row["tab"]) for row in expected]
    assert len(set(keys)) == len(keys)
    shuffled = table.take(pa.array(np.random.default_rng(seed).permutation(len(rows))))
    assert derive_requests(shuffled, rules)[0].equals(made)


def test_no_rows_give_no_requests() -> None:
    rules = SessionRules(1, 2, ("is_click",), 3, ("user_id", "request_time", "history_time"), ("video_id", "position"))
    empty = pa.schema([(n, pa.int64()) for n in ("user_id", "video_id", "tab", "time_ms", "is_click")]).empty_table()
    made, counts = derive_requests(empty, rules)
    assert made.num_rows == 0
    assert counts == {"repeated_impressions": 0}
    assert kuairand.KNOWN not in made.column_names
