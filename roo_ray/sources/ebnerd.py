"""EB-NeRD in its publisher's files: ``behaviors.parquet`` (a row per request) and ``history.parquet`` (a row
per user).

Request rows come out: the impressions of a request are the articles in view (``article_id_inview``, from
``article_ids_inview``), with the label ``clicked`` (1 where the article is in ``article_ids_clicked``); the
user's history lists are joined by ``user_id``. Every other request-level column is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roo_ray.errors import DataError
from roo_ray.lists import as_array, is_list, list_parts, offsets_of
from roo_ray.schema import Schema
from roo_ray.sources.base import (
    ParquetInput,
    ReadUnit,
    common_schema,
    make_units,
    open_parquet,
    read_footers,
    stream_unit,
    to_plain,
)

USER = "user_id"
INVIEW = "article_ids_inview"
CLICKED_IDS = "article_ids_clicked"
ARTICLE = "article_id_inview"
CLICKED = "clicked"


@dataclass(frozen=True)
class Ebnerd:
    """The publisher's two files, whose footers were read and fit the schema; see ``open_ebnerd``."""

    folder: str
    history_path: str
    row_schema: pa.Schema
    behaviors_schema: pa.Schema
    history_schema: pa.Schema
    all_units: list[ReadUnit]

    def units(self) -> list[ReadUnit]:
        """Row groups of the behaviors file."""
        return self.all_units

    def batches(self, unit: ReadUnit) -> Iterator[pa.Table]:
        """Request rows. Raises DataError for a clicked article that is not in view, and for a user with two
        history rows."""
        histories = self._histories()
        for batch in stream_unit(unit, self.behaviors_schema.names):
            rows = to_plain(pa.Table.from_batches([batch]), self.behaviors_schema)
            made = {ARTICLE: as_array(rows.column(INVIEW)), CLICKED: clicked_labels(rows, unit.path)}
            made |= joined_histories(rows.column(USER), histories)
            columns = [made.get(name, None) for name in self.row_schema.names]
            yield pa.table(
                [
                    rows.column(field.name) if column is None else column
                    for field, column in zip(self.row_schema, columns, strict=True)
                ],
                schema=self.row_schema,
            )

    def _histories(self) -> pa.Table:
        with open_parquet(self.folder, self.history_path) as file:
            histories = to_plain(file.read(self.history_schema.names), self.history_schema)
        repeated = histories.num_rows - len(histories.column(USER).unique())
        if repeated:
            raise DataError(f"{self.history_path}: {repeated} rows repeat a {USER}; expected one row per user")
        return histories

    def disk_bytes(self) -> None:
        """The files are request-level: there are no impression-level bytes as logged."""

    def verify(self, counts: Mapping[str, int]) -> None:
        """Raises DataError where no request at all has a history: the files' user ids do not match."""
        if self.history_schema.names != [USER] and counts.get("empty_histories", 0) >= counts["requests"]:
            raise DataError(
                f"none of the {counts['requests']} requests has a history in {self.history_path}: the {USER} "
                "values of the two files do not match; take both files from the same split"
            )


def open_ebnerd(folder: str, schema: Schema) -> Ebnerd:
    """Reads the footers of the two files in ``folder``. Raises DataError where one is missing or broken, or
    lacks a column that the schema names."""
    behaviors, history = (_footer(folder, name) for name in ("behaviors.parquet", "history.parquet"))
    unknown = [column for column in schema.impression_columns if column not in (ARTICLE, CLICKED)]
    if unknown:
        raise DataError(
            f"schema '{schema.name}': impression-level column '{unknown[0]}' is not in EB-NeRD, whose "
            f"impressions have '{ARTICLE}' and '{CLICKED}'"
        )
    of_user = [c for c in schema.request_columns if c not in behaviors.schema.names and c in history.schema.names]
    of_request = [c for c in schema.request_columns if c not in of_user]
    for name in of_user:
        if not is_list(history.schema.field(name).type):
            raise DataError(f"{history.path}: column '{name}' is not a list; history columns are lists")
    read = list(dict.fromkeys([*of_request, USER, INVIEW, CLICKED_IDS]))
    behaviors_schema = common_schema([behaviors], read)
    history_schema = common_schema([history], [USER, *of_user])
    inview = behaviors_schema.field(INVIEW).type
    if not is_list(inview):
        raise DataError(f"{behaviors.path}: column '{INVIEW}' has type {inview}; expected a list of ids")
    kinds = {ARTICLE: inview, CLICKED: pa.list_(pa.int8())}
    kinds |= {field.name: field.type for part in (history_schema, behaviors_schema) for field in part}
    row_schema = pa.schema([(name, kinds[name]) for name in schema.columns])
    units = make_units([behaviors], set(read), "requests")
    if not units:
        raise DataError(f"{behaviors.path}: the file has no rows")
    return Ebnerd(folder, history.path, row_schema, behaviors_schema, history_schema, units)


def _footer(folder: str, name: str) -> ParquetInput:
    try:
        return read_footers([f"{folder.rstrip('/')}/{name}"])[0]
    except DataError as error:
        raise DataError(
            f"{error}; source.path must be the folder with EB-NeRD's behaviors.parquet and history.parquet"
        ) from None


def clicked_labels(behaviors: pa.Table, path: str) -> pa.Array:
    """(N,) lists of int8: for each article in view, 1 where it is among the request's clicked articles.

    Raises DataError naming the file and request for a clicked article that is not in view: its click would be
    lost.
    """
    lengths, shown = list_parts(as_array(behaviors.column(INVIEW)))
    click_lengths, clicks = list_parts(as_array(behaviors.column(CLICKED_IDS)))
    codes = pa.concat_arrays([shown, clicks.cast(shown.type)]).dictionary_encode(null_encoding="encode")
    code = np.asarray(codes.indices).astype(np.int64)
    rows = np.concatenate(
        [np.repeat(np.arange(len(lengths)), lengths), np.repeat(np.arange(len(lengths)), click_lengths)]
    )
    pairs = rows * max(len(codes.dictionary), 1) + code  # one number per (request, article)
    shown_pairs, click_pairs = pairs[: len(shown)], pairs[len(shown) :]
    lost = np.flatnonzero(~np.isin(click_pairs, shown_pairs))
    if len(lost):
        row = int(rows[len(shown) + lost[0]])
        raise DataError(
            f"{path}: {len(lost)} clicked articles are not in view and their clicks would be lost (first: "
            f"article {clicks[int(lost[0])]}, user {behaviors.column(USER)[row]}); correct '{CLICKED_IDS}' or "
            f"'{INVIEW}'"
        )
    clicked = np.isin(shown_pairs, click_pairs).astype(np.int8)
    return pa.ListArray.from_arrays(offsets_of(lengths), pa.array(clicked))


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
