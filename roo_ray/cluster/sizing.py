"""How large a cluster a run wants: step time, memory, data nodes, traffic, time and cost for W workers, from a
manifest, a config and measured unit costs. Pure functions; ``jobs/size_cluster.py`` prints them.

The model of a step on one of W workers that share ``cores`` with others of their node:

    seconds = fixed + contention * work / W * per_megaflop + latency + all-to-all bytes / bandwidth

``work`` is the step's cost over all lanes in megaflops (the model's own polynomial, ``models/cost.py``), contention
how many times more threads than cores a node runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field

from roo_ray.cluster.memory import USABLE, Table, WorkerMemory, worker_memory
from roo_ray.config import Config
from roo_ray.errors import ConfigError
from roo_ray.ingest.expected import expected_steps, mean_cost
from roo_ray.ingest.holdout import select_files
from roo_ray.models.cost import training_megaflops
from roo_ray.models.embeddings import lookup_features
from roo_ray.models.managed import map_bytes
from roo_ray.models.pooled import pooled_levels
from roo_ray.models.ranking import make_towers
from roo_ray.requests.lengths import mean_ids, sequence_shares
from roo_ray.requests.manifest import Manifest
from roo_ray.schema import Strict
from roo_ray.training.hosts import TABLES_SHARE

FLOAT = 4
OPTIMIZER_FLOATS = {"rowwise_adagrad": 0, "adagrad": 1, "sgd": 0, "adam": 2, "lamb": 2}  # per weight, beside per row


class UnitCosts(Strict):
    """Measured costs of one unit, on the machines that the run will use (benchmarks/sizing.py --costs).

    ``fixed_s``: of a step, whatever is in it. ``per_megaflop_s``: of the model's counted work, with a core (or GPU)
    to itself. ``latency_s``: what a second worker adds to a step. ``bandwidth``: bytes per second that a rank sends
    within steps. ``read_requests_per_s``: of one CPU of a data node, decoding and packing. ``start_s``: until the
    first step. ``copy_bandwidth``, ``checkpoint_bandwidth``: bytes per second of a worker's checkpoint into host
    memory, which training waits for, and from there to the storage, in the background. ``cores``: of a trainer's node,
    that its workers share; 0 where each worker has its own device. ``activation_bytes_per_megaflop``: memory that a
    step's work holds; 0: not counted. ``gpu``: measured on GPUs. ``step_error``, ``largest_step_error``: of the step
    times predicted by these costs against measured ones, mean and largest, as shares; None: not measured.
    """

    fixed_s: float = Field(ge=0)
    per_megaflop_s: float = Field(gt=0)
    latency_s: float = Field(default=0.0, ge=0)
    bandwidth: float = Field(default=1e9, gt=0)
    read_requests_per_s: float = Field(default=50_000, gt=0)
    start_s: float = Field(default=30.0, ge=0)
    copy_bandwidth: float = Field(default=2e9, gt=0)
    checkpoint_bandwidth: float = Field(default=2e8, gt=0)
    cores: int = Field(default=0, ge=0)
    activation_bytes_per_megaflop: float = Field(default=0.0, ge=0)
    gpu: bool = False
    step_error: float | None = Field(default=None, ge=0)
    largest_step_error: float | None = Field(default=None, ge=0)


class Prices(Strict):
    """``trainer_hour``: of one worker's share of a node, which has room for ``trainers_per_node`` and is paid whole;
    ``data_cpu_hour``: of one CPU of a data node, which has ``data_node_cpus`` and is paid whole; ``head_hour``. Any
    currency. ``worker_memory``: bytes of one GPU, or of a worker's share of a node; ``worker_host_memory``: beside a
    GPU, of a worker's share of its node, where tables may lie that the GPU has no room for."""

    trainer_hour: float = Field(ge=0)
    trainers_per_node: int = Field(default=1, gt=0)
    data_cpu_hour: float = Field(default=0.05, ge=0)
    data_node_cpus: int = Field(default=16, gt=0)
    head_hour: float = Field(default=0.0, ge=0)
    worker_memory: float | None = Field(default=None, gt=0)
    worker_host_memory: float | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class Shape:
    """What a run does, whatever it runs on. ``steps``: of an epoch; per step over all lanes, in the mean:
    ``requests`` and ``megaflops``; ``full_requests``: of a step with full batches, where there are more;
    ``lookup_bytes``: looked-up embeddings of a request; ``reduced_bytes``: those beside them of row-wise pooled tables,
    of whose bags every worker sends its part; ``map_bytes``: of the maps of managed tables, on every worker."""

    steps: int
    requests: float
    megaflops: float
    lookup_bytes: float
    tables: dict[str, Table]
    dense_bytes: float
    epochs: int
    lanes: int
    full_requests: float = 0.0
    reduced_bytes: float = 0.0
    map_bytes: float = 0.0
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None


