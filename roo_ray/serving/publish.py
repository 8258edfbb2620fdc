"""Logs a checkpoint as an MLflow model with a signature, into the run that trained it, once; registers it by name."""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import pyarrow as pa
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType
from mlflow.types import Schema as MlflowSchema
from mlflow.types.schema import AnyType, Array

from roo_ray.config import Config, Model
from roo_ray.errors import DataError
from roo_ray.redact import redact_text
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema
from roo_ray.serving import mlflow_model
from roo_ray.serving.export import export_model, input_types
from roo_ray.serving.scorer import MODEL, columns_with_null_elements, optional_columns, plain_type
from roo_ray.training.tracking import RunHandle

MODEL_NAME = "model"
MODEL_TAG, MODEL_OF_TAG = "roo_ray.model", "roo_ray.model_of"  # a run's model, and the checkpoint that it is of


def _column_type(kind: pa.DataType, column: str) -> DataType | Array:
    """MLflow's type of a plain column. Raises DataError for a type it does not know."""
    kind = plain_type(kind)
    if pa.types.is_large_list(kind):
        return Array(_column_type(kind.value_type, column))
    if pa.types.is_boolean(kind):
        return DataType.boolean
    if pa.types.is_integer(kind):
        return DataType.long
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return DataType.double
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return DataType.string
    raise DataError(f"column '{column}' is {kind}, which no MLflow signature can name")


def _with_nulls(kind: DataType | Array, elements: bool) -> DataType | Array | AnyType:
    """The type under which MLflow lets nulls pass unharmed. It refuses a null integer, takes no integer for a double,
    and cuts the strings of a list with a null: such values have any type, and the scorer checks them."""
    if isinstance(kind, Array):
        harmless = not elements or isinstance(kind.dtype, Array) or kind.dtype == DataType.double
        return kind if harmless else Array(AnyType())
    return AnyType() if kind == DataType.long else kind


def signature_of(inputs: pa.Schema, schema: Schema, settings: Model) -> ModelSignature:
    """One row per request: request-level columns as scalars or lists, candidates' columns as lists; out: per task a
    list with a score for each candidate. What has a meaning when it is null, and what changes no score, is optional:
    null, or left out."""
    optional, elements = optional_columns(schema, settings), columns_with_null_elements(schema, settings)
    columns = []
    for field in inputs:
        kind: DataType | Array | AnyType = _column_type(field.type, field.name)
        if field.name in optional:
            kind = _with_nulls(kind, field.name in elements)
        columns.append(ColSpec(kind, field.name, required=field.name not in optional))
    tasks = [label.name for label in schema.labels]
    scores = [ColSpec(Array(DataType.double), task) for task in tasks]
    return ModelSignature(MlflowSchema(columns), MlflowSchema(scores))


def requirements() -> list[str]:
    """What the model needs where it is served: neither Ray nor anything of the training."""
    names = ("mlflow", "torch", "torchrec", "fbgemm-gpu", "pyarrow", "numpy", "pandas", "pydantic", "pyyaml")
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in names]


def own_code(settings: Model) -> list[str]:
    """The files that ``model.towers`` needs beside roo_ray: its top-level package or module, to go with the model.
    Raises DataError where it is spread over several places."""
    top = (settings.towers or "roo_ray").partition(":")[0].partition(".")[0]
    if top == "roo_ray":
        return []
    module = importlib.import_module(top)
    places = [str(Path(place)) for place in getattr(module, "__path__", [])] or [str(module.__file__)]
    if len(places) > 1 or not Path(places[0]).exists():
        raise DataError(
            f"the code of model.towers '{settings.towers}' cannot go with the model: package '{top}' lies in "
            f"{', '.join(places)}; make it one folder, or set serving.log_model=false"
        )
    return places


def save_mlflow_model(checkpoint: str, inputs: pa.Schema, schema: Schema, folder: str | Path, **log: Any) -> Any:
    """Exports a checkpoint and saves it as an MLflow model below ``folder``, or, with the arguments of MLflow's
    ``log_model``, logs it; the code of roo_ray goes with it, and that of a team's own towers."""
    with tempfile.TemporaryDirectory() as scratch:
        exported = export_model(checkpoint, inputs, Path(scratch) / "model")
        settings = Model.model_validate(json.loads((exported / MODEL).read_text())["model"])
        arguments = {
            "python_model": str(Path(mlflow_model.__file__)),
            "artifacts": {"model": str(exported)},
            "code_paths": [str(Path(__file__).parents[1]), *own_code(settings)],
            "signature": signature_of(inputs, schema, settings),
            "pip_requirements": requirements(),
        }
        if log:
            return mlflow.pyfunc.log_model(**arguments, **log)
        return mlflow.pyfunc.save_model(path=str(folder), **arguments)


def publish_model(config: Config, manifest: Manifest, checkpoint: str, run: RunHandle) -> str | None:
    """Logs the model of a training run into it, once for each checkpoint; the model's URI, None where tracking or
    ``serving.log_model`` is off."""
    if run.uri is None or not config.serving.log_model:
        return None
    client = MlflowClient(run.uri)
    known = logged_model(client, run, checkpoint)
    if known is not None:
        return known
    inputs = input_types(config.requests, manifest, config.request_schema)
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # it hints at type hints
    with _store(run.uri), mlflow.start_run(run_id=run.run_id, log_system_metrics=False):
        info = save_mlflow_model(checkpoint, inputs, config.request_schema, "", name=MODEL_NAME)
    for tag, value in ((MODEL_TAG, str(info.model_uri)), (MODEL_OF_TAG, redact_text(checkpoint))):
        client.set_tag(run.run_id, tag, value)
    return str(info.model_uri)


def logged_model(client: MlflowClient, run: RunHandle, checkpoint: str) -> str | None:
    """The URI of the model that was logged into the run from that checkpoint; None where there is none."""
    tags = client.get_run(run.run_id).data.tags
    known: str | None = tags.get(MODEL_TAG) if tags.get(MODEL_OF_TAG) == redact_text(checkpoint) else None
    return known


def register_model(config: Config, checkpoint: str, run: RunHandle) -> str | None:
    """Registers the model that was logged from a checkpoint under ``serving.register_as``, unless a version of it is
    registered already: the version; None where nothing is to be registered. Raises DataError where no model of the
    checkpoint was logged."""
    name = config.serving.register_as
    if run.uri is None or not config.serving.log_model or name is None:
        return None
    client, checkpoint = MlflowClient(run.uri), redact_text(checkpoint)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run.run_id and version.tags.get(MODEL_OF_TAG) == checkpoint:
            return str(version.version)
    uri = logged_model(client, run, checkpoint)
    if uri is None:
        raise DataError(f"run {run.run_id} has no model of {checkpoint} that could be registered")
    with _store(run.uri):
        return str(mlflow.register_model(uri, name, tags={MODEL_OF_TAG: checkpoint}).version)


@contextmanager
def _store(uri: str) -> Iterator[None]:
    """MLflow's own functions write to the store at ``uri`` within the block."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
