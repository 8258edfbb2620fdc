"""MIND: small files in its publisher's format, against rows written by hand, and every way a file can be broken."""

from __future__ import annotations

import datetime
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from roo_ray.config import load_config
from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import Schema
from roo_ray.source_config import MindSource
from roo_ray.sources import open_source, text
from roo_ray.sources.mind import Mind
from tests.sources.joined import assemble

ROOT = Path(__file__).parents[2]
SCHEMA = load_config(ROOT / "configs" / "mind.yaml").request_schema

BEHAVIORS = (
    "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782 N999\tN55689-1 N35729-0\n"
    '2\tU91836\t11/12/2019 6:11:30 PM\t\tN20678-0 N39317-0 N58114-"\n'.replace('-"', "-1")
    + "3\tU73700\t11/14/2019 12:01:09 AM\tN55189\tN50014-0\n"
)
NEWS = (
    "N55189\ttv\ttvnews\t'Wheel Of \"Fortune\" Guest\tWe'd like to\thttps://assets/x.html\t[]\t[]\n"
    'N42782\tsports\tbaseball\t"Yankees open quote\t\thttps://assets/y.html\t[{"Label": "New York"}]\t[]\n'
    "N55689\tsports\tfootball_nfl\tCharles\ta\tu\t[]\t[]\n"
    "N35729\tnews\tnewscrime\tPorsche\tb\tu\t[]\t[]\n"
    "N20678\ttv\ttvnews\tø\tc\tu\t[]\t[]\n"
    "N39317\tnews\tnewsus\td\td\tu\t[]\t[]\n"
    "N50014\tfinance\tmarkets\te\te\tu\t\t\n"
)


