"""A run's folder in the storage: the files beside its checkpoints, and whether it can go on with a config."""

from __future__ import annotations

import json
import os
from typing import Any

import pyarrow.fs as pafs

from roo_ray.config import Config, Model
from roo_ray.errors import ConfigError, DataError
from roo_ray.ingest.plan import differences
from roo_ray.redact import redact_text
from roo_ray.requests.manifest import load_manifest, manifest_versions
from roo_ray.schema import Schema
from roo_ray.storage import join_path, open_filesystem, write_whole
from roo_ray.training.checkpoint import STATE_FILE, RunState

RESULT_FILE = "roo_ray_result.json"
PLAN_FILE = "roo_ray_plan.json"
WEIGHTLESS = {"dropout", "stochastic_length", "temperature", "log_q"}  # of a model, what changes no weight's meaning
REREAD = {"fill", "fill_id", "max_length"}  # of a feature


def refuse_another_run(config: Config, run_name: str, plan: dict[str, Any]) -> None:
    """Raises ConfigError where a run of this name has a checkpoint, and its model is another one or its data came in
    another order: it cannot go on; DataError where it read a version that was purged."""
    filesystem, base = open_filesystem(config.storage)
    listing = filesystem.get_file_info(pafs.FileSelector(f"{base}/{run_name}", allow_not_found=True, recursive=True))
    states = sorted(item.path for item in listing if os.path.basename(item.path) == STATE_FILE)
    before = read_json(config, run_name, PLAN_FILE)
    if not states or before is None:
        return
    with filesystem.open_input_stream(states[-1]) as stream:
        model = RunState.model_validate_json(stream.read()).model
    if model != config.model:
        was, now = model.model_dump(mode="json"), config.model.model_dump(mode="json")
        changed = [f"model.{name} was {was[name]} and is {now[name]}" for name in was if was[name] != now[name]]
        raise ConfigError(
            f"run '{run_name}' exists with another model: {'; '.join(changed)}; restore this, or choose another "
            "run_name"
        )
    changed = differences(before, plan)
    if changed:
        if plan["data_version"] != (pinned := before.get("data_version")) in manifest_versions(config.requests):
            load_manifest(config.requests, pinned)  # says so where that version was purged
        raise ConfigError(
            f"run '{run_name}' exists and cannot go on, because its data would come in another order: "
            f"{'; '.join(changed)}; restore this (requests_version names a version of the data), or choose another "
            "run_name"
        )


def refuse_other_weights(config: Config, checkpoint: str) -> None:
    """Raises ConfigError where the weights in a checkpoint are those of another model or other features than the
    config's: they could be loaded in part, and would mean something else. What changes no weight may differ."""
    filesystem, base = open_filesystem(checkpoint)
    path = f"{base}/{STATE_FILE}"
    if not filesystem.get_file_info(path).is_file:
        raise ConfigError(f"{redact_text(checkpoint)} is no complete checkpoint: it has no {STATE_FILE}")
    with filesystem.open_input_stream(path) as stream:
        state = RunState.model_validate_json(bytes(stream.read()))
    was, now = shape_of(state.model, state.request_schema()), shape_of(config.model, config.request_schema)
    changed = [
        f"{name} {'is new' if name not in was else f'was {was[name]}'}"
        f" and {'is gone' if name not in now else f'is {now[name]}'}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"training cannot start from {redact_text(checkpoint)}, whose weights are of another model: "
            f"{'; '.join(changed)}; restore this, or start without it"
        )


def shape_of(model: Model, schema: Schema) -> dict[str, Any]:
    """All that decides which weights a model has, and what they mean."""
    settings = model.model_dump(mode="json", exclude={"embeddings": {"pooled"}})  # a table is the same, pooled or not
    shape = {f"model.{name}": value for name, value in settings.items() if name not in WEIGHTLESS}
    shape |= {f"table '{name}'": table.model_dump(mode="json") for name, table in schema.tables.items()}
    for f in schema.features:
        shape[f"feature '{f.name}'"] = f.model_dump(mode="json", exclude=REREAD, exclude_defaults=True)
    return shape | {"order of features": [f.name for f in schema.features], "tasks": [x.name for x in schema.labels]}


def folder_size(path: str) -> int:
    """Bytes of the files in a folder, local or on an object store."""
    filesystem, inner = open_filesystem(path)
    return sum(item.size or 0 for item in filesystem.get_file_info(pafs.FileSelector(inner, recursive=True)))


def save_json(config: Config, run_name: str, name: str, content: dict[str, Any]) -> None:
    """Writes a file beside a run's checkpoints, in one piece."""
    write_whole(join_path(config.storage, run_name, name), json.dumps(content, indent=1).encode())


def read_json(config: Config, run_name: str, name: str) -> dict[str, Any] | None:
    """What ``save_json`` has written; None where there is no such file. Raises DataError where it is damaged."""
    path = join_path(config.storage, run_name, name)
    filesystem, inner = open_filesystem(path)
    if not filesystem.get_file_info(inner).is_file:
        return None
    with filesystem.open_input_stream(inner) as stream:
        content = bytes(stream.read())
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(
            f"{redact_text(path)} is damaged: {error}; move the folder of run '{run_name}' away, or choose another "
            "run_name"
        ) from None
    return dict(found)


def has_begun(config: Config, run_name: str) -> bool:
    """Whether the storage has something of a run of this name."""
    filesystem, base = open_filesystem(config.storage)
    return bool(filesystem.get_file_info(f"{base}/{run_name}/{PLAN_FILE}").is_file)


def with_credentials(stored: str, storage: str) -> str:
    """A path that was written to a file by ``redact_text``, with the credentials that are in ``storage``, if any."""
    shown = redact_text(storage).partition("?")[0].rstrip("/")
    base = stored.partition("?")[0]
    if "://" not in storage or not base.startswith(f"{shown}/"):
        return stored
    return join_path(storage, base.removeprefix(f"{shown}/"))


def find_checkpoint(config: Config, named: str) -> str:
    """A checkpoint's path: ``named`` is a run's name (its last checkpoint) or the path or URI of a checkpoint.

    Raises ConfigError where there is neither.
    """
    filesystem, base = open_filesystem(config.storage)
    if "://" not in named and filesystem.get_file_info(f"{base}/{named}/{RESULT_FILE}").is_file:
        result = read_json(config, named, RESULT_FILE) or {}
        return with_credentials(result["checkpoint"], config.storage)
    filesystem, path = open_filesystem(named)
    if not filesystem.get_file_info(f"{path}/{STATE_FILE}").is_file:
        raise ConfigError(
            f"'{named}' is neither a finished run in {config.storage} nor a checkpoint folder (with {STATE_FILE})"
        )
    return named if "://" in named else path