@dataclass(frozen=True)
class Prediction:
    """A run on W workers. Bytes and seconds; ``memory``: of the fullest worker, all on its device; ``host_memory``: of
    it, what a GPU has no room for and its host takes (a step is slower then than predicted); ``exchange_bytes``: that
    a rank sends in a step; ``data_cpus`` on ``data_nodes`` read for all trainers, on ``trainer_nodes``;
    ``checkpoints`` of ``checkpoint_bytes`` each."""

    workers: int
    step_s: float
    memory: float
    host_memory: float
    data_cpus: int
    data_nodes: int
    trainer_nodes: int
    exchange_bytes: float
    checkpoints: int
    checkpoint_bytes: float
    seconds: float
    cost: float
    fits: bool


def shape_of(config: Config, manifest: Manifest) -> Shape:
    """The run of ``config`` on a data set: its plan, with the mean requests and ids of the manifest. Raises ConfigError
    for no data, DataError where nothing would be trained on."""
    if not manifest.requests:
        raise ConfigError(f"{config.requests} has no requests to size a run by")
    schema, ingest = config.request_schema, config.ingest
    impressions = max(manifest.impressions / manifest.requests, 1.0)
    tokens = manifest.tokens / manifest.requests
    coefficients = training_megaflops(schema, config.model)
    ids = mean_ids(schema, manifest, config.requests)
    shares = sequence_shares(schema, manifest, ids)
    work = float(mean_cost(schema, coefficients, np.array(impressions), np.array(tokens), shares))
    fits = [ingest.batch_impressions / impressions] if ingest.batch_impressions else []
    fits += [ingest.batch_cost / work] if ingest.batch_cost else []
    per_lane = max(min(fits), 1.0)
    lookup, reduced, tables = 0.0, 0.0, dict[str, Table]()
    pooled = pooled_levels(schema, config.model.embeddings.pooled)
    weight = FLOAT if config.model.embeddings.weights == "fp32" else 2
    state = OPTIMIZER_FLOATS[config.model.embeddings.optimizer]
    for table, keys in lookup_features(schema).items():
        rows, dim = schema.tables[table].rows, schema.tables[table].dim
        if table in pooled:  # those of an impression-level one look up their requests' bags at B_NRO, too
            vectors = (impressions if pooled[table] == "impression" else 1.0) * len(keys)
        else:
            vectors = sum(ids.per_request[key] for key in keys)
        kind = config.model.embeddings.sharding.get(table)
        by_rows = kind in ("row_wise", "grid") or (kind is None and rows >= config.training.row_wise_from)
        split = by_rows or kind == "column_wise"
        if by_rows and table in pooled:
            reduced += vectors * dim * FLOAT
        else:
            lookup += vectors * dim * FLOAT
        tables[table] = (
            Table(3.0 * rows * dim * weight, "copied")
            if kind == "data_parallel"
            else Table(
                float(rows * (dim * (weight + state * FLOAT) + FLOAT)),
                "split" if split else "whole",
                table in config.model.embeddings.uvm,
            )
        )
    settings = config.model.embeddings.managed
    managed = [table for table in lookup_features(schema) if schema.tables[table].managed]
    with torch.random.fork_rng(devices=[]):
        dense = sum(p.numel() for p in make_towers(schema, config.model).parameters())
    trained = float(sum(file.requests for file in select_files(manifest, config.holdout, "train")))
    trained *= 1.0 - config.holdout.fraction if config.holdout.by == "request" else 1.0
    steps = max(1, round(expected_steps(config, manifest, coefficients)))
    return Shape(
        steps=steps,
        requests=trained / steps,
        megaflops=trained / steps * work,
        full_requests=min(per_lane * ingest.lanes, trained),
        lookup_bytes=lookup,
        reduced_bytes=reduced,
        tables=tables,
        dense_bytes=float(dense * FLOAT),
        map_bytes=float(sum(map_bytes(schema.tables[table].rows, settings) for table in managed)),
        epochs=config.training.epochs,
        lanes=ingest.lanes,
        checkpoint_every_steps=config.training.checkpoint_every_steps,
        checkpoint_every_minutes=config.training.checkpoint_every_minutes,
    )


