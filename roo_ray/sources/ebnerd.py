"""EB-NeRD in its publisher's files: ``behaviors.parquet`` (a row per request) and ``history.parquet`` (a row
per user).

Request rows come out: the impressions of a request are the articles in view (``article_id_inview``, from
``article_ids_inview``), with the label ``clicked`` (1 where the article is in ``article_ids_clicked``); the
user's history lists are joined by ``user_id``. Every other request-level column is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from roo_ray.errors import DataError
from roo_ray.schema import Schema
from roo_ray.sources.base import (
    BATCH_BYTES,
    ParquetInput,
    ReadUnit,
    codecs,
    common_schema,
    make_units,
    read_footers,
    stream_unit,
    to_plain,
)
from roo_ray.sources.columns import as_array, is_list, list_parts, offsets_of
from roo_ray.sources.positives import positives_to_labels
from roo_ray.storage import join_path, open_filesystem

USER = "user_id"
INVIEW = "article_ids_inview"
CLICKED_IDS = "article_ids_clicked"
ARTICLE = "article_id_inview"
CLICKED = "clicked"


@dataclass(frozen=True)
class Ebnerd:
    """EB-NeRD whose footers and user ids were read and agree; see ``open_ebnerd``. ``behaviors_types`` and
    ``history_types``: the columns taken from each file."""

    row_schema: pa.Schema
    all_units: list[ReadUnit]
    behaviors_types: pa.Schema
    history_types: pa.Schema
    history_units: list[ReadUnit]
    requests_without_history: int
    codec: str

    def units(self) -> list[ReadUnit]:
        """Row groups of the request log; their ``bytes`` count the joined histories."""
        return self.all_units

    def disk_bytes(self) -> None:
        """None: the rows are requests already."""
        return

    def counts(self) -> dict[str, int]:
        """``requests_without_history``, where the schema reads the history."""
        if not self.history_units:
            return {}
        return {"requests_without_history": self.requests_without_history}

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """The unit's requests in tables of bounded size. Raises DataError that names the file, also for a
        clicked article that is not in view."""
        histories = self._histories(unit) if self.history_units else None
        for batch in stream_unit(unit, self.behaviors_types.names, BATCH_BYTES):
            table = to_plain(pa.Table.from_batches([batch]), self.behaviors_types)
            made = {ARTICLE: as_array(table.column(INVIEW)), CLICKED: clicked_labels(table, unit.path)}
            if histories is not None:
                made |= joined_histories(table.column(USER), histories)
            columns = {n: made[n] if n in made else table.column(n) for n in self.row_schema.names}
            yield to_plain(pa.table(columns), self.row_schema)

    def key_batches(self, unit: ReadUnit, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of the request log, in tables of the same rows."""
        types = pa.schema([self.behaviors_types.field(name) for name in columns])
        for batch in stream_unit(unit, columns, BATCH_BYTES):
            yield to_plain(pa.Table.from_batches([batch]), types)

    def _histories(self, unit: ReadUnit) -> pa.Table:
        """The rows of the history file for the unit's users."""
        users = _column(unit, USER).unique()
        found = [self.history_types.empty_table()]
        for part in self.history_units:
            for batch in stream_unit(part, self.history_types.names):
                table = to_plain(pa.Table.from_batches([batch]), self.history_types)
                found.append(table.filter(pc.is_in(table.column(USER).cast(users.type), value_set=users)))
        return pa.concat_tables(found)


def _column(unit: ReadUnit, name: str) -> pa.Array:
    return pa.concat_arrays([batch.column(0) for batch in stream_unit(unit, [name])])


