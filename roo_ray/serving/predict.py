"""Scores request shards with Ray Data and writes Parquet: the user side runs once per request.

A prediction is a folder of Parquet files, a row per impression (request key, impression key, ``score_<task>``), and
``_predictions.json``, written last. Locally the folder appears whole by one rename; on an object store there is no
prediction without that file.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data

from roo_ray import session
from roo_ray.config import Config
from roo_ray.errors import BadInput, ConfigError, DataError
from roo_ray.ingest.lists import ranges, split_lists
from roo_ray.ingest.read import NUM_IMPRESSIONS
from roo_ray.ingest.rows import read_requests
from roo_ray.ingest.units import UnitRef, units_of
from roo_ray.redact import redact
from roo_ray.requests.manifest import Manifest, load_manifest
from roo_ray.schema import Schema
from roo_ray.serving.export import export_model, input_types
from roo_ray.serving.scorer import INPUTS, MODEL, SCHEMA, WEIGHTS, Scorer, input_columns
from roo_ray.storage import join_path, open_filesystem, without_secrets
from roo_ray.training.folder import find_checkpoint
from roo_ray.training.tracking import RunHandle, RunLogger, open_run, tracking_uri

NOTE = "_predictions.json"  # readers of Parquet folders pass over names that begin so
UNITS_AT_ONCE = 8


@dataclass(frozen=True)
class Predicted:
    """``output``: the folder. Counts of what was scored. ``run``: in MLflow."""

    output: str
    requests: int
    impressions: int
    files: int
    run: RunHandle


def exported_model(config: Config, named: str, manifest: Manifest, scratch: Path) -> Path:
    """The exported model's folder of what is named: a run or checkpoint (exported into ``scratch``), an exported
    model's folder, or an MLflow model (``models:/NAME/VERSION``, ``runs:/RUN/model`` or its folder).

    Raises ConfigError where there is no such model.
    """
    if named.startswith(("models:/", "runs:/")):
        try:
            uri = tracking_uri(config.tracking, 1)
            named = mlflow.artifacts.download_artifacts(named, dst_path=str(scratch), tracking_uri=uri)
        except mlflow.exceptions.MlflowException as error:
            raise ConfigError(f"MLflow has no model '{named}': {error}") from None
    for folder in (Path(named), Path(named) / "artifacts" / "model"):
        if (folder / WEIGHTS).is_file():
            return folder
    checkpoint = find_checkpoint(config, named)
    return export_model(checkpoint, input_types(config.requests, manifest, config.request_schema), scratch / "model")


def scored_table(scorer: Scorer, requests: pa.Table, schema: Schema, where: str) -> pa.Table:
    """A row per impression of stored requests: request key columns, impression key columns (``impression_index``
    where the schema has none), ``score_<task>`` float32."""
    scored = scorer.score(requests, where)
    counts = scored.num_impressions
    rows = pa.array(np.repeat(np.arange(len(counts)), counts))
    columns = {name: requests.column(name).take(rows) for name in schema.keys.request}
    keys = [name for name in schema.keys.impression if name not in columns]
    for name in keys:
        lists = split_lists(requests.column(name).combine_chunks())
        columns[name] = lists.values.take(pa.array(ranges(lists.starts, lists.lengths)))
    if not keys:
        columns["impression_index"] = pa.array(ranges(np.zeros_like(counts), counts))
    outputs = scorer.as_outputs(scored.logits)
    for k, task in enumerate(scorer.tasks):
        columns[f"score_{task}"] = pa.array(outputs[:, k])
    return pa.table(columns)


class ScoreFiles:
    """A Ray Data actor: scores shard files, one Parquet file each. The model comes as its files' bytes."""

    def __init__(self, model: dict[str, bytes], data_set: str, schema: Schema, folder: str) -> None:
        with tempfile.TemporaryDirectory() as local:
            for name, content in model.items():
                (Path(local) / name).write_bytes(content)
            self.scorer = Scorer.load(local)
        self.data_set, self.schema, self.folder = data_set, schema, folder
        keys = [*schema.keys.request, *schema.keys.impression, schema.keys.user, schema.keys.time]
        read = [name for name in input_columns(schema) if name not in self.scorer.unread]
        self.columns = list(dict.fromkeys([NUM_IMPRESSIONS, *keys, *read]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Items ``file`` (number) and ``units`` (JSON) -> per file its counts, or the error that a user can mend."""
        written: dict[str, list[Any]] = {"requests": [], "impressions": [], "error": []}
        for number, units in zip(batch["file"], batch["units"], strict=True):
            error, requests, impressions = "", 0, 0
            try:
                requests, impressions = self._score(int(number), [_unit(item) for item in json.loads(units)])
            except BadInput as bad:
                error = str(bad)
            for name, value in (("requests", requests), ("impressions", impressions), ("error", error)):
                written[name].append(value)
        return written

    def _score(self, number: int, units: list[UnitRef]) -> tuple[int, int]:
        filesystem, base = open_filesystem(self.folder)
        requests = impressions = 0
        writer = None
        with filesystem.open_output_stream(f"{base}/part-{number:05d}.parquet") as stream:
            for start in range(0, len(units), UNITS_AT_ONCE):
                some = units[start : start + UNITS_AT_ONCE]
                read = read_requests(self.data_set, some, self.schema, columns=self.columns)
                table = scored_table(self.scorer, read.table, self.schema, join_path(self.data_set, some[0].path))
                writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                writer.write_table(table)
                requests, impressions = requests + read.table.num_rows, impressions + table.num_rows
            if writer is not None:
                writer.close()
        return requests, impressions


def _unit(item: dict[str, Any]) -> UnitRef:
    return UnitRef(**item | {"rows": None if item["rows"] is None else tuple(item["rows"])})


def shown(place: str) -> str:
    """A place as it is kept and shown: without the keys that may stand in a URI."""
    return without_secrets(place) if "://" in place else place


def predict(config: Config, model: str, output: str, say: Callable[[str], None], actors: int = 1) -> Predicted:
    """Scores every impression of the request data set with a model (see ``exported_model``) into ``output``, as an
    MLflow run of its own: parameters, model, data version, counts and throughput.

    Raises ConfigError where the output exists; DataError where the data does not fit the model, or where the rows
    written are not those that the manifest counts; nothing that looks complete is left then.
    """
    manifest = load_manifest(config.requests, config.requests_version)
    filesystem, base = open_filesystem(output)
    if filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True)):
        raise ConfigError(f"{shown(output)} exists and is not empty; choose another output, or remove it")
    run = open_run(config.tracking, "predict", config.run_name or config.name, 1)  # this process alone writes
    logger = RunLogger(run, say, config.tracking.end_wait_seconds)
    succeeded = False
    try:
        logger.params(config.model_dump(mode="json", exclude={"request_schema"}) | {"actors": actors})
        data = {"data_set": config.requests, "data_version": manifest.version, "data_digest": manifest.digest()}
        logger.tags(data | {"model": shown(model), "output": shown(output)})
        logger.text(config.request_schema.to_yaml(), "schema.yaml")
        begin = time.perf_counter()
        counts = _predict(config, model, manifest, output, say, actors)
        seconds = time.perf_counter() - begin
        rates = {f"{name}_per_second": counts[name] / seconds for name in ("requests", "impressions")}
        logger.metrics({f"predict/{name}": value for name, value in ({"seconds": seconds} | counts | rates).items()})
        succeeded = True
    finally:
        logger.end(succeeded)
    return Predicted(output, **counts, run=run)


def _predict(
    config: Config, model: str, manifest: Manifest, output: str, say: Callable[[str], None], actors: int
) -> dict[str, int]:
    filesystem, base = open_filesystem(output)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    staging = f"{base}.partial-{uuid.uuid4().hex[:8]}" if local else output
    with tempfile.TemporaryDirectory() as scratch:
        folder = exported_model(config, model, manifest, Path(scratch))
        scorer = Scorer.load(folder)
        content = {name: (folder / name).read_bytes() for name in (WEIGHTS, MODEL, SCHEMA, INPUTS)}
    units = units_of(manifest.files)
    of_file: dict[int, list[UnitRef]] = {}
    for unit in range(len(units)):
        of_file.setdefault(int(units.file[unit]), []).append(units.ref(unit))
    items = [{"file": n, "units": json.dumps([asdict(unit) for unit in some])} for n, some in of_file.items()]
    say(f"scoring {manifest.requests:,} requests, {manifest.impressions:,} impressions in {len(items)} files")
    (filesystem if not local else pafs.LocalFileSystem()).create_dir(staging if local else base, recursive=True)
    done = False
    try:
        data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ScoreFiles,
            fn_constructor_args=(content, config.requests, scorer.schema, staging),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(items)))),
            num_cpus=1,
            resources=session.placing().resources,
        )
        rows = data.take_all()
        errors = [row["error"] for row in rows if row["error"]]
        if errors:
            raise DataError(errors[0])
        requests, impressions = (int(sum(row[name] for row in rows)) for name in ("requests", "impressions"))
        if (requests, impressions) != (manifest.requests, manifest.impressions):
            raise DataError(
                f"{requests:,} requests with {impressions:,} impressions were scored, and the manifest of "
                f"{shown(config.requests)} counts {manifest.requests:,} with {manifest.impressions:,}; nothing was "
                "written"
            )
        note = {"requests": requests, "impressions": impressions, "files": len(items), "model": shown(model)}
        note |= {"data_set": shown(config.requests), "data_version": manifest.version, "data_digest": manifest.digest()}
        with filesystem.open_output_stream(f"{staging if local else base}/{NOTE}") as stream:
            stream.write(json.dumps(redact(note), indent=1).encode())
        if local:
            Path(base).parent.mkdir(parents=True, exist_ok=True)
            Path(staging).rename(base)
        done = True
    finally:
        if not done and local:
            filesystem.delete_dir(staging)
        elif not done:
            filesystem.delete_dir_contents(base)
    return {"requests": requests, "impressions": impressions, "files": len(items)}
