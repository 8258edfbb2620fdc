"""Unit costs that no training run tells: what a CPU reads, what a checkpoint's copy and its storage take, what a step
holds until backward. Each measured by a task where the run has such work: on the nodes of trainers, or of data."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow.fs as pafs
import ray
import torch
from torch import Tensor

from roo_ray.cluster.places import trainer_resources
from roo_ray.config import Config
from roo_ray.ingest.settings import StreamSettings
from roo_ray.ingest.stream import RankStream
from roo_ray.models.cost import training_megaflops
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import Manifest
from roo_ray.storage import join_path, open_filesystem

Measured = TypeVar("Measured")
COPIED = 256_000_000  # bytes
WRITTEN = 64_000_000
READ_S = 20.0
LARGEST_TABLES = 4_000_000_000  # bytes; for larger ones nothing is held on one device to be measured


def _at_a_trainer(config: Config, function: Callable[..., Measured], *arguments: Any) -> Measured:
    resources = trainer_resources(config)
    places: dict[str, Any] = {"num_cpus": resources.pop("CPU"), "num_gpus": resources.pop("GPU", 0)}
    if config.ray.worker_labels:
        places["label_selector"] = config.ray.worker_labels
    task = ray.remote(max_retries=0, resources=resources, **places)(function)
    result: Measured = ray.get(task.remote(*arguments))
    return result


def _device(gpu: bool) -> torch.device:
    return torch.device("cuda", 0) if gpu else torch.device("cpu")


def copy_bandwidth(config: Config) -> float:
    """Bytes per second of a trainer's copy of tensors into host memory."""

    def measure(gpu: bool) -> float:
        values, best = torch.zeros(COPIED // 4, device=_device(gpu)), float("inf")
        for _ in range(3):
            begin = time.perf_counter()
            values.to("cpu", copy=True)
            best = min(best, time.perf_counter() - begin)
        return COPIED / best

    return _at_a_trainer(config, measure, config.training.gpu)


def storage_bandwidth(config: Config) -> float:
    """Bytes per second that a trainer writes to ``storage``, until they are there."""

    def measure(storage: str) -> float:
        filesystem, folder = open_filesystem(storage)
        path = open_filesystem(join_path(storage, f".roo_ray_sizing_{os.getpid()}"))[1]
        filesystem.create_dir(folder, recursive=True)
        content = os.urandom(WRITTEN)
        begin = time.perf_counter()
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        if isinstance(filesystem, pafs.LocalFileSystem):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
        filesystem.delete_file(path)
        return WRITTEN / seconds

    return _at_a_trainer(config, measure, config.storage)


def _stream(config: Config, version: int) -> RankStream:
    """All lanes of the first epoch, read by a thread of this process."""
    settings = StreamSettings(
        data_set=config.requests,
        version=version,
        schema=config.request_schema,
        ingest=config.ingest.model_copy(update={"reader": "thread"}),
        holdout=config.holdout,
        side="train",
        seed=config.training.seed,
        epochs=(0,),
        mode=config.ingest.mode,
        cost=training_megaflops(config.request_schema, config.model),
    )
    return RankStream(settings, 0, 1)


def read_rate(config: Config, manifest: Manifest) -> float:
    """Requests per second that one CPU of a data node decodes, filters, packs and makes tensors of."""

    def measure() -> float:
        torch.set_num_threads(1)
        begin, until = time.process_time(), time.perf_counter() + READ_S
        stream, requests = _stream(config, manifest.version), 0
        for step in stream.epoch(0):
            requests += step.requests
            if not step.lanes_alive or time.perf_counter() > until:
                break
        rate = requests / (time.process_time() - begin)  # of all threads together
        stream.close()
        return rate

    places: dict[str, Any] = {"num_cpus": 1, "resources": config.ray.data_resources}
    if config.ray.data_labels:
        places["label_selector"] = config.ray.data_labels
    rate = float(ray.get(ray.remote(max_retries=0, **places)(measure).remote()))
    return max(rate, 1.0)


class Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward, each storage once, without those of ``parameters``."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._storages: dict[int, int] = {}
        self._known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(self._storages.values())


def held_per_megaflop(config: Config, manifest: Manifest) -> float:
    """Bytes that the first batch's forward holds until backward, by the megaflops of its work; 0 where the tables
    are too large to be made on one device."""
    schema = config.request_schema
    if sum(table.rows * table.dim * 4 for table in schema.tables.values()) > LARGEST_TABLES:
        return 0.0

    def measure(gpu: bool) -> float:
        stream, device = _stream(config, manifest.version), _device(gpu)
        step = next(stream.epoch(0))
        model = RankingModel(schema, config.model, device, config.training.autocast == "bf16").to(device)
        batch = step.batch.to(device)
        held = Held([*model.parameters(), *model.buffers()])
        with held:
            model(batch)
        stream.close()
        return float(held.total / step.counts["cost"])

    return _at_a_trainer(config, measure, config.training.gpu)
