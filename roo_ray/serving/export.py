"""From a sharded checkpoint to an exported model that any process can load (``scorer.py``)."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from roo_ray.errors import DataError
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema
from roo_ray.serving.scorer import INPUTS, MODEL, SCHEMA, WEIGHTS, input_columns
from roo_ray.storage import open_filesystem
from roo_ray.training.checkpoint import SafeReader, open_checkpoint, read_state, read_tensors


def input_types(data_set: str, manifest: Manifest, schema: Schema) -> pa.Schema:
    """The Arrow types of the columns that the model reads, as the data set stores them."""
    filesystem, base = open_filesystem(data_set)
    stored = pq.read_schema(f"{base}/{manifest.files[0].path}", filesystem=filesystem)
    return pa.schema([pa.field(name, stored.field(name).type) for name in input_columns(schema)])


def export_model(checkpoint: str, inputs: pa.Schema, folder: str | Path) -> Path:
    """Writes the exported model of a checkpoint (a path or URI) into ``folder``, which must not exist yet; it appears
    whole or not at all. Needs memory for all tables. Raises DataError where the checkpoint is damaged."""
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; export to another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(checkpoint).as_directory() as source, tempfile.TemporaryDirectory(dir=folder.parent) as made:
        state = read_state(source)
        schema = state.request_schema()
        tensors = {"model": dict(RankingModel(schema, state.model).state_dict())}
        misfit = f"checkpoint {checkpoint} does not fit its own model"
        read_tensors(tensors, SafeReader(source), state, misfit, alone=True)
        whole = Path(made) / "model"
        whole.mkdir()
        torch.save(tensors["model"], whole / WEIGHTS)
        about = {"model": state.model.model_dump(mode="json"), "data_version": state.data_version}
        about |= {"data_digest": state.data_digest, "step": state.step, "tasks": [x.name for x in schema.labels]}
        (whole / MODEL).write_text(json.dumps(about, indent=1))
        (whole / SCHEMA).write_text(schema.to_yaml())
        (whole / INPUTS).write_bytes(inputs.serialize().to_pybytes())
        os.rename(whole, folder)
    return folder
