"""MIND (Microsoft News) in its publisher's files: ``behaviors.tsv`` (a line per request) and ``news.tsv``.

A line of ``behaviors.tsv`` is a request: its impressions are ``news_id`` with the label ``clicked`` (null where the
publisher withholds it), its ``history`` the news that the user clicked before, oldest first. The columns of
``news.tsv`` are joined to impressions under their names, and to the history as ``history_<name>``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import Schema
from roo_ray.source_config import MindSource
from roo_ray.sources.base import Assembled, Log, ReadUnit
from roo_ray.sources.columns import as_array, list_parts, offsets_of
from roo_ray.sources.keys import first_of_each, name_of_difference, shared_ids
from roo_ray.sources.text import TextFile, TextRows, TextUnit, headless_file, stream_text, text_units

BEHAVIORS = "behaviors"
LINE = ("impression_id", "user_id", "time", "history", "impressions")
NEWS = ("news_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
FEATURES = NEWS[1:]
TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
TEXTS = pa.list_(pa.string())
ROWS = pa.schema(
    [
        ("impression_id", pa.int64()),
        ("user_id", pa.string()),
        ("time", pa.timestamp("s")),
        ("history", TEXTS),
        ("news_id", TEXTS),
        ("clicked", pa.list_(pa.int8())),
    ]
)
WHAT = "MIND's behaviors.tsv and news.tsv"
LOG = {BEHAVIORS: Log(ROWS, ("impression_id", "user_id", "time"))}


@dataclass(frozen=True)
class Mind(TextRows):
    """MIND whose files were found and lines counted; see ``open_mind``. ``news``: ``news_id``, unique, and the
    features that the schema reads."""

    row_schema: pa.Schema
    all_units: list[TextUnit]
    files: dict[str, TextFile]
    news: pa.Table
    read_news: int

    @property
    def logs(self) -> dict[str, Log]:
        """One log, ``behaviors``, whose rows are requests."""
        return LOG

    def units(self) -> list[ReadUnit]:
        """Lines of the ``behaviors.tsv`` of all folders."""
        return list(self.all_units)

    def counts(self) -> dict[str, int]:
        """``news``: distinct news of all ``news.tsv``."""
        return {"news": self.read_news}

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's requests, without news features, in tables of bounded size. Raises DataError naming file and
        line for anything that is not as the publisher writes it."""
        assert isinstance(unit, TextUnit)
        types = pa.schema([("impression_id", pa.int64()), *((name, pa.string()) for name in LINE[1:])])
        for line, table in stream_text(unit, self.files[unit.path], types, ("impression_id", "user_id", "impressions")):
            where = _Where(unit.path, line)
            news, clicked = _shown(as_array(table.column("impressions")), where)
            columns = [
                table.column("impression_id"),
                table.column("user_id"),
                _times(as_array(table.column("time")), where),
                _words(as_array(table.column("history"))),
                news,
                clicked,
            ]
            yield pa.table(columns, schema=ROWS)

    def assemble(self, parts: dict[str, pa.Table]) -> Assembled:
        """Joins the news to the requests of a bucket; news that no ``news.tsv`` has get empty text and are counted."""
        table = parts[BEHAVIORS]
        (ids,) = shared_ids([[table.column(name) for name in ("time", "user_id", "impression_id")]])
        table = table.take(pa.array(np.argsort(ids, kind="stable")))
        counts = {}
        made = {name: as_array(table.column(name)) for name in ROWS.names}
        for column, prefix in (("news_id", ""), ("history", "history_")):
            lengths, ids = list_parts(made[column])
            rows = _find(ids, as_array(self.news.column("news_id")))
            counts[f"unknown_news_in_{'impressions' if not prefix else 'history'}"] = rows.null_count
            for name in self.news.column_names[1:]:
                if prefix + name in self.row_schema.names:
                    values = pc.fill_null(as_array(self.news.column(name)).take(rows), "")
                    made[prefix + name] = pa.ListArray.from_arrays(offsets_of(lengths), values)
        rows = pa.table([made[name] for name in self.row_schema.names], schema=self.row_schema)
        return Assembled(rows, counts, {})


@dataclass(frozen=True)
class _Where:
    path: str
    line: int

    def refuse(self, row: int, what: str) -> DataError:
        return DataError(f"{self.path}, line {self.line + row}: {what}; correct or remove the line")


def _times(texts: pa.Array, where: _Where) -> pa.Array:
    """Seconds of ``11/15/2019 9:22:32 AM``; the publisher names no time zone, they are taken as UTC."""
    times = pc.strptime(texts, format=TIME_FORMAT, unit="s", error_is_null=True)
    if times.null_count:
        row = int(np.flatnonzero(np.asarray(times.is_null()))[0])
        raise where.refuse(row, f"time '{texts[row].as_py() or ''}' is not like 11/15/2019 9:22:32 AM")
    return times


