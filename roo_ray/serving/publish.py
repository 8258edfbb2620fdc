"""Logs a checkpoint as an MLflow model with a signature, into the run that trained it; registers it by name."""

from __future__ import annotations

import logging
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import pyarrow as pa
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType
from mlflow.types import Schema as MlflowSchema
from mlflow.types.schema import AnyType, Array

from roo_ray.config import Config
from roo_ray.errors import DataError
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema
from roo_ray.serving import mlflow_model
from roo_ray.serving.export import export_model, input_types
from roo_ray.serving.scorer import columns_with_null_elements, optional_columns, plain_type
from roo_ray.training.tracking import RunHandle

MODEL_NAME = "model"


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


def signature_of(inputs: pa.Schema, schema: Schema) -> ModelSignature:
    """One row per request: request-level columns as scalars or lists, candidates' columns as lists; out: per task a
    list with a score for each candidate. What has a meaning when it is null is optional: null, or left out."""
    optional, elements = optional_columns(schema), columns_with_null_elements(schema)
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
    names = ("mlflow", "torch", "torchrec", "pyarrow", "numpy", "pandas", "pydantic", "pyyaml")
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in names]


def save_mlflow_model(checkpoint: str, inputs: pa.Schema, schema: Schema, folder: str | Path, **log: Any) -> Any:
    """Exports a checkpoint and saves it as an MLflow model below ``folder``, or, with the arguments of MLflow's
    ``log_model``, logs it; the code of roo_ray goes with it."""
    with tempfile.TemporaryDirectory() as scratch:
        exported = export_model(checkpoint, inputs, Path(scratch) / "model")
        arguments = {
            "python_model": str(Path(mlflow_model.__file__)),
            "artifacts": {"model": str(exported)},
            "code_paths": [str(Path(__file__).parents[1])],
            "signature": signature_of(inputs, schema),
            "pip_requirements": requirements(),
        }
        if log:
            return mlflow.pyfunc.log_model(**arguments, **log)
        return mlflow.pyfunc.save_model(path=str(folder), **arguments)


def publish_model(config: Config, manifest: Manifest, checkpoint: str, run: RunHandle) -> str | None:
    """Logs the model of a training run into it, and registers it under ``serving.register_as``; the model's URI, None
    where tracking or ``serving.log_model`` is off."""
    if run.uri is None or not config.serving.log_model:
        return None
    inputs = input_types(config.requests, manifest, config.request_schema)
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # it hints at type hints
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(run.uri)
    try:
        with mlflow.start_run(run_id=run.run_id, log_system_metrics=False):
            named = {"name": MODEL_NAME, "registered_model_name": config.serving.register_as}
            info = save_mlflow_model(checkpoint, inputs, config.request_schema, "", **named)
    finally:
        mlflow.set_tracking_uri(before)
    return str(info.model_uri)
