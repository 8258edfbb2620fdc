"""The typed job config: one YAML file per run, with ``key=value`` overrides; unknown keys are refused.

Paths: a schema's path is relative to the config file; every other relative path is relative to the home of
roo_ray's data (``ROO_RAY_HOME``, default ``~/.roo_ray``), so that a submitted job, which runs in a temporary
copy of the working directory, finds the same data. URIs (``s3://...``, ``gs://...``) are taken as they are.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from roo_ray.errors import ConfigError
from roo_ray.schema import Schema, Strict, load_schema, readable_errors


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


def _day(value: Any) -> str:
    """``YYYY-MM-DD``; YAML reads a day as a date."""
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"'{value}' is no day; write it as YYYY-MM-DD") from None


def _as_days(value: Any) -> Any:
    return [value] if isinstance(value, (str, datetime.date)) else value


Day = Annotated[str, BeforeValidator(_day)]
Days = Annotated[list[Day], BeforeValidator(_as_days)]


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


Source = Annotated[
    SyntheticSource
    | ImpressionSource
    | RequestRowsSource
    | EventLogsSource
    | EbnerdSource
    | MindSource
    | KuairandSource,
    Field(discriminator="kind"),
]


class Build(Strict):
    """How request shards are made and written.

    ``buckets``: user shards of each day, one grouping task each; default from the day's size, so that files come
    to about ``file_bytes`` (compressed). ``bucket_bytes``: rows in memory that are grouped at once; a build's
    memory is a few times that, for each CPU. ``row_group_requests``, ``row_group_impressions``,
    ``row_group_bytes`` (in memory): a row group, the unit of reading, ends at whichever comes first; a single
    larger request has one of its own. ``order`` of the rows of a file: ``user_time`` (compresses best) or
    ``time``. ``staging_compression`` of the files between the stages: ``auto`` is none on local disks, lz4 on object
    stores. ``keep_aside``: write the rows that join to no request under ``aside/`` (they are counted either
    way). ``days``: build only these UTC days (``YYYY-MM-DD``), from all their rows in the source; the other days are
    those of the version before; empty: build all days. ``ledger``: whether the sizes of the impression-level form
    sorted by request are measured on all rows (``full``), on a sample of the shards (``sample``) or not (``off``).

    What happens where a check fails (docs/data.md); all is counted in the manifest and its report:
    ``on_request_conflict``: a request-only column varies within a request: ``fail``, or keep the ``first`` /
    ``last`` value in impression order, or that of the impression with the latest ``keys.impression_time``
    (``max_time``). ``on_duplicate_impression``: ``fail``, or ``drop`` all but the first. ``on_leaking_history``:
    history events at or after the request's time: ``fail``, ``count`` (they stay in the shards and never reach
    a model) or ``drop`` them. ``max_empty_history_share``: more empty histories than this share fail.
    """

    buckets: int | None = Field(default=None, gt=0)
    bucket_bytes: int = Field(default=128_000_000, gt=0)
    file_bytes: int = Field(default=64_000_000, gt=0)
    row_group_requests: int = Field(default=1024, gt=0)
    row_group_impressions: int = Field(default=65_536, gt=0)
    row_group_bytes: int = Field(default=64_000_000, gt=0)
    order: Literal["user_time", "time"] = "user_time"
    compression_level: int = Field(default=3, ge=1, le=22)
    staging_compression: Literal["auto", "none", "lz4", "zstd"] = "auto"
    keep_aside: bool = True
    days: Days = Field(default_factory=list)
    on_request_conflict: Literal["fail", "first", "last", "max_time"] = "fail"
    on_duplicate_impression: Literal["fail", "drop"] = "fail"
    on_leaking_history: Literal["fail", "count", "drop"] = "fail"
    max_empty_history_share: float = Field(default=0.99, ge=0, le=1)
    ledger: Literal["full", "sample", "off"] = "sample"


class Holdout(Strict):
    """What is held out for evaluation: the last ``days`` days of the data; with ``by: request``, a ``fraction`` of
    the requests chosen by a hash of the request key; with ``by: all``, all of it, for evaluating a model on a data
    set that it was not trained on."""

    by: Literal["day", "request", "all"] = "day"
    days: int = Field(default=1, gt=0)
    fraction: float = Field(default=0.1, gt=0, lt=1)


class Ingest(Strict):
    """The order and size of batches (docs/ingest.md).

    ``lanes``: virtual workers, fixed for a run; ranks own lanes, so results do not depend on their number.
    ``mode``: ``shuffled``, or ``time`` for data that must be trained on in the order of time.
    ``batch_impressions``, ``batch_cost``: what one lane's batch of a step is filled up to, at least one of them;
    the cost of a request is a polynomial of its history tokens and impressions that the model publishes.
    ``oversize``: what becomes of a single request above that: a batch of its ``own``, or it is ``split`` into
    requests with the same user side (never in evaluation).
    ``interleave``: at most so many requests of a user in a batch, as far as a window allows; violations are
    counted. ``window_units``: row groups shuffled together.
    ``drop_last``: end an epoch as soon as one lane has no more data (what is left is dropped, and counted).
    ``on_bad_shard``: a missing or damaged file is an error (``fail``), or skipped and counted (``skip``).
    ``reader``: ``ray_data`` (tasks on data nodes) or ``thread`` (a background thread of the trainer); both
    deliver the identical stream. ``prefetch_batches``: batches that a lane has ready.
    """

    lanes: int = Field(default=4, gt=0)
    mode: Literal["shuffled", "time"] = "shuffled"
    batch_impressions: int | None = Field(default=512, gt=0)
    batch_cost: float | None = Field(default=None, gt=0)
    oversize: Literal["own", "split"] = "own"
    interleave: int | None = Field(default=None, gt=0)
    window_units: int = Field(default=4, gt=0)
    drop_last: bool = False
    on_bad_shard: Literal["fail", "skip"] = "fail"
    reader: Literal["ray_data", "thread"] = "ray_data"
    prefetch_batches: int = Field(default=4, gt=0)

    @model_validator(mode="after")
    def _some_budget(self) -> Ingest:
        if self.batch_impressions is None and self.batch_cost is None:
            raise ValueError("a batch needs a budget: give batch_impressions, batch_cost or both")
        return self


ShardingKind = Literal["table_wise", "row_wise", "column_wise", "data_parallel", "grid"]
EmbeddingOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "lamb"]


class Embeddings(Strict):
    """How embedding tables are stored, placed and updated. What the device or the stack cannot do is refused
    before training starts (docs/models.md, "What is refused where").

    ``weights``: their type; bf16 on GPU only. ``optimizer``: runs in backward; Adam and LAMB on GPU only.
    ``sharding``: table -> kind, where the default (row-wise from ``training.row_wise_from`` rows, otherwise
    table-wise) is not wanted. ``uvm``: tables that live in host memory with a cache on the device (GPU only).
    ``index_dedup``: look each id of a batch up once (GPU only).
    """

    weights: Literal["fp32", "fp16", "bf16"] = "fp32"
    optimizer: EmbeddingOptimizer = "rowwise_adagrad"
    sharding: dict[str, ShardingKind] = Field(default_factory=dict)
    uvm: list[str] = Field(default_factory=list)
    index_dedup: bool = False


ModelKind = Literal["dcn", "hstu", "hstu_targets", "cross_attention", "two_tower", "retrieval"]


class Model(Strict):
    """A request-only model (docs/models.md).

    ``kind``: late-stage ranking ``dcn`` (DCNv2 over a pooled history), ``hstu`` (HSTU over the history),
    ``hstu_targets`` (candidates in one HSTU sequence with the history), ``cross_attention`` (candidates attend
    to the encoded history); early-stage ranking ``two_tower``; ``retrieval``. ``towers``: a team's own
    ``package.module:Class`` instead, a RequestOnlyModel made from (schema, model config).

    ``dim``: width of the history encoder. ``layers`` / ``heads``: HSTU layers (0: none) and attention heads.
    ``attention_layers``: of cross_attention. ``history_pooling``: of dcn. ``user_dim``: width of the user vector
    that is fanned out, and of both towers of two_tower and retrieval. ``cross_layers`` / ``cross_rank``: DCNv2
    low-rank cross layers. ``tower``: hidden widths over the cross output. ``normalisation``: of towers; ``batch``
    is BatchNorm with the statistics of the global batch, impressions counted.
    ``task_heads``: one tower for all tasks, or MMoE with ``experts`` towers and a gate per task. ``score``: of
    two_tower. ``position_feature``: an impression-level dense column that is a debiasing term of its own: it is
    seen by nothing else, and is ``position_value`` in evaluation and serving.
    ``dropout``: share of activations dropped in training. ``stochastic_length``: HSTU's alpha in (1, 2]; longer
    histories are subsampled to max_length ** (alpha / 2) events in training.
    Retrieval: ``temperature`` of its softmax; ``positive``: the label that makes an impression a positive
    (default: the first); ``item``: the impression-level id feature that names the item (default: the first);
    ``log_q``: correct sampled logits by the items' frequency.
    """

    kind: ModelKind = "hstu"
    towers: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    dim: int = Field(default=64, gt=0)
    layers: int = Field(default=2, ge=0)
    heads: int = Field(default=2, gt=0)
    attention_layers: int = Field(default=2, gt=0)
    history_pooling: Literal["mean", "attention"] = "attention"
    user_dim: int = Field(default=64, gt=0)
    cross_layers: int = Field(default=2, ge=0)
    cross_rank: int = Field(default=32, gt=0)
    tower: list[int] = Field(default=[128, 64])
    normalisation: Literal["layer", "rms", "batch"] = "layer"
    task_heads: Literal["shared_bottom", "mmoe"] = "shared_bottom"
    experts: int = Field(default=4, gt=0)
    score: Literal["dot", "mlp"] = "dot"
    position_feature: str | None = None
    position_value: float = 1.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    stochastic_length: float | None = Field(default=None, gt=1, le=2)
    temperature: float = Field(default=0.05, gt=0)
    positive: str | None = None
    item: str | None = None
    log_q: bool = True
    embeddings: Embeddings = Embeddings()

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Model:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be a multiple of heads {self.heads}")
        return self


class Training(Strict):
    """``workers``: TorchTrainer workers. ``gpu``: one GPU a worker and NCCL, otherwise CPU and gloo.
    ``epochs``, learning rates (row-wise Adagrad for embeddings, Adam for the rest). ``row_wise_from``: tables
    of at least so many rows are sharded row-wise, smaller ones table-wise. ``log_every``: steps.
    ``max_failures``: restarts of the worker group from the last checkpoint. ``checkpoint_every_steps``:
    checkpoints within an epoch, beside the one at its end; training goes on exactly there.
    ``form``: ``request`` is ROO; ``impression`` trains the same batches exploded, the baseline.
    ``autocast``: ``bf16`` runs the towers in bfloat16 where that is safe. ``deterministic``: only algorithms that
    give the same bits each time, at equal workers and plan."""

    workers: int = Field(default=2, gt=0)
    gpu: bool = False
    threads_per_worker: int = Field(default=1, gt=0)
    epochs: int = Field(default=1, gt=0)
    embedding_lr: float = Field(default=0.05, gt=0)
    dense_lr: float = Field(default=1e-3, gt=0)
    row_wise_from: int = Field(default=1000, gt=0)
    log_every: int = Field(default=10, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    checkpoint_every_steps: int | None = Field(default=None, gt=0)
    max_failures: int = Field(default=1, ge=0)
    form: Literal["request", "impression"] = "request"
    autocast: Literal["none", "bf16"] = "none"
    deterministic: bool = False
    seed: int = 0


class Tracking(Strict):
    """MLflow. ``uri``: default ``MLFLOW_TRACKING_URI``, else SQLite in roo_ray's home."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "roo_ray"