def memory_of(shape: Shape, workers: int, costs: UnitCosts) -> WorkerMemory:
    """What the fullest worker holds: its tables with their optimizer's state, the dense part with gradients and
    Adam's two moments, the maps of managed tables, looked-up embeddings with gradients and the exchange's buffer, and
    what the step's work holds until backward; all of a full batch."""
    lanes = math.ceil(shape.lanes / workers) / shape.lanes
    full = max(shape.full_requests, shape.requests)
    lookups = 3 * (shape.lookup_bytes + shape.reduced_bytes * workers) * full * lanes
    work = shape.megaflops * full / shape.requests
    rest = 4 * shape.dense_bytes + shape.map_bytes + lookups + work * lanes * costs.activation_bytes_per_megaflop
    return worker_memory(shape.tables.values(), workers, rest)


def fits(memory: WorkerMemory, prices: Prices, gpu: bool) -> tuple[bool, float]:
    """Whether a worker of these prices holds it, and how many bytes of tables are in host memory then: those that a
    GPU has no room for, where the host is known to have it."""
    room = prices.worker_memory
    if not gpu:
        return room is None or memory.device <= room, 0.0
    in_host = memory.hosted if room is None else memory.in_host(USABLE * room)
    if in_host is None:
        return False, 0.0
    host = prices.worker_host_memory
    return in_host <= (TABLES_SHARE * host if host is not None else memory.hosted), in_host


def exchanged_bytes(shape: Shape, workers: int) -> float:
    """Embeddings and their gradients that a rank sends to the others in a step."""
    lanes = math.ceil(shape.lanes / workers) / shape.lanes
    sent = shape.lookup_bytes + shape.reduced_bytes * workers
    return 2 * sent * shape.requests * lanes * (workers - 1) / workers


def sent_bytes(shape: Shape, workers: int) -> float:
    """All that a rank sends in a step: the exchange, and the all-reduce of the gradients of the dense part and of
    tables that every worker has."""
    reduced = shape.dense_bytes + sum(table.size / 3 for table in shape.tables.values() if table.kind == "copied")
    return exchanged_bytes(shape, workers) + 2 * (workers - 1) / workers * reduced


def state_bytes(shape: Shape) -> float:
    """Of a whole checkpoint: tables with optimizer state, the dense part with Adam's moments, the maps of managed
    tables."""
    return sum(table.size for table in shape.tables.values()) + 3 * shape.dense_bytes + shape.map_bytes


def checkpoints_of(shape: Shape, training_s: float, write_s: float) -> int:
    """Checkpoints of a run that trains for ``training_s``: at the ends of epochs, and within them as often as the
    config says, but not while one is still being written."""
    steps, minutes = shape.checkpoint_every_steps, shape.checkpoint_every_minutes
    within = shape.epochs * shape.steps // steps if steps else 0
    within = max(within, int(training_s / (60 * minutes)) if minutes else 0)
    return shape.epochs + min(within, int(training_s / write_s))


