"""Where rows come from: the ``source`` section of a job's config, and the paths and durations that configs share.

Relative paths are relative to the home of roo_ray's data; see ``roo_ray/config.py``.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from roo_ray.schema import Strict


def home() -> Path:
    """Where roo_ray keeps data, runs and the default MLflow store: ``ROO_RAY_HOME`` or ``~/.roo_ray``."""
    return Path(os.environ.get("ROO_RAY_HOME") or "~/.roo_ray").expanduser().absolute()


def resolve_path(path: str) -> str:
    """An absolute path or URI; relative paths are taken from ``home()``."""
    if "://" in path:
        return path
    return os.path.normpath(home() / Path(path).expanduser())


DataPath = Annotated[str, BeforeValidator(lambda value: resolve_path(value) if isinstance(value, str) else value)]
DataPaths = Annotated[list[DataPath], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_duration(value: Any) -> Any:
    """Seconds of ``10s``, ``30m``, ``1.5h``, ``7d`` or ``2w``; numbers are seconds already."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", value)
    if found is None:
        raise ValueError(f"'{value}' is no duration; write a number and a unit, such as 10s, 30m, 1.5h, 7d or 2w")
    return float(found[1]) * SECONDS[found[2]]


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, le=100 * 365 * 86_400)]
KuairandSignal = Literal[
    "is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_profile_enter", "long_view"
]


class SyntheticSource(Strict):
    """A generated impression log with a planted click model. ``path``: where the log is written.

    ``history_length``: the longest history; lengths are skewed below it. ``mean_impressions``: mean number of
    impressions of a request (a skewed distribution, at least 1, at most ``max_impressions``). ``days``: the
    requests are spread over so many days. ``requests_per_task``: the size of one Ray Data generator task.
    ``reuse``: a complete log with the same settings at ``path`` is not generated again.
    """

    kind: Literal["synthetic"]
    path: DataPath
    requests: int = Field(default=20_000, gt=0)
    mean_impressions: float = Field(default=10.0, ge=1)
    max_impressions: int = Field(default=100, gt=0)
    users: int = Field(default=4_000, gt=0)
    items: int = Field(default=5_000, gt=1)
    topics: int = Field(default=20, gt=1)
    history_length: int = Field(default=64, ge=0)
    days: int = Field(default=8, gt=0)
    requests_per_task: int = Field(default=5_000, gt=0)
    seed: int = 0
    reuse: bool = True


class ImpressionSource(Strict):
    """A Parquet table with one row per impression: a file, a folder (read recursively), or a list of them."""

    kind: Literal["impressions"]
    path: DataPaths


class EbnerdSource(Strict):
    """EB-NeRD in its publisher's files: a folder with ``behaviors.parquet`` and ``history.parquet``."""

    kind: Literal["ebnerd"]
    path: DataPath


class PositivesList(Strict):
    """Labels that are logged as a list of the positives: 1 for each of the ``impressions`` (a list column of the
    file) that is among the ``positives`` (another one), else 0."""

    impressions: str
    positives: str


class RequestRowsSource(Strict):
    """Parquet rows that are requests already, impression-level columns as lists. ``columns``: the file's name of
    a column, where it differs from the schema's (schema's name: file's name). ``labels_from``: label columns made
    from lists of positives."""

    kind: Literal["requests"]
    path: DataPaths
    columns: dict[str, str] = Field(default_factory=dict)
    labels_from: dict[str, PositivesList] = Field(default_factory=dict)


class LogFiles(Strict):
    """One log in Parquet. ``columns``: the file's name of a column, where it differs from the schema's (schema's
    name: file's name)."""

    path: DataPaths
    columns: dict[str, str] = Field(default_factory=dict)


class ImpressionFiles(LogFiles):
    """The impression log. ``time``: its column with the time of the impression; without it, an impression has
    the time of its request."""

    time: str | None = None


class EventFiles(LogFiles):
    """An event log: rows with the request's and the impression's key, the event's ``time``, and for some a
    ``value`` (seconds of dwell, a price)."""

    time: str
    value: str | None = None


class Attribution(Strict):
    """How a label is made from events: 1 where an event of log ``event`` lies within ``window`` after the
    impression (both ends included), with a value of at least ``min_value`` where given. ``value_column``: a column
    to make beside it with the largest value of the events within the window (null where there is none)."""

    event: str
    window: Duration
    min_value: float | None = None
    value_column: str | None = None


