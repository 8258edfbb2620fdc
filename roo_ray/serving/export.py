"""From a sharded checkpoint to an exported model that any process can load (``scorer.py``)."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from roo_ray.errors import ClusterError, DataError
from roo_ray.models.ranking import RankingModel
from roo_ray.redact import redact_text
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Schema
from roo_ray.serving.scorer import INPUTS, MODEL, SCHEMA, WEIGHTS, input_columns
from roo_ray.storage import open_filesystem
from roo_ray.terminal import human_bytes
from roo_ray.training.checkpoint import SafeReader, model_bytes, open_checkpoint, read_state, read_tensors
from roo_ray.training.hosts import free_memory

MODEL_COPIES = 2.5  # that an export has in memory: the weights, what they are read into, and something for the rest


def input_types(data_set: str, manifest: Manifest, schema: Schema) -> pa.Schema:
    """The Arrow types of the columns that the model reads, as the data set stores them; who reads one that it does not
    store, and needs it, says so."""
    filesystem, base = open_filesystem(data_set)
    stored = pq.read_schema(f"{base}/{manifest.files[0].path}", filesystem=filesystem)
    return pa.schema([pa.field(x, stored.field(x).type) for x in input_columns(schema) if x in stored.names])


def require_memory(checkpoint: str) -> None:
    """Raises ClusterError where this machine, or container, has too little memory free for the checkpoint's whole
    model: the kernel would end the process without a word."""
    needed, free = MODEL_COPIES * model_bytes(checkpoint), free_memory()
    if needed > free:
        raise ClusterError(
            f"exporting the whole model of {redact_text(checkpoint)} needs {human_bytes(needed)} of memory, and this "
            f"node has {human_bytes(free)} free; do it on one with more (jobs/review.py run_name=NAME logs a run's "
            "model), or train with serving.log_model=false"
        )


def export_model(checkpoint: str, inputs: pa.Schema, folder: str | Path) -> Path:
    """Writes the exported model of a checkpoint (a path or URI) into ``folder``, which must not exist yet; it appears
    whole or not at all. Raises DataError where the checkpoint is damaged, ClusterError where all tables together do not
    fit into memory."""
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; export to another folder")
    require_memory(checkpoint)
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
