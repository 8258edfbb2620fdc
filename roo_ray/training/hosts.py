"""What the ranks' hosts have for them: the topology by which TorchRec's planner places tables."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torchrec.distributed.planner import Topology

TABLES_SHARE = 0.8  # of a host's memory; the rest is the dense part's, the data's and Ray's
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of cgroups v2 and v1
_USAGES = ("memory.current", "memory/memory.usage_in_bytes")


@dataclass(frozen=True)
class Place:
    """Where a rank runs. ``host``: its name; ``memory``: bytes of the host, for all its ranks; ``device_memory``:
    bytes of the rank's GPU, 0 without one."""

    host: str
    memory: int
    device_memory: int


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the processes of this host, or of this container, can have."""
    limits = [int(psutil.virtual_memory().total)]
    for name in _LIMITS:
        try:
            limits.append(int((cgroup / name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process of this host, or of this container, can still have; pages of files count as free, for the
    kernel gives them back."""
    free = [int(psutil.virtual_memory().available)]
    for limit, usage in zip(_LIMITS, _USAGES, strict=True):
        try:
            used = int((cgroup / usage).read_text())
            lines = (cgroup / usage).with_name("memory.stat").read_text().splitlines()
            stat = {name: int(value) for name, value in map(str.split, lines)}
            # of cgroups v1, those without "total_" leave a container's own groups out
            files = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))
            free.append(int((cgroup / limit).read_text()) - used + files)
        except (OSError, ValueError):
            continue
    return max(min(free), 0)


def places(device: torch.device) -> list[Place]:
    """The place of every rank, the same list on all of them (collective)."""
    on_gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    found: list[Place | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, Place(socket.gethostname(), host_memory(), on_gpu))
    return [place for place in found if place is not None]


def topology(ranks: Sequence[Place], device_type: str) -> Topology:
    """The planner's view of the ranks: each has the memory of the poorest one, its GPU's and an equal part of
    TABLES_SHARE of its host's. (Given each rank's own, the planner cuts a table's rows in proportion, but the lookup
    deals ids to blocks of equal size, and most of them would meet another row.) Hosts of unequally many ranks, or
    whose ranks do not follow each other, are planned for as hosts of one rank each: the planner knows equal ones
    alone."""
    on_host = Counter(place.host for place in ranks)
    runs = [len(list(run)) for _, run in groupby(place.host for place in ranks)]
    return Topology(
        world_size=len(ranks),
        local_world_size=runs[0] if len(runs) == len(on_host) and len(set(runs)) == 1 else 1,
        compute_device=device_type,
        hbm_cap=min(place.device_memory for place in ranks),
        ddr_cap=min(int(TABLES_SHARE * place.memory) // on_host[place.host] for place in ranks),
    )


def describe(ranks: Sequence[Place]) -> str:
    """The ranks and what tables can have, in words."""
    hosts = len({place.host for place in ranks})
    least = min(place.memory for place in ranks) * TABLES_SHARE / 2**30
    text = f"{len(ranks)} workers on {hosts} host{'s' if hosts > 1 else ''} with {least:,.1f} GiB for tables each"
    on_gpu = min(place.device_memory for place in ranks) / 2**30
    return f"{text}, {on_gpu:,.1f} GiB on a GPU" if on_gpu else text
