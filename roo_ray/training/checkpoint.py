"""Sharded checkpoints by torch.distributed.checkpoint, read without running any code found in them.

A checkpoint is a folder: ``*.distcp`` (each rank's shards), ``.metadata`` (what lies where) and ``state.json``
(position of the run, schema, data version, model config). ``state.json`` is written last, when everything else is
in place, and lists the other files with their sizes: a folder without it, or with another file cut short, is no
checkpoint. It can be loaded on another number of ranks and under another sharding plan. Only tensors are stored;
the metadata, which torch writes as a pickle, is read by an unpickler that knows torch's metadata classes and
nothing else.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs
import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from roo_ray.config import Model
from roo_ray.errors import DataError
from roo_ray.models.pooled import unpooled_name
from roo_ray.redact import redact_text
from roo_ray.schema import Schema, Strict, parse_schema
from roo_ray.storage import join_path, open_filesystem
from roo_ray.training.packing import PACKED, Index, ShapeError, pack, unpack, unpacked
from roo_ray.training.sharding import ShardedModel

STATE_FILE = "state.json"
METADATA_FILE = ".metadata"  # as torch calls it

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
    the number of ranks; ``position_skipped``: per lane, the units of that window that could not be read
    (``ingest.plan.Position``). ``trained``: of that epoch so far, or of the last whole one: requests, impressions and
    the sum of the request keys modulo 2^64, which tells whether two runs saw the same requests; and what was left out.
    ``metrics``: the last held-out metrics. ``skipped``: batches left out so far because their loss was not finite
    (``training.on_nan``). ``seconds``: in training steps so far (``training.max_seconds``). ``totals``: of the windows
    logged so far (``window.TOTALS``); empty where not known. ``packed``: what lies in the checkpoint's large tensors
    (``packing``). ``files``: the other files of the checkpoint, with their bytes; empty where not known."""

    epoch: int
    step: int
    schema_yaml: str
    model: Model
    data_version: int
    data_digest: str
    plan: dict[str, Any]
    position: list[tuple[int, int]] | None = None
    position_skipped: list[list[int]] = Field(default_factory=list)
    trained: dict[str, int] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    skipped: int = 0
    seconds: float = 0.0
    totals: dict[str, float] = Field(default_factory=dict)
    packed: Index = Field(default_factory=dict)
    files: dict[str, int] = Field(default_factory=dict)

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


def _unpickled(file: IO[bytes], folder: str) -> Metadata:
    metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise DataError(f"{folder}/.metadata is not a checkpoint's metadata")
    return metadata