def write(folder: Path, behaviors: str | bytes = BEHAVIORS, news: str | bytes = NEWS) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in (("behaviors.tsv", behaviors), ("news.tsv", news)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def opened(*folders: Path, schema: Schema = SCHEMA) -> Mind:
    source = open_source(MindSource(kind="mind", path=[str(folder) for folder in folders]), schema)
    assert isinstance(source, Mind)
    return source


def test_the_publishers_files(tmp_path: Path) -> None:
    source = opened(write(tmp_path))
    result = assemble(source)
    assert result.rows.column_names == SCHEMA.columns
    assert result.rows.select(["impression_id", "user_id", "history", "news_id", "clicked"]).to_pylist() == [
        {
            "impression_id": 1,
            "user_id": "U13740",
            "history": ["N55189", "N42782", "N999"],
            "news_id": ["N55689", "N35729"],
            "clicked": [1, 0],
        },
        {
            "impression_id": 2,
            "user_id": "U91836",
            "history": [],
            "news_id": ["N20678", "N39317", "N58114"],
            "clicked": [0, 0, 1],
        },
        {"impression_id": 3, "user_id": "U73700", "history": ["N55189"], "news_id": ["N50014"], "clicked": [0]},
    ]
    assert result.rows.column("time").to_pylist() == [
        datetime.datetime(2019, 11, 11, 9, 5, 58),
        datetime.datetime(2019, 11, 12, 18, 11, 30),
        datetime.datetime(2019, 11, 14, 0, 1, 9),
    ]
    assert result.rows.column("history_category").to_pylist() == [["tv", "sports", ""], [], ["tv"]]
    assert result.rows.column("category").to_pylist() == [["sports", "news"], ["tv", "news", ""], ["finance"]]
    assert result.rows.column("subcategory").to_pylist()[1] == ["tvnews", "newsus", ""]
    assert result.counts == {"unknown_news_in_impressions": 1, "unknown_news_in_history": 1}
    assert source.counts() == {"news": 7}
    assert assemble(source, buckets=3, seed=1).rows.sort_by("impression_id").equals(result.rows)
    by_uri = open_source(MindSource(kind="mind", path=[tmp_path.as_uri()]), SCHEMA)
    assert assemble(by_uri).rows.equals(result.rows)  # type: ignore[arg-type]


def test_quotes_are_text_and_every_column_of_the_news_is_offered(tmp_path: Path) -> None:
    content = SCHEMA.model_dump()
    content["carry"] = {"request": ["history_title"], "impression": ["title", "abstract", "title_entities"]}
    rows = assemble(opened(write(tmp_path), schema=Schema.model_validate(content))).rows
    assert rows.column("history_title").to_pylist()[0] == ['\'Wheel Of "Fortune" Guest', '"Yankees open quote', ""]
    assert rows.column("title").to_pylist()[1] == ["ø", "d", ""]
    assert rows.column("title_entities").to_pylist() == [["[]", "[]"], ["[]", "[]", ""], [""]]


def test_the_test_split_has_no_labels(tmp_path: Path) -> None:
    rows = assemble(opened(write(tmp_path, "7\tU1\t11/20/2019 1:00:00 PM\tN55189\tN35729 N20678\r\n\r\n"))).rows
    assert rows.column("clicked").to_pylist() == [[None, None]]
    assert rows.column("news_id").to_pylist() == [["N35729", "N20678"]]
    assert rows.schema.field("clicked").type == pa.list_(pa.int8())


def test_several_splits_repeat_impression_ids(tmp_path: Path) -> None:
    train = write(tmp_path / "train")
    dev = write(tmp_path / "dev", BEHAVIORS.replace("U", "V"), "N58114\ta\tb\tc\td\te\tf\tg\n" + NEWS)
    source = opened(train, dev)
    result = assemble(source)
    assert result.rows.num_rows == 6
    assert result.counts["unknown_news_in_impressions"] == 0
    assert source.counts() == {"news": 8}
    write(dev, news=NEWS.replace("tv\ttvnews\tø", "tv\ttvother\tø"))
    with pytest.raises(DataError, match=r"news N20678 is listed twice with another subcategory; the folders"):
        opened(train, dev)


def test_units_and_blocks_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = BEHAVIORS.splitlines()
    content = "\n".join(f"{n}{lines[n % 3][1:]}" for n in range(500))  # no newline at the end
    whole = assemble(opened(write(tmp_path, content))).rows
    monkeypatch.setattr(text, "UNIT_BYTES", 6000)
    monkeypatch.setattr(text, "BLOCK_BYTES", 700)
    source = pickle.loads(pickle.dumps(opened(tmp_path)))
    units = source.units()
    assert len(units) > 4
    assert sum(unit.rows for unit in units) == 500
    assert assemble(source, seed=3).rows.equals(whole)
    assert sorted(whole.column("impression_id").to_pylist()) == list(range(500))
    monkeypatch.setattr(text, "BLOCK_BYTES", 10)  # smaller than a line
    assert assemble(opened(tmp_path)).rows.equals(whole)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("4\tU1\t11/14/2019 7:00:00 AM\tN1", r"behaviors\.tsv, line 3: 4 fields, but a line has 5"),
        ("x4\tU1\t11/14/2019 7:00:00 AM\t\tN1-0", r"line 3, column 'impression_id': 'x4' is no whole number"),
        ("4\tU1\t2019-11-14 07:00:00\t\tN1-0", r"line 3: time '2019-11-14 07:00:00' is not like 11/15/2019 9:22:32 AM"),
        ("4\tU1\t\t\tN1-0", r"line 3: time '' is not like"),
        ("4\t\t11/14/2019 7:00:00 AM\t\tN1-0", r"line 3: column 'user_id' is empty"),
        ("4\tU1\t11/14/2019 7:00:00 AM\t\t", r"line 3: column 'impressions' is empty"),
        ("4\tU1\t11/14/2019 7:00:00 AM\t\tN1-0 N2-2", r"line 3: impression 'N2-2' is not like N12345-0"),
        ("", r"line 3: column 'impression_id' is empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    lines = BEHAVIORS.splitlines()
    source = opened(write(tmp_path, "\n".join([*lines[:2], line, lines[2], ""])))
    with pytest.raises(DataError, match=message):
        assemble(source)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    source = opened(write(tmp_path, BEHAVIORS.encode().replace(b"U73700", b"U\xff")))
    with pytest.raises(DataError, match=r"behaviors\.tsv, line 3, column 'user_id': 'U\\xff' is no UTF-8 text"):
        assemble(source)


def test_files_that_are_missing_or_empty_and_columns_that_mind_has_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder not found: .*nowhere; source\.path must be the folder with MIND"):
        opened(tmp_path / "nowhere")
    folder = write(tmp_path / "a", news=NEWS + "N1\ttv\n")
    with pytest.raises(DataError, match=r"news\.tsv, line 8: 2 fields, but a line has 8"):
        opened(folder)
    (folder / "news.tsv").unlink()
    with pytest.raises(DataError, match=r"has no file news\.tsv; .*it has: behaviors\.tsv"):
        opened(folder)
    with pytest.raises(DataError, match=r"behaviors\.tsv: the file has no rows"):
        opened(write(tmp_path / "b", "\n\n"))
    content = SCHEMA.model_dump() | {"carry": {"impression": ["clicks"]}}
    with pytest.raises(ConfigError, match=r"impression-level column 'clicks' is not in MIND, whose impressions have"):
        opened(write(tmp_path / "c"), schema=Schema.model_validate(content))