class RaySettings(Strict):
    """``address``: a running cluster (default: ``RAY_ADDRESS``, else a local Ray is started).
    ``local_cpus``: logical CPUs of a local Ray; by default the cores, and at least workers + 2, because Ray
    Data needs CPUs beside the trainers. ``cpus_per_worker``: CPUs that a trainer takes; ``data_cpus``: CPUs
    that must be left for Ray Data."""

    address: str | None = None
    local_cpus: int | None = Field(default=None, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    data_cpus: float = Field(default=1, gt=0)
    object_store_bytes: int | None = Field(default=None, gt=0)


class Config(Strict):
    """A job's config. ``requests``: the path of the request-shard data set (built, then trained on);
    ``requests_version``: of its versions, by default the newest. ``storage``: where runs and checkpoints go.
    ``run_name``: the same name resumes the same run."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str
    request_schema: Schema = Field(alias="schema")
    source: Source | None = None
    requests: DataPath
    requests_version: int | None = Field(default=None, gt=0)
    storage: DataPath = Field(default="runs", validate_default=True)
    run_name: str | None = None
    build: Build = Build()
    holdout: Holdout = Holdout()
    ingest: Ingest = Ingest()
    model: Model = Model()
    training: Training = Training()
    tracking: Tracking = Tracking()
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _ranks_own_lanes(self) -> Config:
        if self.training.workers > self.ingest.lanes:
            raise ValueError(
                f"training.workers {self.training.workers} is more than ingest.lanes {self.ingest.lanes}: "
                "every worker owns at least one lane; raise ingest.lanes"
            )
        return self

    @model_validator(mode="after")
    def _latest_impression_is_known(self) -> Config:
        if self.build.on_request_conflict == "max_time" and self.request_schema.keys.impression_time is None:
            raise ValueError(
                "build.on_request_conflict: max_time needs the column of the impression's time in the schema's "
                "keys.impression_time"
            )
        return self


def _set_by_dots(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}': expected key=value, such as training.epochs=2")
    node = content
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{parent}' is not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': '{text}' is not a YAML value") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies ``key=value`` overrides (dots go into sections) and validates it.

    Raises ConfigError, one line per wrong key.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file not found: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping")
    for override in overrides:
        _set_by_dots(content, override)
    if isinstance(content.get("schema"), str):
        schema_path = Path(content["schema"]).expanduser()
        content["schema"] = load_schema(schema_path if schema_path.is_absolute() else path.parent / schema_path)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n  {readable_errors(error)}") from None
