"""A schema suggested for an impression table: rules of thumb over types, names and how columns behave in a sample.

It is a start for a person: levels follow from the data, kinds and tables from types and names. What is not
understood is carried, so that the data set stays lossless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from roo_ray.errors import DataError
from roo_ray.requests.profile import ColumnUse, Use
from roo_ray.schema import Schema, parse_schema
from roo_ray.sources.columns import as_array, list_parts
from roo_ray.sources.compare import sort_codes
from roo_ray.sources.times import epoch_seconds, is_time_type

RARELY = 0.01  # a column that varies in fewer requests is still taken as request-level
MOST_HISTORY = 1000
LABEL = re.compile(r"click|label|convert|conversion|purchas|bought|buy|like|follow|share|install|hate|forward")
WEAK_LABEL = re.compile(r"^(is|has)_|^target$|^y$")
ID = re.compile(
    r"(^|_)(id|ids|uid|code|type|topic|category|cat|country|device|item|article|video|author|tag|brand)(_|$)|_?id$"
)
USER = re.compile(r"(^|_)(user|uid|member|visitor|customer|viewer)(_|$)|^user|^uid")
TIME = re.compile(r"time|date|(^|_)(ts|at|day)(_|$)|timestamp")
POSITION = re.compile(r"(^|_)(position|pos|rank|slot|index)(_|$)")
HISTORY = re.compile(r"hist|seq|recent|last|past|fixed|click|view|watch|read")
NOT_A_STEM = {"history", "hist", "seq", "sequence", "list", "last", "recent", "past", "id", "ids", "fixed", "inview"}
EPOCH = (6e8, 4e9)  # 1989 to 2096 in seconds: what a column of times holds


@dataclass
class Roles:
    """The columns that a schema must know, given by the user or guessed; ``guessed``: words about the latter."""

    user: str | None = None
    time: str | None = None
    labels: list[str] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)


def level_of(use: ColumnUse) -> str:
    """``request`` where the column (almost) never varies within a request, else ``impression``."""
    return "request" if use.share <= RARELY else "impression"


def suggest_schema(name: str, rows: pa.Table, use: Use, key: Sequence[str], roles: Roles, dim: int = 32) -> Schema:
    """The schema, parsed back from the YAML that it will be written as. Fills in ``roles`` by guesses. Raises
    DataError that says what to name where user, time or label cannot be guessed."""
    draft = _Draft(rows, use, key, roles, dim)
    text = yaml.safe_dump(draft.content(name), sort_keys=False)
    return parse_schema(text, "the suggested schema")


class _Draft:
    def __init__(self, rows: pa.Table, use: Use, key: Sequence[str], roles: Roles, dim: int) -> None:
        self.firsts = pa.array(use.order[use.starts])
        self.rows, self.use, self.key, self.roles, self.dim = rows, use, list(key), roles, dim
        self.tables: dict[str, dict[str, Any]] = {}
        self.table_types: dict[str, bool] = {}
        self.features: list[dict[str, Any]] = []
        self.carry: dict[str, list[str]] = {"request": [], "impression": []}

    def kind(self, name: str) -> pa.DataType:
        return self.rows.schema.field(name).type

    def level(self, name: str) -> str:
        return level_of(self.use.columns[name])

    def request_values(self, name: str) -> pa.Array:
        return as_array(self.rows.column(name).take(self.firsts))

    def content(self, name: str) -> dict[str, Any]:
        self.find_roles()
        keys = self.keys()
        taken = {*self.key, keys["user"], keys["time"], *self.roles.labels}
        taken |= {keys[role] for role in ("position", "impression_time") if role in keys}
        open_columns = [column for column in self.rows.column_names if column not in taken]
        lists = [c for c in open_columns if pa.types.is_list(self.kind(c))]
        self.scalars([c for c in open_columns if c not in lists])
        self.request_lists([c for c in lists if self.level(c) == "request"])
        for column in lists:
            if self.level(column) == "impression":
                self.bag(column)
        if not self.features:
            raise DataError(
                "no column looks like a feature (numbers, ids or lists of ids); write the schema by hand, see "
                "docs/schema.md"
            )
        labels = [{"name": _word(label), "column": label} for label in self.roles.labels]
        content: dict[str, Any] = {"name": name, "keys": keys, "tables": self.tables, "features": self.features}
        content["labels"] = labels
        if any(self.carry.values()):
            content["carry"] = {level: names for level, names in self.carry.items() if names}
        return content

    # ---- keys and labels ---------------------------------------------------------------------------

    def find_roles(self) -> None:
        constant = [c for c in self.rows.column_names if not self.use.columns[c].varying]
        scalar = [c for c in constant if not pa.types.is_nested(self.kind(c))]
        roles = self.roles
        hashable = [c for c in scalar if not pa.types.is_floating(self.kind(c)) and not pa.types.is_null(self.kind(c))]
        timely = [c for c in scalar if is_time_type(self.kind(c)) and self.holds_times(self.request_values(c), c)]
        timely.sort(key=lambda c: (not pa.types.is_timestamp(self.kind(c)), not TIME.search(c.lower())))
        for role, candidates in (
            ("user", [c for c in hashable if USER.search(c.lower())]),
            ("time", [c for c in timely if TIME.search(c.lower()) or pa.types.is_timestamp(self.kind(c))]),
        ):
            given = getattr(roles, role)
            if given is not None and self.use.columns[given].varying:
                found = self.use.columns[given]
                raise DataError(
                    f"--{role} {given} varies within {found.varying} of {found.several} requests (first: "
                    f"{found.example}); the {role} of a request is one value: correct the request key"
                )
            if given is None and not candidates:
                raise DataError(
                    f"no column that is constant within requests looks like the request's {role}; name it with --{role}"
                )
            if given is None:
                setattr(roles, role, candidates[0])
                roles.guessed.append(f"{role}: {candidates[0]}")
        if not roles.labels:
            binary = [c for c in self.rows.column_names if c not in self.key and self.is_binary(c)]
            varying = [c for c in binary if self.use.columns[c].varying]
            roles.labels = next(
                (
                    found
                    for found in ([c for c in varying if rule.search(c.lower())] for rule in (LABEL, WEAK_LABEL))
                    if found
                ),
                [],
            )
            if not roles.labels:
                hint = f" (0/1 columns that vary within requests: {', '.join(varying)})" if varying else ""
                raise DataError(f"no column of 0 and 1 looks like a label{hint}; name it with --label")
            roles.guessed.append(f"labels: {', '.join(roles.labels)}")

    def keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"request": self.key, "user": self.roles.user, "time": self.roles.time}
        varying = [
            c
            for c in self.rows.column_names
            if self.level(c) == "impression" and not pa.types.is_nested(self.kind(c)) and c not in self.roles.labels
        ]
        unique = [c for c in varying if self.is_id(c) and not TIME.search(c.lower()) and self.unique_within(c)]
        if unique:
            keys["impression"] = unique[0]
        positions = [c for c in varying if pa.types.is_integer(self.kind(c)) and POSITION.search(c.lower())]
        if positions:
            keys["position"] = positions[0]
        times = [c for c in varying if pa.types.is_timestamp(self.kind(c))]
        if times:
            keys["impression_time"] = times[0]
        return keys

    def is_binary(self, name: str) -> bool:
        kind = self.kind(name)
        if pa.types.is_boolean(kind):
            return True
        if (
            not (pa.types.is_integer(kind) or pa.types.is_floating(kind))
            or not 0 < self.use.columns[name].distinct <= 2
        ):
            return False
        return set(pc.unique(self.rows.column(name).drop_null()).to_pylist()) <= {0, 1}

    def unique_within(self, name: str) -> bool:
        codes = sort_codes(self.rows.column(name))[self.use.order]
        request = np.repeat(np.arange(len(self.use.starts)), self.use.lengths)
        order = np.lexsort([codes, request])
        same = (np.diff(codes[order]) == 0) & (np.diff(request[order]) == 0)
        return not bool(same.any())

    def holds_times(self, values: pa.Array, name: str) -> bool:
        if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
            return True
        known = values.drop_null()
        if not pa.types.is_integer(values.type) or not len(known):
            return False
        seconds = epoch_seconds(known, name)
        return bool((seconds >= EPOCH[0]).all() and (seconds <= EPOCH[1]).all())

    # ---- features ----------------------------------------------------------------------------------

    def is_id(self, name: str, kind: pa.DataType | None = None) -> bool:
        kind = self.kind(name) if kind is None else kind
        if pa.types.is_string(kind) or pa.types.is_binary(kind):
            return True
        return pa.types.is_integer(kind) and bool(ID.search(name.lower()))

    def scalars(self, columns: Sequence[str]) -> None:
        for name in columns:
            kind, level, use = self.kind(name), self.level(name), self.use.columns[name]
            of = len(self.use.starts) if level == "request" else self.rows.num_rows
            feature: dict[str, Any] = {"name": _word(name), "level": level}
            outcome = level == "impression" and LABEL.search(name.lower())  # or close to one: no feature
            if outcome or pa.types.is_temporal(kind) or pa.types.is_nested(kind) or pa.types.is_null(kind):
                self.carry[level].append(name)
            elif self.is_id(name):
                if level == "request" and use.distinct > 0.5 * of:  # names the request rather than a kind of it
                    self.carry[level].append(name)
                    continue
                feature |= {"kind": "ids", "columns": name, "table": self.table(name, kind)}
                self.features.append(feature | ({"fill_id": 0} if use.nulls else {}))
            elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
                feature |= {"kind": "dense", "columns": [name]}
                if use.nulls or (pa.types.is_floating(kind) and pc.any(pc.is_nan(self.rows.column(name))).as_py()):
                    feature["fill"] = 0.0
                self.features.append(feature | self.scale(self.rows.column(name)))
            else:
                self.carry[level].append(name)

    def scale(self, values: pa.ChunkedArray | pa.Array) -> dict[str, str]:
        if pa.types.is_boolean(values.type):
            return {}
        least, most = (value.as_py() for value in pc.min_max(values).values())
        return {"scale": "log1p"} if least is not None and least >= 0 and most > 100 else {}

    def request_lists(self, columns: Sequence[str]) -> None:
        """Lists of equal length in every request of the sample are one sequence, or a bag of ids."""
        groups: dict[bytes, list[str]] = {}
        for name in columns:
            if pa.types.is_nested(self.kind(name).value_type):
                self.carry["request"].append(name)
                continue
            lengths = list_parts(self.request_values(name))[0]
            groups.setdefault(lengths.tobytes(), []).append(name)
        for names in groups.values():
            longest = int(list_parts(self.request_values(names[0]))[0].max(initial=0))
            times = [
                c for c in names if self.holds_times(self.request_values(c).flatten(), c) and TIME.search(c.lower())
            ]
            ids = [c for c in names if c not in times and self.is_list_of_ids(c)]
            if not ids:
                self.carry["request"] += names
            elif len(names) == 1 and not HISTORY.search(names[0].lower()):
                self.bag(names[0])
            else:
                self.sequence(names, ids, times, longest)

    def is_list_of_ids(self, name: str) -> bool:
        kind = self.kind(name).value_type
        return pa.types.is_string(kind) or (pa.types.is_integer(kind) and self.use.columns[name].distinct > 2)

    def sequence(self, names: Sequence[str], ids: Sequence[str], times: Sequence[str], longest: int) -> None:
        columns: list[dict[str, Any]] = []
        for name in names:
            kind = self.kind(name).value_type
            if name in ids and (self.is_id(name, kind) or not any(self.is_id(c, self.kind(c).value_type) for c in ids)):
                columns.append({"column": name, "table": self.table(name, kind)})
            elif name in times[:1]:
                continue
            elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
                columns.append({"column": name, **self.scale(self.request_values(name).flatten())})
            else:
                self.carry["request"].append(name)
        name = self.unused(_stem(names[0], keep_history=True))
        feature: dict[str, Any] = {"name": name, "level": "request", "kind": "sequence"}
        feature["max_length"] = max(1, min(longest, MOST_HISTORY))
        if times:
            feature["time"] = times[0]
        self.features.append(feature | {"sequence": columns})

    def bag(self, name: str) -> None:
        kind = self.kind(name).value_type
        if not self.is_list_of_ids(name) or pa.types.is_nested(kind):
            self.carry[self.level(name)].append(name)
            return
        feature = {"name": self.unused(_word(name)), "level": self.level(name), "kind": "ids", "columns": name}
        self.features.append(feature | {"table": self.table(name, kind), "pooling": "mean"})

    def unused(self, name: str) -> str:
        taken = {feature["name"] for feature in self.features}
        return name if name not in taken else next(f"{name}_{n}" for n in range(2, 1000) if f"{name}_{n}" not in taken)

    def table(self, column: str, kind: pa.DataType) -> str:
        """The table of a column's ids: one with its history and candidate columns, by the stem of the name."""
        name, text = _stem(column), not pa.types.is_integer(kind)
        if self.table_types.setdefault(name, text) != text:
            name = _word(column)
            self.table_types[name] = text
        use = self.use.columns[column]
        # Chao's estimate of how many values there are, from those seen once and twice
        values = use.distinct + use.once**2 / (2 * max(use.twice, 1))
        rows = 1 << int(np.ceil(np.log2(max(16.0, 2 * values))))
        before = self.tables.get(name, {"rows": 0})
        self.tables[name] = {"rows": max(rows, before["rows"]), "dim": self.dim, "hash": True}
        return name


def _word(column: str) -> str:
    word = re.sub(r"\W", "_", column)
    return word if re.match(r"[A-Za-z_]", word) else f"_{word}"


def _stem(column: str, keep_history: bool = False) -> str:
    """``history_item`` and ``item_id`` -> ``item``; with ``keep_history`` ``history_item`` -> ``history``."""
    parts = [part for part in re.split(r"[^a-z0-9]+", column.lower()) if part]
    if keep_history:
        return "history" if any(part in NOT_A_STEM - {"id", "ids"} for part in parts) else f"{_word(column)}_sequence"
    left = [part for part in parts if part not in NOT_A_STEM]
    return _word("_".join(left) or column)
