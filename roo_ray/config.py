"""The typed job config: one YAML file per run, with ``key=value`` overrides; unknown keys are refused.

Paths: a schema's path is relative to the config file; every other relative path is relative to the home of
roo_ray's data (``ROO_RAY_HOME``, default ``~/.roo_ray``), so that a submitted job, which runs in a temporary
copy of the working directory, finds the same data. URIs (``s3://...``, ``gs://...``) are taken as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from roo_ray.data_config import Build as Build
from roo_ray.data_config import Days
from roo_ray.data_config import Holdout as Holdout
from roo_ray.data_config import Ingest as Ingest
from roo_ray.errors import ConfigError
from roo_ray.schema import Schema, Strict, load_schema, readable_errors
from roo_ray.source_config import DataPath, Source
from roo_ray.storage import beside, read_text, without_secrets

ShardingKind = Literal["table_wise", "row_wise", "column_wise", "data_parallel", "grid"]
EmbeddingOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "lamb"]


class ManagedRows(Strict):
    """Which ids have a row of a table that the schema has as ``managed`` (docs/models.md, "Unbounded ids").

    ``every``: rows are given and taken back every so many steps (after 1, 3, 7, ... at a run's beginning).
    ``policy``: to those met in the most steps (``lfu``), in the last such interval (``lru``), or the former divided by
    the intervals since the latter (``distance_lfu``). Steps of an id without a row are counted within an interval
    alone. ``buffer``: an interval ends before its time where so many ids wait; 28 bytes each.
    """

    policy: Literal["lfu", "lru", "distance_lfu"] = "distance_lfu"
    every: int = Field(default=100, gt=0)
    buffer: int = Field(default=1 << 20, gt=0)


class Embeddings(Strict):
    """How embedding tables are stored, placed and updated. What the device or the stack cannot do is refused
    before training starts (docs/models.md, "What is refused where").

    ``weights``: their type; bf16 on GPU only. ``optimizer``: runs in backward; Adam and LAMB on GPU only.
    ``sharding``: table -> kind, where the default (row-wise from ``training.row_wise_from`` rows, otherwise
    table-wise) is not wanted. ``uvm``: tables that live in host memory with a cache on the device (GPU only).
    ``index_dedup``: look each id of a batch up once (GPU only; not in pooled tables).
    ``pooled``: tables whose bags are pooled where the table lies, so that one vector per bag is sent instead of one per
    id; bags alone may read them (docs/models.md, "Pooled tables", says when that pays).
    ``managed``: how rows are given to the ids of tables that the schema has as managed.
    """

    weights: Literal["fp32", "fp16", "bf16"] = "fp32"
    optimizer: EmbeddingOptimizer = "rowwise_adagrad"
    sharding: dict[str, ShardingKind] = Field(default_factory=dict)
    uvm: list[str] = Field(default_factory=list)
    index_dedup: bool = False
    pooled: list[str] = Field(default_factory=list)
    managed: ManagedRows = ManagedRows()


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
    seen by nothing else, and is ``position_value`` in evaluation and serving; retrieval has no such term, and keeps it
    out of the item tower alone.
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
    tower: list[PositiveInt] = Field(default=[128, 64])
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


class WorkerRange(Strict):
    """A run with between ``min`` and ``max`` workers: as many as the cluster has room for. It is looked for room
    every ``check_seconds``; a change of the number restarts the workers from the last checkpoint."""

    min: int = Field(gt=0)
    max: int = Field(gt=0)
    check_seconds: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Training(Strict):
    """``workers``: TorchTrainer workers, or a range ``{min, max}`` (elastic). ``gpu``: one GPU a worker and NCCL,
    otherwise CPU and gloo.
    ``epochs``, learning rates (row-wise Adagrad for embeddings, Adam for the rest). ``row_wise_from``: tables
    of at least so many rows are sharded row-wise, smaller ones table-wise. ``log_every``: steps.
    ``max_failures``: restarts of the worker group from the last checkpoint. ``checkpoint_every_steps``,
    ``checkpoint_every_minutes``: checkpoints within an epoch, beside the one at its end, written in the
    background; training goes on exactly there. ``keep_checkpoints``: how many stay; ``keep_by: best`` keeps those
    of the lowest held-out NE of the first task, and the last one beside them.
    ``on_nan``: a loss or logits that are not finite ``stop`` the run, naming the requests, or ``skip`` the batch on
    all ranks before the update, at most ``max_nan_batches`` times in a run.
    ``form``: ``request`` is ROO; ``impression`` trains the same batches exploded, the baseline.
    ``autocast``: ``bf16`` runs the towers in bfloat16 where that is safe. ``deterministic``: only algorithms that
    give the same bits each time, at equal workers and plan.
    ``max_seconds``: training ends after so much time in steps (start-up and evaluation not counted; of the whole run,
    however often its workers are started again), at a step that all ranks agree on, and is then evaluated."""

    workers: Annotated[int, Field(gt=0)] | WorkerRange = 2
    gpu: bool = False
    threads_per_worker: int = Field(default=1, gt=0)
    epochs: int = Field(default=1, gt=0)
    embedding_lr: float = Field(default=0.05, gt=0)
    dense_lr: float = Field(default=1e-3, gt=0)
    row_wise_from: int = Field(default=1000, gt=0)
    log_every: int = Field(default=10, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    keep_by: Literal["last", "best"] = "last"
    checkpoint_every_steps: int | None = Field(default=None, gt=0)
    checkpoint_every_minutes: float | None = Field(default=None, gt=0)
    max_failures: int = Field(default=1, ge=0)
    form: Literal["request", "impression"] = "request"
    autocast: Literal["none", "bf16"] = "none"
    on_nan: Literal["stop", "skip"] = "stop"
    max_nan_batches: int = Field(default=10, gt=0)
    deterministic: bool = False
    seed: int = 0
    max_seconds: float | None = Field(default=None, gt=0)

    @property
    def least_workers(self) -> int:
        """The number of workers without which nothing is trained."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """The number of workers that are never exceeded."""
        return self.workers if isinstance(self.workers, int) else self.workers.max


class Evaluation(Strict):
    """``exact_rows``: up to so many held-out impressions a rank, AUC is exact and GAUC by user is computed; above,
    AUC is the streaming one. ``scores``: where every held-out impression's logits are written as Parquet."""

    exact_rows: int = Field(default=20_000_000, ge=0)
    scores: DataPath | None = None


def _model_name(value: str) -> str:
    if re.search(r"""[/:'"]""", value) or not value.strip():
        raise ValueError(f"'{value}' is no name of a registered model: write it without / : ' and \"")
    return value


class Serving(Strict):
    """``log_model``: log the trained model as an MLflow model that scores one request in a plain process.
    ``register_as``: the name to register it under in MLflow's model registry."""

    log_model: bool = True
    register_as: Annotated[str, AfterValidator(_model_name)] | None = None


class Incremental(Strict):
    """Day by day (docs/training.md): each new day of the data set starts from the published model, evaluates it on
    the day, trains on the day in the order of time, and publishes. ``days``: these UTC days; empty: all that come
    after the published one. ``holdout_fraction``: of a day's requests, by a hash of their key, never trained on: on
    them the new model is compared with the published one. ``max_ne_rise``: a new model whose NE of the first task
    is more than this share above the published one's is not published."""

    days: Days = Field(default_factory=list)
    holdout_fraction: float = Field(default=0.1, gt=0, lt=1)
    max_ne_rise: float = Field(default=0.01, ge=0)


class Tracking(Strict):
    """MLflow. ``uri``: default ``MLFLOW_TRACKING_URI``, else SQLite in roo_ray's home. ``end_wait_seconds``: how long
    a job that ends waits for a server that is down or slow; what is left then stays in a file.
    ``series_wait_seconds``: how long a series (days, the runs of a comparison) that has begun waits for the server
    before its next run."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "roo_ray"
    end_wait_seconds: float = Field(default=30.0, ge=0)
    series_wait_seconds: float = Field(default=300.0, ge=0)


class RaySettings(Strict):
    """``address``: a running cluster (default: ``RAY_ADDRESS``, else a local Ray is started).
    ``local_cpus``: logical CPUs of a local Ray; by default the cores, and at least workers + 2, because Ray
    Data needs CPUs beside the trainers. ``cpus_per_worker``: CPUs that a trainer takes; ``data_cpus``: CPUs
    that must be left for Ray Data. ``worker_labels``, ``worker_resources``: labels that a trainer's node must have,
    custom resources that a trainer takes. ``data_labels``, ``data_resources``: the same of the tasks and actors of
    Ray Data in every job: generating, building, reading, scoring (docs/cluster.md). ``wait_for_nodes_s``: on an
    autoscaled cluster, how long a job waits for the nodes that it needs; 0 refuses a cluster that has not got them.
    ``fall_back_labels``: where no nodes have come within ``fall_back_after_s``, those with these labels beside the
    others are asked for: on-demand nodes where the cloud has no spot ones. ``wait_for_workers_s``: a training or an
    evaluation of which no worker has run for so long ends, whether none has begun or a lost node has none in its
    place; it must be longer than a new node takes until workers run on it."""

    address: str | None = None
    local_cpus: int | None = Field(default=None, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    data_cpus: float = Field(default=1, gt=0)
    object_store_bytes: int | None = Field(default=None, gt=0)
    worker_labels: dict[str, str] = Field(default_factory=dict)
    worker_resources: dict[str, float] = Field(default_factory=dict)
    data_labels: dict[str, str] = Field(default_factory=dict)
    data_resources: dict[str, float] = Field(default_factory=dict)
    wait_for_nodes_s: float = Field(default=0, ge=0)
    fall_back_after_s: float = Field(default=300, gt=0)
    fall_back_labels: dict[str, str] = Field(default_factory=dict)
    wait_for_workers_s: float = Field(default=3600, ge=120)


def _plain_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(
            f"'{value}' names a folder in storage and a run in MLflow: write it with letters, digits, '-', '_' and "
            "'.', beginning with a letter or a digit"
        )
    return value


RunName = Annotated[str, AfterValidator(_plain_name)]


class Config(Strict):
    """A job's config. ``requests``: the path of the request-shard data set (built, then trained on);
    ``requests_version``: of its versions, by default the newest. ``storage``: where runs and checkpoints go.
    ``run_name``: the same name resumes the same run; by default made of ``name``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: RunName
    request_schema: Schema = Field(alias="schema")
    source: Source | None = None
    requests: DataPath
    requests_version: int | None = Field(default=None, gt=0)
    storage: DataPath = Field(default="runs", validate_default=True)
    run_name: RunName | None = None
    build: Build = Build()
    holdout: Holdout = Holdout()
    ingest: Ingest = Ingest()
    model: Model = Model()
    training: Training = Training()
    incremental: Incremental | None = None
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    tracking: Tracking = Tracking()
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _ranks_own_lanes(self) -> Config:
        if self.training.most_workers > self.ingest.lanes:
            raise ValueError(
                f"training.workers {self.training.most_workers} is more than ingest.lanes {self.ingest.lanes}: "
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
    """Reads a config file, at a local path or URI, applies ``key=value`` overrides (dots go into sections) and
    validates it. A schema's path in it is relative to it.

    Raises ConfigError, one line per wrong key.
    """
    where = str(path)
    text = read_text(where, "config")
    path = without_secrets(where) if "://" in where else where
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping")
    for override in overrides:
        _set_by_dots(content, override)
    if isinstance(content.get("schema"), str):
        content["schema"] = load_schema(beside(where, os.path.expanduser(content["schema"])))
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n  {readable_errors(error)}") from None