def open_ebnerd(folder: str, schema: Schema) -> Ebnerd:
    """Reads the footers and user ids of the two files in ``folder`` (local or URI).

    Raises DataError where a file is missing or broken, a column of the schema is in neither, a user has two
    histories, or no request at all has one (the user ids of the two files do not match).
    """
    behaviors, history = _footer(folder, "behaviors.parquet"), _footer(folder, "history.parquet")
    unknown = [c for c in schema.impression_columns if c not in (ARTICLE, CLICKED)]
    if unknown:
        raise DataError(
            f"schema '{schema.name}': impression-level column '{unknown[0]}' is not in EB-NeRD, whose "
            f"impressions have '{ARTICLE}' and '{CLICKED}'"
        )
    in_history = set(history.schema.names) - set(behaviors.schema.names)
    of_user = [c for c in schema.request_columns if c in in_history]
    of_request = [c for c in schema.request_columns if c not in in_history]
    behaviors_types = common_schema([behaviors], list(dict.fromkeys([*of_request, USER, INVIEW, CLICKED_IDS])))
    history_types = common_schema([history], [USER, *of_user])
    lists = [(behaviors, behaviors_types, INVIEW), (behaviors, behaviors_types, CLICKED_IDS)]
    for item, types, name in lists + [(history, history_types, c) for c in of_user]:
        if not is_list(types.field(name).type):
            raise DataError(f"{item.path}: column '{name}' has type {types.field(name).type}; expected a list")
    kinds = {field.name: field.type for types in (behaviors_types, history_types) for field in types}
    kinds |= {ARTICLE: kinds[INVIEW], CLICKED: pa.list_(pa.int8())}

    units = make_units([behaviors], set(behaviors_types.names), "requests")
    if not units:
        raise DataError(f"{behaviors.path}: the file has no rows")
    history_units = make_units([history], set(history_types.names), "requests") if of_user else []
    if of_user and not history_units:
        raise DataError(f"{history.path}: the file has no rows, so every history would be empty")
    each = sum(unit.bytes for unit in history_units) // max(sum(unit.rows for unit in history_units), 1)
    return Ebnerd(
        row_schema=pa.schema([pa.field(name, kinds[name]) for name in schema.columns]),
        all_units=[replace(unit, bytes=unit.bytes + unit.rows * each) for unit in units],
        behaviors_types=behaviors_types,
        history_types=history_types,
        history_units=history_units,
        requests_without_history=_without_history(units, history_units) if of_user else 0,
        codec=codecs([behaviors, history]),
    )


def _footer(folder: str, name: str) -> ParquetInput:
    whole = join_path(folder, name)
    filesystem, inner = open_filesystem(whole)
    if filesystem.get_file_info(inner).type != pafs.FileType.File:
        raise DataError(
            f"{inner} not found; source.path must be the folder with EB-NeRD's behaviors.parquet and history.parquet"
        )
    return read_footers([whole])[0]


def _without_history(behaviors: list[ReadUnit], history: list[ReadUnit]) -> int:
    known = pa.concat_arrays([_column(unit, USER) for unit in history])
    repeated = len(known) - len(known.unique())
    if repeated:
        raise DataError(
            f"{history[0].path}: {repeated} rows repeat a {USER}; there must be one row of history per user"
        )
    users = pa.concat_arrays([_column(unit, USER) for unit in behaviors])
    try:
        present = pc.is_in(users, value_set=known.cast(users.type))
    except pa.ArrowException as error:
        raise DataError(
            f"{USER} has type {known.type} in {history[0].path} and {users.type} in {behaviors[0].path}; "
            f"they do not compare ({error})"
        ) from None
    missing = len(users) - int(pc.sum(present).as_py())
    if missing == len(users):
        raise DataError(
            f"none of the {len(users)} requests in {behaviors[0].path} has a history in {history[0].path}: the "
            f"{USER} values of the two files do not match; take both files from the same split"
        )
    return missing


def clicked_labels(behaviors: pa.Table, path: str) -> pa.Array:
    """(N,) lists of int8: for each article in view, 1 where it is among the request's clicked articles. Raises
    DataError for a clicked article that is not in view."""
    return positives_to_labels(
        as_array(behaviors.column(INVIEW)),
        as_array(behaviors.column(CLICKED_IDS)),
        (INVIEW, CLICKED_IDS),
        path,
        lambda row: f"{USER}={behaviors.column(USER)[row]} in row {row}",
    )


def joined_histories(users: pa.ChunkedArray, histories: pa.Table) -> dict[str, pa.Array]:
    """The history columns for each row's user; a user without history has empty lists."""
    keys = as_array(histories.column(USER)).cast(users.type)
    rows = pc.index_in(as_array(users), value_set=keys)
    joined = {}
    for name in histories.column_names:
        if name != USER:
            lengths, values = list_parts(as_array(histories.column(name)).take(rows))
            joined[name] = pa.ListArray.from_arrays(offsets_of(lengths), values)
    return joined
