"""The request schema: the one place where column names live.

A schema is a YAML file that says what a request is (its key), which columns are request-only (RO, one value
per request) and which are impression-level (NRO, one value per impression), how each becomes model input,
which embedding tables they read, and which columns are labels. Every other part reads it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from roo_ray.errors import ConfigError
from roo_ray.storage import read_text, without_secrets

Level = Literal["request", "impression"]
Kind = Literal["dense", "ids", "sequence"]
Pooling = Literal["none", "sum", "mean"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ColumnNames = Annotated[list[str], BeforeValidator(_as_list)]


class Strict(BaseModel):
    """Base of all typed YAML: unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Table(Strict):
    """An embedding table; several features may read it (an item's id in history and as a candidate).

    ``rows``: number of embeddings; ids are 0 .. rows-1. ``dim``: floats per embedding. ``hash``: ids of any
    integer or string type are hashed into the table; without it, an id outside 0 .. rows-1 is an error.
    ``managed``: ids of any integer or string type, more than there are rows: training gives each a row of its own, and
    takes it back for ids that are met more (docs/models.md, "Unbounded ids").
    """

    rows: int = Field(gt=0)
    dim: int = Field(gt=0)
    hash: bool = False
    managed: bool = False

    @property
    def unbounded(self) -> bool:
        """Ids of any integer or string type are taken."""
        return self.hash or self.managed

    @model_validator(mode="after")
    def _one_way_for_ids(self) -> Table:
        if self.managed and self.hash:
            raise ValueError("'hash' and 'managed' are two ways for unbounded ids; take one")
        if self.managed and self.rows < 2:
            raise ValueError("a managed table has a row for ids without one beside the others: give it 2 rows or more")
        return self


class SequenceColumn(Strict):
    """One of the aligned list columns of an event sequence: ids of a ``table``, or a dense value."""

    column: str
    table: str | None = None
    scale: Literal["none", "log1p"] = "none"

    @model_validator(mode="after")
    def _scale_is_for_dense(self) -> SequenceColumn:
        if self.table is not None and self.scale != "none":
            raise ValueError(f"sequence column '{self.column}': 'scale' is for dense columns, not for ids")
        return self


def _as_sequence_columns(value: Any) -> Any:
    value = _as_list(value)
    if isinstance(value, list):
        return [{"column": item} if isinstance(item, str) else item for item in value]
    return value


class Feature(Strict):
    """One model input.

    kind ``dense``: ``columns`` are numeric (or boolean) scalars; nulls and NaNs become ``fill``, or are an
    error when ``fill`` is not given. ``scale: log1p`` applies log(1 + max(x, 0)).
    kind ``ids``: one column of ids into ``table``. ``pooling: none``: exactly one id per request or impression
    (nulls become ``fill_id``, or are an error). ``sum`` / ``mean``: a list of ids (or a scalar, read as a list
    of one; null is the empty list), pooled, cut to the first ``max_length``.
    kind ``sequence`` (request level only): ``sequence`` are list columns of equal length, oldest event first,
    of which the last ``max_length`` events are kept; ``time`` is the list column with the events' times.
    """

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    level: Level
    kind: Kind
    columns: ColumnNames = []
    sequence: Annotated[list[SequenceColumn], BeforeValidator(_as_sequence_columns)] = []
    time: str | None = None
    table: str | None = None
    pooling: Pooling = "none"
    max_length: int | None = Field(default=None, gt=0)
    fill: float | None = None
    fill_id: int | None = Field(default=None, ge=0)
    scale: Literal["none", "log1p"] = "none"

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Feature:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"feature '{self.name}': {message}")

        if self.kind == "sequence":
            need(self.level == "request", "a sequence is request-level (user history); set level: request")
            need(bool(self.sequence), "a sequence needs 'sequence', its aligned list columns")
            need(
                any(column.table for column in self.sequence),
                "a sequence needs at least one id column (table)",
            )
            need(not self.columns, "a sequence names its columns under 'sequence', not 'columns'")
            need(self.max_length is not None, "a sequence needs 'max_length'")
        else:
            need(bool(self.columns), "'columns' is missing")
            need(not self.sequence and self.time is None, "'sequence' and 'time' are for kind: sequence")
        if self.kind == "ids":
            need(self.table is not None, "kind ids needs 'table'")
            need(len(self.columns) == 1, "kind ids takes exactly one column")
            need(self.scale == "none" and self.fill is None, "'scale' and 'fill' are for kind: dense")
            need(
                self.pooling != "none" or self.max_length in (None, 1),
                "'max_length' needs pooling sum or mean (a list of ids)",
            )
        else:
            need(self.table is None, "'table' is for kind: ids (in a sequence it stands at the column)")
            need(self.fill_id is None and self.pooling == "none", "'fill_id' and 'pooling' are for kind: ids")
        if self.kind == "dense":
            need(self.max_length is None, "'max_length' is not for kind: dense")
        return self

    @property
    def source_columns(self) -> list[str]:
        """The columns of the data that this feature reads."""
        if self.kind == "sequence":
            return [c.column for c in self.sequence] + ([self.time] if self.time else [])
        return list(self.columns)

    @property
    def sequence_ids(self) -> list[SequenceColumn]:
        """A sequence's id columns."""
        return [column for column in self.sequence if column.table is not None]

    @property
    def sequence_dense(self) -> list[SequenceColumn]:
        """A sequence's dense columns."""
        return [column for column in self.sequence if column.table is None]


