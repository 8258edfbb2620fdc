"""Ranks of a test as processes that have imported torch already: fresh ones take eight seconds of a core each to
import it, most of what such a test would cost."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

# read by the server when it starts, with the first ranks; it only imports, so that it may be forked
multiprocessing.set_forkserver_preload(["torch", "torchrec", "roo_ray.training.worker"])


def start_ranks(function: Callable[..., None], args: tuple[Any, ...], world: int) -> None:
    """Runs ``function(rank, *args)`` in ``world`` processes and waits for them. Their environment is that of the first
    call. Raises as ``torch.multiprocessing.spawn`` does where one fails; the others are then ended."""
    mp.start_processes(function, args=args, nprocs=world, start_method="forkserver")