@contextmanager
def _damage_named(folder: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{folder} is not a complete checkpoint: it has no .metadata") from None
    except Exception as error:  # damaged bytes can make an unpickler, and what it has built, raise anything
        raise DataError(f"{folder}/.metadata is damaged: {type(error).__name__}: {error}") from None


def model_bytes(checkpoint: str) -> int:
    """Bytes of the whole model in a checkpoint at a path or URI, without its optimizer's state; of the checkpoint's
    files ``.metadata`` alone is read. Raises DataError where it is missing or damaged."""
    filesystem, base = open_filesystem(checkpoint)
    shown = redact_text(checkpoint)
    with _damage_named(shown):
        with filesystem.open_input_stream(f"{base}/.metadata") as stream:
            metadata = _unpickled(BytesIO(bytes(stream.read())), shown)
        return sum(
            item.size.numel() * item.properties.dtype.itemsize
            for name, item in metadata.state_dict_metadata.items()
            if name.startswith(("model.", f"{PACKED}.model.")) and isinstance(item, TensorStorageMetadata)
        )


class SafeReader(FileSystemReader):
    """Reads a checkpoint folder; refuses anything but tensors. Raises DataError for a damaged folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, by an unpickler that builds torch's metadata classes alone."""
        folder = Path(self.path)
        with _damage_named(str(folder)):
            return self._read(folder)

    def _read(self, folder: Path) -> Metadata:
        with (folder / METADATA_FILE).open("rb") as file:
            metadata = _unpickled(file, str(folder))
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


def tensors_of(model: ShardedModel) -> dict[str, Any]:
    """The tensors of model and optimizers, nested, as they are called in checkpoints."""
    return as_stored(own_tensors(model))


def own_tensors(model: ShardedModel) -> dict[str, Any]:
    """The same, as the model calls them, keyed by parameter names (no world size in them)."""
    return {"model": dict(model.module.state_dict()), "optimizer": dict(model.optimizer.state_dict()["state"])}


def as_stored(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tensors of a model as they are called in checkpoints, where a table has the same name pooled or not."""
    return {
        unpooled_name(name): as_stored(value) if isinstance(value, Mapping) else value
        for name, value in tensors.items()
    }


class NotingWriter(FileSystemWriter):
    """torch's writer, which notes in ``names`` the files that it has written on this rank."""

    def __init__(self, folder: Path, durable: bool) -> None:
        super().__init__(folder, sync_files=durable)
        self.names: set[str] = set()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's tensors."""
        written = super().write_data(plan, planner)
        self.names |= {result.storage_data.relative_path for result in written.wait()}
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The metadata, on the first rank."""
        super().finish(metadata, results)
        self.names.add(METADATA_FILE)


def write_tensors(
    folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None, durable: bool
) -> dict[str, int]:
    """Writes this rank's part of ``tensors`` into ``folder``, ``.metadata`` on rank 0 (collective over ``group``).
    ``durable``: on the disk, not in its cache, when this returns. Returns the files that this rank has written, with
    their bytes. Raises OSError on all ranks where a rank's disk did not take it."""
    writer = NotingWriter(folder, durable)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:  # a BaseException: it would pass every `except Exception`
        causes = [failure[0] for failure in error.failures.values()]
        raise OSError(f"{causes[0]}") from None
    return {name: (folder / name).stat().st_size for name in sorted(writer.names)}


def save(folder: str | Path, model: ShardedModel, state: RunState, rank: int) -> None:
    """Writes a checkpoint into ``folder``, which all ranks share, and waits for it (collective)."""
    folder = Path(folder)
    rest, large, index = pack(tensors_of(model))
    write_tensors(folder, rest | {PACKED: large}, None, durable=False)
    if rank == 0:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / STATE_FILE).write_text(state_json(state.model_copy(update={"packed": index}), sizes))
    dist.barrier()


def state_json(state: RunState, files: dict[str, int]) -> str:
    """What completes a checkpoint of these other files."""
    files = {name: size for name, size in sorted(files.items()) if name != STATE_FILE}
    return json.dumps(state.model_copy(update={"files": files}).model_dump(mode="json"), indent=1)


def read_state(folder: str | Path, filesystem: pafs.FileSystem | None = None) -> RunState:
    """The run state in a checkpoint folder, at a path or URI, or at a path of ``filesystem``; no other file of it is
    read. Raises DataError where it is missing or not valid, and where a file that it lists is missing or has another
    size."""
    base, shown = str(folder), redact_text(str(folder))
    if filesystem is None:
        filesystem, base = open_filesystem(base)
    try:
        with filesystem.open_input_stream(f"{base}/{STATE_FILE}") as stream:
            state = RunState.model_validate_json(bytes(stream.read()))
    except FileNotFoundError:
        raise DataError(f"{shown} is not a complete checkpoint: it has no {STATE_FILE}") from None
    except ValueError as error:
        raise DataError(f"{join_path(shown, STATE_FILE)} is not valid: {error}") from None
    found = filesystem.get_file_info([f"{base}/{name}" for name in state.files])
    for (name, size), file in zip(state.files.items(), found, strict=True):
        if not file.is_file:
            raise DataError(f"{shown} is not a complete checkpoint: {name} is missing")
        if file.size != size:
            raise DataError(
                f"{shown} is not a complete checkpoint: {name} has {file.size:,} bytes, and {size:,} were written"
            )
    return state


def load(folder: str | Path, model: ShardedModel, run: dict[str, torch.Tensor] | None = None) -> RunState:
    """Loads a checkpoint into ``model`` in place, and into those tensors of ``run`` that it has with the same shape
    (the others are taken out of ``run``) (collective). Raises DataError where the folder is damaged or belongs to
    another model."""
    state = read_state(folder)
    reader = SafeReader(folder)
    if run:
        stored = reader.read_metadata().state_dict_metadata
        for name in list(run):
            if getattr(stored.get(f"run.{name}"), "size", None) != run[name].shape:
                del run[name]
    tensors = own_tensors(model)
    read_tensors(tensors | ({"run": run} if run else {}), reader, state, f"checkpoint {folder} does not fit this model")
    model.module.load_state_dict(tensors["model"])
    model.optimizer.load_state_dict({"state": tensors["optimizer"]})
    return state


def load_weights(folder: str | Path, model: ShardedModel) -> RunState:
    """As ``load``, of the model alone, which may have been trained with other options of ``model.embeddings``: its
    optimizer's state is not read, and stays what it is (collective)."""
    state = read_state(folder)
    tensors = {"model": dict(model.module.state_dict())}
    read_tensors(tensors, SafeReader(folder), state, f"checkpoint {folder} does not fit this model")
    model.module.load_state_dict(tensors["model"])
    return state


def read_tensors(
    tensors: Mapping[str, Any], reader: SafeReader, state: RunState, misfit: str, alone: bool = False
) -> None:
    """Reads a checkpoint's values into nested ``tensors``, in place, as the model calls them (collective, unless
    ``alone``). Raises DataError, beginning with ``misfit``, where names or shapes are not the checkpoint's."""
    tensors = as_stored(tensors)
    wanted = unpacked(tensors, state.packed)
    try:
        dcp.load(wanted, storage_reader=reader, no_dist=alone)
        unpack(tensors, wanted.get(PACKED, {}), state.packed)
    except dcp.api.CheckpointException as error:  # a BaseException: it would pass every `except Exception`
        causes = [failure[0] for failure in error.failures.values()]
        ours = next((cause for cause in causes if isinstance(cause, DataError)), None)
        raise ours or DataError(f"{misfit}: {causes[0]}") from None
    except ShapeError as error:
        raise DataError(f"{misfit}: {error}") from None


def open_checkpoint(path: str) -> ray.train.Checkpoint:
    """A checkpoint at a local path or URI (Ray takes URIs as paths where a file system is not given)."""
    filesystem, inner = open_filesystem(path)
    return ray.train.Checkpoint(inner, filesystem=filesystem)


def finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics with None for what JSON cannot hold (NaN, infinities)."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}
