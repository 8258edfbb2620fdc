"""Sharded checkpoints by torch.distributed.checkpoint, read without running any code found in them.

A checkpoint is a folder: ``*.distcp`` (each rank's shards), ``.metadata`` (what lies where) and ``state.json``
(position of the run, schema, data version, model config). It can be loaded on another number of ranks and
under another sharding plan. Only tensors are stored; the metadata, which torch writes as a pickle, is read by
an unpickler that knows torch's metadata classes and nothing else.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from roo_ray.config import Model
from roo_ray.errors import DataError
from roo_ray.schema import Schema, Strict, parse_schema
from roo_ray.storage import open_filesystem
from roo_ray.training.sharding import ShardedModel

STATE_FILE = "state.json"

# What torch's own writer puts into ``.metadata`` (torch 2.11 to 2.13), and no more.
_ALLOWED = {
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}


class RunState(Strict):
    """Where a run stands. ``epoch``: epochs done; ``step``: steps done in all; the rest says what the weights
    belong to, so that a checkpoint alone can be evaluated. ``plan``: what decides the order of the data.
    ``position``: within an epoch, where it stands: per lane (window in progress, batches taken in it), whatever
    the number of ranks. ``trained``: of that epoch so far, or of the last whole one: requests, impressions and
    the sum of the request keys modulo 2^64, which tells whether two runs saw the same requests.
    ``metrics``: the last held-out metrics."""

    epoch: int
    step: int
    schema_yaml: str
    model: Model
    data_version: int
    data_digest: str
    plan: dict[str, Any]
    position: list[tuple[int, int]] | None = None
    trained: dict[str, int] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)

    def request_schema(self) -> Schema:
        """The schema the model was trained with."""
        return parse_schema(self.schema_yaml, "schema in checkpoint")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and name in _TORCH_DTYPES:
            return super().find_class(module, name)
        raise DataError(
            f"the checkpoint's .metadata asks for {module}.{name}, which no checkpoint of roo_ray holds; "
            "it is damaged or not ours, and is not loaded"
        )


_TORCH_DTYPES = {
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "int8",
    "uint8",
    "int32",
    "int64",
    "bool",
    "strided",
}


class SafeReader(FileSystemReader):
    """Reads a checkpoint folder; refuses anything but tensors. Raises DataError for a damaged folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, by an unpickler that builds torch's metadata classes alone."""
        folder = Path(self.path)
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except FileNotFoundError:
            raise DataError(f"{folder} is not a complete checkpoint: it has no .metadata") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
            raise DataError(f"{folder}/.metadata is damaged: {error}") from None
        if not isinstance(metadata, Metadata):
            raise DataError(f"{folder}/.metadata is not a checkpoint's metadata")
        code = [key for key, item in metadata.state_dict_metadata.items() if isinstance(item, BytesStorageMetadata)]
        if code:
            raise DataError(f"{folder} stores objects other than tensors ({code[0]}); it is not loaded")
        files = {info.relative_path for info in (metadata.storage_data or {}).values()}
        missing = sorted(name for name in files if not (folder / name).is_file())
        if missing:
            raise DataError(f"{folder} is not a complete checkpoint: {missing[0]} is missing")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _tensors(model: ShardedModel) -> dict[str, Any]:
    """The tensors of model and optimizers, nested, keyed by parameter names (no world size in them)."""
    optimizer = model.optimizer.state_dict()
    return {"model": dict(model.module.state_dict()), "optimizer": dict(optimizer["state"])}


def save(folder: str | Path, model: ShardedModel, state: RunState, rank: int) -> None:
    """Writes this rank's part into ``folder`` (collective: every rank calls it, folders may differ by rank and
    are merged by Ray Train's upload)."""
    folder = Path(folder)
    dcp.save(_tensors(model), storage_writer=FileSystemWriter(folder, sync_files=False))
    if rank == 0:
        (folder / STATE_FILE).write_text(json.dumps(state.model_dump(mode="json"), indent=1))


def read_state(folder: str | Path) -> RunState:
    """The run state in a checkpoint folder. Raises DataError where it is missing or not valid."""
    path = Path(folder) / STATE_FILE
    try:
        return RunState.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{folder} is not a complete checkpoint: it has no {STATE_FILE}") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid: {error}") from None


def load(folder: str | Path, model: ShardedModel) -> RunState:
    """Loads a checkpoint into ``model`` in place (collective). Raises DataError where the folder is damaged or
    belongs to another model."""
    state = read_state(folder)
    tensors = _tensors(model)
    try:
        dcp.load(tensors, storage_reader=SafeReader(folder))
    except dcp.api.CheckpointException as error:  # a BaseException: it would pass every `except Exception`
        causes = [failure[0] for failure in error.failures.values()]
        ours = next((cause for cause in causes if isinstance(cause, DataError)), None)
        raise ours or DataError(f"checkpoint {folder} does not fit this model: {causes[0]}") from None
    model.module.load_state_dict(tensors["model"])
    model.optimizer.load_state_dict({"state": tensors["optimizer"]})
    return state


def open_checkpoint(path: str) -> ray.train.Checkpoint:
    """A checkpoint at a local path or URI (Ray takes URIs as paths where a file system is not given)."""
    filesystem, inner = open_filesystem(path)
    return ray.train.Checkpoint(inner, filesystem=filesystem)


def finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics with None for what JSON cannot hold (NaN, infinities)."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}
