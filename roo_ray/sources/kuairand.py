"""KuaiRand in its publisher's files: ``log_*.csv``, ``user_features_*.csv`` and ``video_features_basic_*.csv``.

The logs have a line per impression and no requests: those are derived per user (see ``sessions``). Video features
are joined to the impressions as they are read, user features where a user's rows meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import ConfigError, DataError
from roo_ray.schema import Schema
from roo_ray.source_config import KuairandSource
from roo_ray.sources.base import Assembled, Log, ReadUnit
from roo_ray.sources.columns import as_array, list_parts, offsets_of
from roo_ray.sources.compare import Ints
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
    TextRows,
    TextUnit,
    find_files,
    first_unfit,
    headed_file,
    require_columns,
    stream_text,
    text_units,
)

IMPRESSIONS, USERS = "impressions", "users"
LOG_COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms"),
    *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
    *("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
USER_TEXTS = (
    *("user_active_degree", "follow_user_num_range", "fans_user_num_range"),
    *("friend_user_num_range", "register_days_range"),
)
USER_COLUMNS = (
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range"),
    *("friend_user_num", "friend_user_num_range", "register_days", "register_days_range"),
    *(f"onehot_feat{number}" for number in range(18)),
)
VIDEO_TEXTS = ("video_type", "upload_dt", "upload_type")
VIDEO_COLUMNS = (
    *("author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration"),
    *("server_width", "server_height", "music_id", "music_type", "tag"),
)
TAGS = "tag"
KNOWN = "video_known"
WHAT = "KuaiRand's log_*.csv, user_features_*.csv and video_features_basic_*.csv"


@dataclass(frozen=True)
class Kuairand(TextRows):
    """KuaiRand whose files were found and lines counted; see ``open_kuairand``. ``impression_types``: the rows of a
    log with video features; ``user_types``: those of the user features; ``log_columns``: what is read of a log;
    ``videos``: the file of video features, where the schema reads any of ``video_columns``."""

    row_schema: pa.Schema
    all_units: list[TextUnit]
    files: dict[str, TextFile]
    log_columns: tuple[str, ...]
    video_columns: tuple[str, ...]
    impression_types: pa.Schema
    user_types: pa.Schema | None
    videos: TextFile | None
    rules: SessionRules
    log_files: int

    @property
    def logs(self) -> dict[str, Log]:
        """``impressions`` and, where the schema reads user features, ``users``; they meet by the user."""
        found = {IMPRESSIONS: Log(self.impression_types, (USER,))}
        return found if self.user_types is None else found | {USERS: Log(self.user_types, (USER,))}

    def units(self) -> list[ReadUnit]:
        """Lines of the logs, then of the user features."""
        return list(self.all_units)

    def counts(self) -> dict[str, int]:
        """``log_files``: the logs that are read."""
        return {"log_files": self.log_files}

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's rows in tables of bounded size: impressions with their videos' features, or users. Raises
        DataError naming file, line and column."""
        assert isinstance(unit, TextUnit)
        file = self.files[unit.path]
        if unit.log == USERS:
            assert self.user_types is not None
            yield from _typed(unit, file, self.user_types)
            return
        types = pa.schema([(name, pa.int64()) for name in self.log_columns])
        videos = self._videos_of(unit, file) if self.videos is not None else None
        for _, table in stream_text(unit, file, types, self.log_columns):
            columns = {name: as_array(table.column(name)) for name in self.log_columns}
            if videos is not None:
                rows = pc.index_in(columns[VIDEO], value_set=as_array(videos.column(VIDEO)))
                columns |= {name: as_array(videos.column(name)).take(rows) for name in self.video_columns}
                columns[KNOWN] = pc.is_valid(rows)
            yield pa.table([columns[name] for name in self.impression_types.names], schema=self.impression_types)

    def _videos_of(self, unit: TextUnit, file: TextFile) -> pa.Table:
        """The features of the unit's videos; of the file of all videos never more is held than a block."""
        assert self.videos is not None
        only = pa.schema([(VIDEO, pa.int64())])
        parts = [as_array(t.column(VIDEO)).unique() for _, t in stream_text(unit, file, only, (VIDEO,))]
        wanted = pa.concat_arrays(parts).unique() if parts else pa.array([], pa.int64())
        types = pa.schema([self.impression_types.field(name) for name in (VIDEO, *self.video_columns)])
        found = [types.empty_table()]
        for part in text_units(self.videos, "requests", "videos"):
            for table in _typed(part, self.videos, types):
                found.append(table.filter(pc.is_in(table.column(VIDEO), value_set=wanted)))
        videos = pa.concat_tables(found).combine_chunks()
        _refuse_repeated(videos, VIDEO, self.videos.path)
        return videos

    def assemble(self, parts: dict[str, pa.Table]) -> Assembled:
        """The requests of a bucket of users; see ``sessions.derive_requests``. Raises DataError where a user has two
        rows of features."""
        requests, counts = derive_requests(parts[IMPRESSIONS], self.rules)
        if KNOWN in self.impression_types.names:
            known = as_array(parts[IMPRESSIONS].column(KNOWN))
            counts["impressions_of_unknown_videos"] = len(known) - int(pc.sum(known).as_py() or 0)
        columns = {name: requests.column(name) for name in requests.column_names}
        aside = {}
        if USERS in parts:
            users = parts[USERS]
            _refuse_repeated(users, USER, "the file of user features")
            ids, owners = as_array(users.column(USER)), as_array(requests.column(USER))
            rows = pc.index_in(owners, value_set=ids)
            columns |= {n: as_array(users.column(n)).take(rows) for n in users.column_names if n != USER}
            counts["requests_of_users_without_features"] = rows.null_count
            idle = pc.invert(pc.is_in(ids, value_set=owners.unique()))
            counts["users_without_impressions"] = int(pc.sum(idle).as_py() or 0)
            if counts["users_without_impressions"]:
                aside["users_without_impressions"] = users.filter(idle).sort_by(USER)
        rows = pa.table([columns[name] for name in self.row_schema.names], schema=self.row_schema)
        return Assembled(rows, counts, aside)