class EventLogsSource(Strict):
    """Separate logs, as a serving system writes them (docs/data.md, "Joins and windows"): ``requests`` (features
    as they were when the request was served), ``impressions``, and ``events`` by name. ``labels``: label column ->
    its rule. ``observed_until``: up to when the event logs are complete; default: the latest time in the event log
    of each label. ``open_windows``: what an impression without event is whose window is not over by then: ``null``
    (not trained on) or ``negative``. Rows that find no partner are counted, and kept beside the data set
    (``build.keep_aside``)."""

    kind: Literal["event_logs"]
    requests: LogFiles
    impressions: ImpressionFiles
    events: dict[str, EventFiles] = Field(min_length=1)
    labels: dict[str, Attribution] = Field(min_length=1)
    observed_until: datetime.datetime | None = None
    open_windows: Annotated[
        Literal["null", "negative"], BeforeValidator(lambda value: "null" if value is None else value)
    ] = "null"

    @property
    def path(self) -> list[str]:
        """All paths that are read."""
        return [path for log in (self.requests, self.impressions, *self.events.values()) for path in log.path]

    @model_validator(mode="after")
    def _labels_name_events(self) -> EventLogsSource:
        for name in self.events:
            if name in ("requests", "impressions") or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"event log '{name}': a name is made of letters, digits and _, and not 'requests' or 'impressions'"
                )
        for name, rule in self.labels.items():
            if rule.event not in self.events:
                known = ", ".join(self.events)
                raise ValueError(f"label '{name}' names event log '{rule.event}', which is not in events ({known})")
            if self.events[rule.event].value is None and (rule.min_value is not None or rule.value_column):
                raise ValueError(
                    f"label '{name}' reads values, and event log '{rule.event}' names no value column; set its 'value'"
                )
        unused = sorted(set(self.events) - {rule.event for rule in self.labels.values()})
        if unused:
            raise ValueError(f"event log '{unused[0]}' is read by no label; remove it, or add a label")
        return self


class MindSource(Strict):
    """MIND (Microsoft News) in its publisher's files: one folder or several (one per split), each with
    ``behaviors.tsv`` and ``news.tsv``."""

    kind: Literal["mind"]
    path: DataPaths


class KuairandSource(Strict):
    """KuaiRand in its publisher's files: the folder with ``log_*.csv``, ``user_features_*.csv`` and
    ``video_features_basic_*.csv``. ``logs``: patterns of the log files to read.

    A request is a run of a user's impressions in one tab: a new one begins where more than ``gap_seconds`` passed
    since the impression before, where the tab changes, and, with ``max_impressions``, where it would become longer
    (impressions of one millisecond stay together). With ``gap_seconds: 0`` a request is what has one time.
    ``history_of``: a user's earlier impressions in which one of these signals is set are the history, the last
    ``history_length`` of them.
    """

    kind: Literal["kuairand"]
    path: DataPath
    logs: list[str] = Field(default=["log_*.csv"], min_length=1)
    gap_seconds: float = Field(default=60.0, ge=0)
    max_impressions: int | None = Field(default=None, gt=0)
    history_of: list[KuairandSignal] = Field(default=["is_click"], min_length=1)
    history_length: int = Field(default=100, ge=0)


class MovielensSource(Strict):
    """MovieLens in its publisher's files: the folder with ``ratings.csv`` (20M and later) or ``ratings.dat`` (1M, 10M).

    A request is a run of a user's ratings: a new one begins where more than ``gap_seconds`` passed since the rating
    before, and, with ``max_impressions``, where it would become longer (ratings of one second stay together). With
    ``gap_seconds: 0`` a request is what has one time. A user's last ``history_length`` ratings before it are its
    history. ``liked`` is 1 for ratings of at least ``like_from``; ``rated`` is always 1.
    """

    kind: Literal["movielens"]
    path: DataPath
    gap_seconds: float = Field(default=0.0, ge=0)
    max_impressions: int | None = Field(default=None, gt=0)
    history_length: int = Field(default=200, ge=0)
    like_from: float = 4.0


Source = Annotated[
    SyntheticSource
    | ImpressionSource
    | RequestRowsSource
    | EventLogsSource
    | EbnerdSource
    | MindSource
    | KuairandSource
    | MovielensSource,
    Field(discriminator="kind"),
]