def _words(texts: pa.Array) -> pa.Array:
    """(N,) lists of the words between single spaces or more; null and empty text give none."""
    clean = pc.utf8_trim_whitespace(pc.fill_null(texts, ""))
    lists = pc.split_pattern_regex(clean, pattern=" +")
    lengths, words = list_parts(lists)
    empty = np.asarray(pc.equal(clean, "")).astype(np.bool_)  # one empty word each
    if not empty.any():
        return lists
    kept = np.repeat(~empty, lengths)
    return pa.ListArray.from_arrays(offsets_of(np.where(empty, 0, lengths)), words.filter(pa.array(kept)))


def _shown(texts: pa.Array, where: _Where) -> tuple[pa.Array, pa.Array]:
    """(N,) lists of news ids and (N,) lists of labels of ``N3-1 N4-0``; ``N3 N4`` is without labels."""
    lists = _words(texts)
    lengths, words = list_parts(lists)
    coded = words.dictionary_encode()
    parts = pc.extract_regex(coded.dictionary, pattern=r"^(?P<id>[^-\s]+)(?:-(?P<label>[01]))?$")
    wrong = np.asarray(parts.is_null())[np.asarray(coded.indices)]
    if wrong.any():
        word = int(np.flatnonzero(wrong)[0])
        row = int(np.searchsorted(np.cumsum(lengths), word, side="right"))
        raise where.refuse(row, f"impression '{words[word].as_py()}' is not like N12345-0 or N12345-1")
    labels = pc.struct_field(parts, "label")
    labels = pc.if_else(pc.equal(labels, ""), pa.scalar(None, pa.string()), labels).cast(pa.int8())
    offsets = offsets_of(lengths)
    news = pc.struct_field(parts, "id").take(coded.indices)
    return pa.ListArray.from_arrays(offsets, news), pa.ListArray.from_arrays(offsets, labels.take(coded.indices))


def _find(ids: pa.Array, known: pa.Array) -> pa.Array:
    coded = ids.dictionary_encode()
    return pc.index_in(coded.dictionary, value_set=known).take(coded.indices)


def open_mind(source: MindSource, schema: Schema) -> Mind:
    """Finds the files, counts the lines of ``behaviors.tsv`` and reads what the schema needs of ``news.tsv``.

    Raises ConfigError where the schema names a column that MIND does not have, DataError where a file is missing,
    empty or broken, or two ``news.tsv`` differ on one news.
    """
    kinds = {field.name: field.type for field in ROWS}
    kinds |= {name: TEXTS for feature in FEATURES for name in (feature, f"history_{feature}")}
    impression_level = {"news_id", "clicked", *FEATURES}
    for level, names in (("request", schema.request_columns), ("impression", schema.impression_columns)):
        offered = sorted(name for name in kinds if (name in impression_level) == (level == "impression"))
        for name in names:
            if name not in offered:
                raise ConfigError(
                    f"schema '{schema.name}': {level}-level column '{name}' is not in MIND, whose {level}s have: "
                    f"{', '.join(offered)}"
                )
    wanted = [name for name in FEATURES if name in schema.columns or f"history_{name}" in schema.columns]
    files: dict[str, TextFile] = {}
    units: list[TextUnit] = []
    for folder in source.path:
        file = headless_file(folder, "behaviors.tsv", LINE, WHAT)
        files[file.path] = file
        found = text_units(file, "requests", BEHAVIORS, len(units))
        if not found:
            raise DataError(f"{file.path}: the file has no rows")
        # in memory: the text as words, and a text per word for each feature of the news
        units += [replace(unit, bytes=unit.bytes * (2 + len(wanted))) for unit in found]
    news = _read_news(source, wanted)
    row_schema = pa.schema([pa.field(name, kinds[name]) for name in schema.columns])
    return Mind(row_schema, units, files, news, news.num_rows)


def _read_news(source: MindSource, wanted: list[str]) -> pa.Table:
    types = pa.schema([(name, pa.string()) for name in ("news_id", *wanted)])
    tables = [types.empty_table()]
    for folder in source.path:
        file = headless_file(folder, "news.tsv", NEWS, WHAT)
        for unit in text_units(file, "requests", "news"):
            tables += [table for _, table in stream_text(unit, file, types, ("news_id",))]
    news = pa.concat_tables(tables).combine_chunks()
    (ids,) = shared_ids([[news.column("news_id")]])
    order = np.argsort(ids, kind="stable")
    first, firsts = first_of_each(ids, order)
    found = name_of_difference(news, firsts, order)
    if found is not None:
        name, at = found
        raise DataError(
            f"news.tsv: news {news.column('news_id')[int(order[at])]} is listed twice with another {name}; the folders "
            f"({', '.join(source.path)}) must come from one release"
        )
    return news.take(pa.array(first))