# ---- values --------------------------------------------------------------------------------------


def _kind(name: str, texts: Sequence[str]) -> pa.DataType:
    if name == TAGS:
        return pa.list_(pa.int64())
    return pa.string() if name in texts else pa.int64()


def _typed(unit: TextUnit, file: TextFile, types: pa.Schema) -> Iterator[pa.Table]:
    """Rows of a file of features. Whole numbers may be written ``720.0``, as the publisher does where a column has
    empty fields; ``tag`` is a list such as ``12,65``."""
    texts = pa.schema([(name, pa.string()) for name in types.names])
    for line, table in stream_text(unit, file, texts, types.names[:1]):
        columns = []
        for item in types:
            values = as_array(table.column(item.name))
            if pa.types.is_integer(item.type):
                values = _whole(values, item.name, file.path, np.arange(line, line + len(values)))
            elif pa.types.is_list(item.type):
                lengths, words = list_parts(pc.split_pattern(values, pattern=","))
                lines = np.repeat(np.arange(line, line + len(values)), lengths)
                values = pa.ListArray.from_arrays(offsets_of(lengths), _whole(words, item.name, file.path, lines))
            columns.append(values)
        yield pa.table(columns, schema=types)


def _whole(values: pa.Array, name: str, path: str, lines: Ints) -> pa.Array:
    plain = pc.replace_substring_regex(values, pattern=r"\.0*$", replacement="")
    try:
        return plain.cast(pa.int64())
    except pa.ArrowInvalid:
        bad = first_unfit(plain, pa.int64())
        assert bad is not None
        raise DataError(
            f"{path}, line {lines[bad]}, column '{name}': '{values[bad].as_py()}' is no whole number; correct or "
            "remove the line"
        ) from None


def _refuse_repeated(table: pa.Table, key: str, path: str) -> None:
    counts = pc.value_counts(as_array(table.column(key)))
    repeated = counts.field(0).filter(pc.greater(counts.field(1), 1))
    if len(repeated):
        raise DataError(
            f"{path}: {len(repeated)} values of {key} have several rows (first: {pc.min(repeated).as_py()}); there "
            "must be one row each"
        )


# ---- opening -------------------------------------------------------------------------------------


