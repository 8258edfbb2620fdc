"""Text tables in units and blocks of any size: every line once, with its number."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_ray.errors import DataError
from roo_ray.sources import text
from roo_ray.sources.text import headed_file, headless_file, stream_text, text_units

TYPES = pa.schema([("word", pa.string()), ("number", pa.int64())])
WORD = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n", exclude_categories=["Cs"]), max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(WORD, st.integers(-(2**62), 2**62)), max_size=30),
    newline=st.sampled_from(["\n", "\r\n"]),
    end=st.sampled_from(["", "\n", "\n\n", "\r\n\r\n"]),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 80)),
)
def test_every_line_once_with_its_number(
    folder: Path, rows: list[tuple[str, int]], newline: str, end: str, sizes: tuple[int, int]
) -> None:
    lines = [f"{word}\tunread\t{number}" for word, number in rows]
    (folder / "t.tsv").write_bytes((newline.join(lines) + end).encode())
    file = headless_file(str(folder), "t.tsv", ("word", "unread", "number"), "a table")
    found: list[tuple[str | None, int]] = []
    with mock.patch.object(text, "UNIT_BYTES", sizes[0]), mock.patch.object(text, "BLOCK_BYTES", sizes[1]):
        units = text_units(file, "requests", "log", 5)
        assert [unit.index for unit in units] == list(range(5, 5 + len(units)))
        assert sum(unit.rows for unit in units) == len(rows)
        for unit in units:
            for line, table in stream_text(unit, file, TYPES, ("number",)):
                assert line == 1 + len(found)
                found += zip(table.column("word").to_pylist(), table.column("number").to_pylist(), strict=True)
    assert found == [(word or None, number) for word, number in rows]


def test_headers_and_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfword,"number"\r\n"a,b ""c""",7\r\n')
    file = headed_file(str(tmp_path), "a.csv")
    assert file.columns == ("word", "number")
    (unit,) = text_units(file, "requests", "")
    ((line, table),) = stream_text(unit, file, TYPES, ())
    assert (line, table.to_pylist()) == (2, [{"word": 'a,b "c"', "number": 7}])
    (tmp_path / "a.csv").write_text('word,number\n"a\nb",7\n')
    file = headed_file(str(tmp_path), "a.csv")
    (unit,) = text_units(file, "requests", "")
    with pytest.raises(DataError, match=r"a\.csv: lines 2 to 3 hold 1 rows; a row must be one line"):
        list(stream_text(unit, file, TYPES, ()))


def test_a_file_that_shrinks_during_the_build(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("word,number\n" + "x,1\n" * 100)
    file = headed_file(str(tmp_path), "a.csv")
    (unit,) = text_units(file, "requests", "")
    path.write_text("word,number\n" + "x,1\n" * 50)
    with pytest.raises(DataError, match=r"a\.csv became shorter while it was read; run it again"):
        list(stream_text(unit, file, TYPES, ()))
