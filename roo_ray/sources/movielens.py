"""MovieLens in its publisher's files: ``ratings.csv`` (20M and later) or ``ratings.dat`` (1M, 10M).

The files have a line per rating and no requests: those are derived per user (see ``sessions``), and a user's earlier
ratings are the history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import Schema
from roo_ray.source_config import MovielensSource
from roo_ray.sources.base import Assembled, Log, ReadUnit
from roo_ray.sources.columns import as_array
from roo_ray.sources.sessions import (
    HISTORY,
    HISTORY_TIME,
    INSTANT,
    POSITION,
    REQUEST_TIME,
    TAB,
    TIME_MS,
    USER,
    VIDEO,
    SessionRules,
    derive_requests,
)
from roo_ray.sources.text import (
    TextFile,
    TextUnit,
    find_files,
    headed_file,
    headless_file,
    require_columns,
    stream_text,
    text_units,
)

RATINGS = "ratings"
MOVIE, RATING, LIKED, RATED = "movie_id", "rating", "liked", "rated"
CSV = {"userId": USER, "movieId": MOVIE, "rating": RATING, "timestamp": "timestamp"}
DAT = (USER, "_1", MOVIE, "_2", RATING, "_3", "timestamp")  # 1::1193::5::978300760, split at every colon
WHAT = "MovieLens' ratings.csv or ratings.dat"
ROWS = pa.schema([(USER, pa.int64()), (MOVIE, pa.int64()), (RATING, pa.float32()), (TIME_MS, pa.int64())])
LOG = {RATINGS: Log(ROWS, (USER,))}
KINDS = {MOVIE: pa.int64(), RATING: pa.float32(), LIKED: pa.int8(), RATED: pa.int8(), POSITION: pa.int32()}


@dataclass(frozen=True)
class Movielens:
    """MovieLens whose file was found and lines counted; see ``open_movielens``."""

    row_schema: pa.Schema
    all_units: list[TextUnit]
    file: TextFile
    rules: SessionRules
    like_from: float

    @property
    def logs(self) -> dict[str, Log]:
        """One log, ``ratings``, whose rows meet by the user."""
        return LOG

    @property
    def codec(self) -> str:
        """Text is not compressed."""
        return "text"

    def units(self) -> list[ReadUnit]:
        """Lines of the ratings."""
        return list(self.all_units)

    def disk_bytes(self) -> None:
        """None: requests are derived, and no file is the impression-level table."""
        return

    def counts(self) -> dict[str, int]:
        """Nothing is counted on opening."""
        return {}

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's ratings in tables of bounded size. Raises DataError naming file, line and column."""
        assert isinstance(unit, TextUnit)
        dat = self.file.columns == DAT
        names = {name: name for name in DAT} if dat else CSV
        read = [name for name in self.file.columns if name in names]
        kinds = {USER: pa.int64(), MOVIE: pa.int64(), RATING: pa.float32(), "timestamp": pa.int64()}
        types = pa.schema([(name, kinds.get(names[name], pa.string())) for name in read])
        required = [name for name in read if names[name] in kinds]
        for line, table in stream_text(unit, self.file, types, required):
            for name in read:
                values = as_array(table.column(name))
                if names[name] not in kinds and values.null_count < len(values):
                    row = int(np.flatnonzero(np.asarray(values.is_valid()))[0])
                    raise DataError(
                        f"{self.file.path}, line {line + row}: fields must be separated by two colons; correct or "
                        "remove the line"
                    )
            columns = {names[name]: as_array(table.column(name)) for name in read}
            columns[TIME_MS] = pc.multiply(columns["timestamp"], 1000)
            yield pa.table([columns[name] for name in ROWS.names], schema=ROWS)

    def assemble(self, parts: dict[str, pa.Table]) -> Assembled:
        """The requests of a bucket of users; see ``sessions.derive_requests``."""
        ratings = parts[RATINGS]
        count = ratings.num_rows
        log = pa.table(
            {
                USER: ratings.column(USER),
                VIDEO: ratings.column(MOVIE),
                TAB: pa.array(np.zeros(count, np.int64)),
                TIME_MS: ratings.column(TIME_MS),
                MOVIE: ratings.column(MOVIE),
                RATING: ratings.column(RATING),
                LIKED: pc.greater_equal(ratings.column(RATING), self.like_from).cast(pa.int8()),
                RATED: pa.array(np.ones(count, np.int8)),
            }
        )
        requests, counts = derive_requests(log, self.rules)
        rows = pa.table([requests.column(name) for name in self.row_schema.names], schema=self.row_schema)
        return Assembled(rows, {"repeated_ratings": counts["repeated_impressions"]}, {})


def open_movielens(source: MovielensSource, schema: Schema) -> Movielens:
    """Finds the file of ratings and counts its lines.

    Raises ConfigError where the schema names a column that MovieLens does not have, DataError where the file is
    missing, empty, or there are two, or lacks a column.
    """
    _check_columns(schema)
    found = [name for name in find_files(source.path, "ratings.*", WHAT) if name in ("ratings.csv", "ratings.dat")]
    if len(found) != 1:
        raise DataError(f"{source.path} has {len(found)} of ratings.csv and ratings.dat; keep those of one release")
    if found[0] == "ratings.csv":
        file = headed_file(source.path, found[0])
        require_columns(file, tuple(CSV))
    else:
        file = replace(headless_file(source.path, found[0], DAT, WHAT), delimiter=":")
    units = text_units(file, "requests", RATINGS)
    if not units:
        raise DataError(f"{file.path} has no rows")
    # what a bucket of users becomes is mostly histories: at worst one per rating
    in_history = sum(name.startswith(HISTORY) for name in schema.request_columns)
    each = source.history_length * 8 * in_history
    units = [replace(unit, bytes=unit.bytes + unit.rows * each) for unit in units]
    kinds = {USER: pa.int64(), REQUEST_TIME: INSTANT, HISTORY_TIME: pa.list_(INSTANT)}
    kinds |= {f"{HISTORY}{name}": pa.list_(kind) for name, kind in KINDS.items()}
    kinds |= {name: pa.list_(kind) for name, kind in KINDS.items()}
    return Movielens(
        row_schema=pa.schema([(name, kinds[name]) for name in schema.columns]),
        all_units=units,
        file=file,
        rules=SessionRules(
            gap_ms=round(source.gap_seconds * 1000),
            max_impressions=source.max_impressions,
            history_of=(RATED,),
            history_length=source.history_length,
            request_columns=tuple(schema.request_columns),
            impression_columns=tuple(schema.impression_columns),
        ),
        like_from=source.like_from,
    )


def _check_columns(schema: Schema) -> None:
    in_history = [f"{HISTORY}{name}" for name in (MOVIE, RATING, LIKED)]
    for level, names, offered in (
        ("request", schema.request_columns, [USER, REQUEST_TIME, HISTORY_TIME, *in_history]),
        ("impression", schema.impression_columns, list(KINDS)),
    ):
        for name in names:
            if name not in offered:
                raise ConfigError(
                    f"schema '{schema.name}': {level}-level column '{name}' is not in MovieLens, whose {level}s have: "
                    f"{', '.join(offered)}"
                )