def open_kuairand(source: KuairandSource, schema: Schema) -> Kuairand:
    """Finds the files and counts their lines; files of features only where the schema reads them.

    Raises ConfigError where the schema names a column that KuaiRand does not have, DataError where a file is
    missing or empty, or lacks a column.
    """
    _check_columns(schema)
    read = {name.removeprefix(HISTORY) for name in schema.request_columns} | set(schema.columns)
    user_columns = tuple(name for name in USER_COLUMNS if name in schema.request_columns)
    video_columns = tuple(name for name in VIDEO_COLUMNS if name in read)
    needed = {USER, VIDEO, TAB, TIME_MS, *source.history_of}
    log_columns = tuple(name for name in LOG_COLUMNS if name in read or name in needed)

    names = sorted({name for pattern in source.logs for name in find_files(source.path, pattern, WHAT)})
    logs = [headed_file(source.path, name) for name in names]
    for file in logs:
        require_columns(file, log_columns)
    users = _features(source.path, "user_features_*.csv", (USER, *user_columns))
    videos = _features(source.path, "video_features_basic_*.csv", (VIDEO, *video_columns))
    units: list[TextUnit] = []
    for file in logs:
        units += text_units(file, "requests", IMPRESSIONS, len(units))
    if not units:
        raise DataError(f"{source.path}: the logs ({', '.join(names)}) have no rows")
    if users is not None:
        units += text_units(users, "requests", USERS, len(units))

    # what a bucket of users becomes is mostly histories: one per request, of some four impressions
    in_history = sum(name.startswith(HISTORY) for name in schema.request_columns)
    each = source.history_length * 8 * in_history // 4
    units = [replace(unit, bytes=unit.bytes + unit.rows * (each if unit.log == IMPRESSIONS else 0)) for unit in units]
    kinds = dict.fromkeys(log_columns, pa.int64()) | {name: _kind(name, VIDEO_TEXTS) for name in video_columns}
    impression_types = list(kinds.items()) + ([(KNOWN, pa.bool_())] if videos is not None else [])
    user_types = {USER: pa.int64()} | {name: _kind(name, USER_TEXTS) for name in user_columns}
    kinds |= {f"{HISTORY}{name}": pa.list_(kind) for name, kind in kinds.items()}
    kinds |= {HISTORY_TIME: pa.list_(INSTANT), REQUEST_TIME: INSTANT, POSITION: pa.int32()} | user_types
    kinds |= {name: pa.list_(kinds[name]) for name in schema.impression_columns}
    return Kuairand(
        row_schema=pa.schema([(name, kinds[name]) for name in schema.columns]),
        all_units=units,
        files={file.path: file for file in [*logs, *([users] if users else [])]},
        log_columns=log_columns,
        video_columns=video_columns,
        impression_types=pa.schema(impression_types),
        user_types=None if users is None else pa.schema(list(user_types.items())),
        videos=videos,
        rules=SessionRules(
            gap_ms=round(source.gap_seconds * 1000),
            max_impressions=source.max_impressions,
            history_of=tuple(source.history_of),
            history_length=source.history_length,
            request_columns=tuple(name for name in schema.request_columns if name not in user_columns),
            impression_columns=tuple(schema.impression_columns),
        ),
        log_files=len(logs),
    )


def _features(folder: str, pattern: str, columns: tuple[str, ...]) -> TextFile | None:
    """The one file that holds the columns; None where there is nothing to read but its key."""
    if len(columns) == 1:
        return None
    names = find_files(folder, pattern, WHAT)
    if len(names) > 1:
        raise DataError(f"{folder} has several files {pattern} ({', '.join(names)}); keep those of one release")
    file = headed_file(folder, names[0])
    require_columns(file, columns)
    return file


def _check_columns(schema: Schema) -> None:
    of_impression = [POSITION, *(c for c in LOG_COLUMNS if c not in (USER, TAB)), *VIDEO_COLUMNS]
    in_history = [f"{HISTORY}{c}" for c in (*LOG_COLUMNS, *VIDEO_COLUMNS) if c not in (USER, TAGS)]
    of_request = [USER, TAB, REQUEST_TIME, HISTORY_TIME, *USER_COLUMNS, *in_history]
    for level, names, offered in (
        ("request", schema.request_columns, of_request),
        ("impression", schema.impression_columns, of_impression),
    ):
        for name in names:
            if name not in offered:
                raise ConfigError(
                    f"schema '{schema.name}': {level}-level column '{name}' is not in KuaiRand, whose {level}s have: "
                    f"{', '.join(offered)}"
                )
