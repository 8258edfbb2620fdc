"""What the trainers have between them: a process group on the nodes and devices that a run would use, with the
bandwidth of the two collectives that training lives on (gradients: all-reduce; embeddings: all-to-all)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from roo_ray.cluster.places import trainer_resources, workers_wanted
from roo_ray.config import Config
from roo_ray.errors import ClusterError

START_TIMEOUT_S = 60.0
COLLECTIVE_TIMEOUT_S = 60.0
ROUNDS = 3


@dataclass(frozen=True)
class Links:
    """``all_reduce``, ``all_to_all``: bytes per second that a rank moves; ``latency_s``: of a small all-reduce."""

    backend: str
    world: int
    nodes: int
    all_reduce: float
    all_to_all: float
    latency_s: float


class _Rank:
    """An actor that takes a trainer's place."""

    def address(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def measure(self, address: str, rank: int, world: int, gpu: bool, size: int) -> tuple[float, float, float]:
        return measure_rank(address, rank, world, gpu, size)


def measure_rank(address: str, rank: int, world: int, gpu: bool, size: int) -> tuple[float, float, float]:
    """Seconds that a rank takes to all-reduce ``size`` bytes, to exchange them all-to-all, and to all-reduce a single
    number, each the best of some rounds. One path for NCCL on GPUs and gloo on CPUs.

    ``address``: where rank 0 waits for the others, ``tcp://HOST:PORT``. Raises RuntimeError where what comes is not
    what the others have sent; what torch raises where they do not meet.
    """
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    dist.init_process_group(backend_of(gpu), address, timeout, world_size=world, rank=rank)
    try:
        values = torch.full((size // 4 // world * world,), float(rank), device=device)
        out = torch.empty_like(values)

        def seconds(call: Callable[[], object]) -> float:
            best = float("inf")
            for _ in range(ROUNDS):
                dist.barrier()
                begin = time.perf_counter()
                call()
                if gpu:
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - begin)
            return best

        exchanged = seconds(lambda: dist.all_to_all_single(out, values))
        parts = out.reshape(world, -1)[:, 0].tolist()
        if parts != [float(other) for other in range(world)]:
            raise RuntimeError(f"all-to-all mixes up ranks: {parts}")
        one = torch.ones(1, device=device)
        latency = seconds(lambda: dist.all_reduce(one))
        if one.item() != float(world**ROUNDS):
            raise RuntimeError(f"all-reduce sums up to {one.item():g} and not to {world**ROUNDS}")
        reduced = seconds(lambda: dist.all_reduce(values))
        return reduced, exchanged, latency
    finally:
        dist.destroy_process_group()


def backend_of(gpu: bool) -> str:
    """What the trainers' process group is made of."""
    return "nccl" if gpu else "gloo"


def links_of(times: Sequence[tuple[float, float, float]], gpu: bool, nodes: int, size: int) -> Links:
    """Bandwidths from what ``measure_rank`` gave on each rank: the slowest counts."""
    world = len(times)
    reduced, exchanged, latency = (max(column) for column in zip(*times, strict=True))
    share = (world - 1) / world  # of a rank's bytes that leave it
    return Links(
        backend_of(gpu),
        world,
        nodes,
        2 * share * size / reduced if world > 1 else 0.0,
        share * size / exchanged if world > 1 else 0.0,
        latency,
    )


def measure_links(config: Config, size: int = 16_000_000, workers: int | None = None) -> Links:
    """Starts the run's ranks as a run would (an elastic one's ``workers``), and measures with ``size`` bytes a rank.

    Raises ClusterError where the places are not free, or the ranks do not find each other.
    """
    training, settings = config.training, config.ray
    world = workers or workers_wanted(config)
    bundle = trainer_resources(config)
    labels = [settings.worker_labels] * world if settings.worker_labels else None
    group = placement_group([bundle] * world, bundle_label_selector=labels)
    try:
        if not group.wait(START_TIMEOUT_S):
            where = f" on nodes with {settings.worker_labels}" if settings.worker_labels else ""
            raise ClusterError(f"no free places for {world} workers of {bundle}{where} within {START_TIMEOUT_S:g} s")
        actor = ray.remote(_Rank)
        ranks = []
        for position in range(world):
            at = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=position)
            options = {"num_cpus": settings.cpus_per_worker, "num_gpus": 1 if training.gpu else 0}
            ranks.append(actor.options(scheduling_strategy=at, **options).remote())
        try:
            address = ray.get(ranks[0].address.remote(), timeout=START_TIMEOUT_S)
            calls = [one.measure.remote(address, rank, world, training.gpu, size) for rank, one in enumerate(ranks)]
            times = ray.get(calls, timeout=START_TIMEOUT_S + COLLECTIVE_TIMEOUT_S)
            nodes = len(set(ray.get([one.node.remote() for one in ranks])))
        except Exception as error:
            reason = next((x for x in reversed(str(error).strip().splitlines()) if x.strip()), type(error).__name__)
            raise ClusterError(f"the {world} workers do not reach each other: {reason}") from None
    finally:
        remove_placement_group(group)
    return links_of(times, training.gpu, nodes, size)