class Label(Strict):
    """One task. ``column``: 0/1 per impression; null means unknown (not trained on), NaN is an error.

    ``weight``: the task's weight in the loss. ``oracle``: a column with the true probability the label was
    drawn from, where the data is synthetic; evaluation then reports the Bayes optimum.
    """

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")  # it names metrics, click/ne
    column: str
    weight: float = Field(default=1.0, ge=0)
    oracle: str | None = None


class Keys(Strict):
    """``request``: the columns that together name a request (published ids repeat: take several).
    ``user``, ``time``: columns of the request's user and time. ``impression``: columns that together are
    unique within a request. ``position``: column that orders the impressions of a request.
    ``impression_time``: column with the time of the impression, where it has one of its own."""

    request: ColumnNames = Field(min_length=1)
    user: str
    time: str
    impression: ColumnNames = []
    position: str | None = None
    impression_time: str | None = None


class Carry(Strict):
    """Columns kept in the shards, lossless, that are neither features nor labels."""

    request: ColumnNames = []
    impression: ColumnNames = []


class Schema(Strict):
    """See the module's docstring; the file format is described in docs/schema.md."""

    name: str
    keys: Keys
    tables: dict[str, Table] = {}
    features: list[Feature] = Field(min_length=1)
    labels: list[Label] = Field(min_length=1)
    carry: Carry = Carry()

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Schema:
        for what, names in (
            ("feature", [f.name for f in self.features]),
            ("label", [x.name for x in self.labels]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} names must be unique; given twice: {', '.join(twice)}")
        for feature in self.features:
            named = [feature.table] if feature.table else [c.table for c in feature.sequence if c.table]
            for table in named:
                if table not in self.tables:
                    known = ", ".join(sorted(self.tables)) or "none"
                    raise ValueError(f"feature '{feature.name}' reads table '{table}', not in tables ({known})")
            if feature.fill_id is not None and feature.table is not None:
                rows = self.tables[feature.table].rows
                if feature.fill_id >= rows:
                    raise ValueError(
                        f"feature '{feature.name}': fill_id {feature.fill_id} is outside table "
                        f"'{feature.table}' of {rows} rows"
                    )
        answers = {x.column: f"label '{x.name}'" for x in self.labels}
        answers |= {x.oracle: f"the oracle of label '{x.name}'" for x in self.labels if x.oracle}
        for feature in self.features:
            leaked = [column for column in feature.source_columns if column in answers]
            if leaked:
                raise ValueError(
                    f"feature '{feature.name}' reads column '{leaked[0]}', which is {answers[leaked[0]]}: the model "
                    "would be told the answer; take it out of the feature"
                )
        both = sorted(set(self.request_columns) & set(self.impression_columns))
        if both:
            raise ValueError(f"columns are request-level and impression-level at once: {', '.join(both)}")
        return self

    # ---- columns ---------------------------------------------------------------------------------

    @cached_property
    def request_columns(self) -> list[str]:
        """All columns with one value per request (RO), each once, in a fixed order: keys first."""
        names = [*self.keys.request, self.keys.user, self.keys.time]
        names += [c for f in self.features if f.level == "request" for c in f.source_columns]
        names += self.carry.request
        return list(dict.fromkeys(names))

    @cached_property
    def impression_columns(self) -> list[str]:
        """All columns with one value per impression (NRO and labels), each once, in a fixed order."""
        names = [n for n in self.keys.impression if n not in self.keys.request]
        names += [name for name in (self.keys.position, self.keys.impression_time) if name]
        names += [c for f in self.features if f.level == "impression" for c in f.source_columns]
        names += [label.column for label in self.labels]
        names += [label.oracle for label in self.labels if label.oracle]
        names += self.carry.impression
        return list(dict.fromkeys(names))

    @property
    def columns(self) -> list[str]:
        """Request columns, then impression columns."""
        return self.request_columns + self.impression_columns

    # ---- features --------------------------------------------------------------------------------

    def select(self, level: Level, kind: Kind) -> list[Feature]:
        """The features of a level and kind, in the schema's order."""
        return [f for f in self.features if f.level == level and f.kind == kind]

    @property
    def sequences(self) -> list[Feature]:
        """The event sequences (user histories)."""
        return self.select("request", "sequence")

    def dense_width(self, level: Level) -> int:
        """Floats per row of all dense features of a level."""
        return sum(len(f.columns) for f in self.select(level, "dense"))

    @cached_property
    def digest(self) -> str:
        """A short stable digest of the whole schema."""
        content = self.model_dump(mode="json")
        for table in content["tables"].values():
            if not table["managed"]:
                del table["managed"]  # a key that came later: what was built and trained before stays the same
        canonical = json.dumps(content, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The schema as YAML that ``parse_schema`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def readable_errors(error: ValidationError) -> str:
    """Pydantic's errors, one line each: ``features.2.table: message``."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key; remove it or check its spelling"
        elif item["type"] == "missing":
            message = "this key is required"
        lines.append(f"{where}: {message}" if where else message)
    return "\n  ".join(lines)


def parse_schema(text: str, origin: str = "schema") -> Schema:
    """Parses YAML text. Raises ConfigError that names ``origin`` and each wrong key."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{origin}: expected a mapping with keys name, keys, features, labels")
    try:
        return Schema.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{origin}:\n  {readable_errors(error)}") from None


def load_schema(path: str | Path) -> Schema:
    """Reads a schema file, at a local path or URI. Raises ConfigError where it is missing or wrong."""
    path = str(path)
    return parse_schema(read_text(path, "schema"), without_secrets(path) if "://" in path else path)