def predict(shape: Shape, workers: int, costs: UnitCosts, prices: Prices) -> Prediction:
    """A run on so many workers. Training waits for a checkpoint's copy, and for the writing of the last one alone."""
    lanes = math.ceil(shape.lanes / workers) / shape.lanes  # of the step's work, on the rank that has most of it
    contention = max(1.0, workers / costs.cores) if costs.cores else 1.0
    exchange = exchanged_bytes(shape, workers)
    step = costs.fixed_s * contention + contention * shape.megaflops * lanes * costs.per_megaflop_s
    if workers > 1:
        step += costs.latency_s * contention + sent_bytes(shape, workers) / costs.bandwidth
    state = state_bytes(shape)
    data_cpus = max(1, math.ceil(shape.requests / step / costs.read_requests_per_s))
    data_nodes = math.ceil(data_cpus / prices.data_node_cpus)
    training = shape.epochs * shape.steps * step
    write = state / workers / costs.checkpoint_bandwidth
    checkpoints = checkpoints_of(shape, training, write)
    seconds = costs.start_s + training + checkpoints * state / workers / costs.copy_bandwidth + write
    trainer_nodes = math.ceil(workers / prices.trainers_per_node)
    per_hour = trainer_nodes * prices.trainers_per_node * prices.trainer_hour + prices.head_hour
    per_hour += data_nodes * prices.data_node_cpus * prices.data_cpu_hour
    memory = memory_of(shape, workers, costs)
    fit, in_host = fits(memory, prices, costs.gpu)
    return Prediction(
        workers=workers,
        step_s=step,
        memory=memory.device,
        host_memory=in_host,
        data_cpus=data_cpus,
        data_nodes=data_nodes,
        trainer_nodes=trainer_nodes,
        exchange_bytes=exchange,
        checkpoints=checkpoints,
        checkpoint_bytes=state,
        seconds=seconds,
        cost=per_hour * seconds / 3600,
        fits=fit,
    )


def cheapest(predictions: Sequence[Prediction], deadline_s: float | None) -> Prediction | None:
    """The cheapest that fits into memory and ends by the deadline; among equals the fastest."""
    good = [p for p in predictions if p.fits and (deadline_s is None or p.seconds <= deadline_s)]
    return min(good, key=lambda p: (p.cost, p.seconds), default=None)


def fit_exchange(measured: Sequence[tuple[float, float]], most: float) -> tuple[float, float]:
    """(latency_s, bandwidth) from (bytes that a rank sends, seconds beyond its own work) of steps of two workers at
    two batch sizes. A busy machine may exchange more slowly within steps than the links alone would, never faster than
    ``most``. Raises ConfigError for fewer than two sizes."""
    (small, quick), *_, (large, slow) = sorted(measured)
    if small == large:
        raise ConfigError("the cost of an exchange needs measured steps of two batch sizes")
    per_byte = max((slow - quick) / (large - small), 1 / most)
    latency = sum(seconds - sent * per_byte for sent, seconds in measured) / len(measured)
    return max(0.0, latency), 1 / per_byte


def fit_costs(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed_s, per_megaflop_s) from (megaflops, seconds) of steps of one worker, at two or more batch sizes: the
    least-squares line, kept from falling below zero. Raises ConfigError for fewer than two sizes."""
    if len({work for work, _ in measured}) < 2:
        raise ConfigError("unit costs need measured steps of at least two batch sizes")
    mean_x = sum(x for x, _ in measured) / len(measured)
    mean_y = sum(y for _, y in measured) / len(measured)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in measured) / sum((x - mean_x) ** 2 for x, _ in measured)
    if slope <= 0:  # noise: all of it goes to the work
        return 0.0, mean_y / mean_x
    fixed = mean_y - slope * mean_x
    return (fixed, slope) if fixed >= 0 else (0.0, sum(x * y for x, y in measured) / sum(x * x for x, _ in measured))
