"""Rows sent to the rank that is to work on them: what exact metrics over ranks are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of the group; 1 where torch.distributed does not run."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def wire_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where tensors must lie to be sent."""
    nccl = dist.is_initialized() and dist.get_backend(group) == "nccl"
    return torch.device("cuda" if nccl else "cpu")


def summed(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of ``values`` over ranks, on their device (collective); ``values`` are not changed."""
    if world_size(group) == 1:
        return values
    total = values.to(wire_device(group), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(values.device)


def exchange_rows(
    columns: Sequence[Tensor], destination: Tensor, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Sends row i of every column (N, ...) to rank ``destination[i]``, (N,) int64 -> the columns of the rows that
    this rank received, by sending rank and in order (collective)."""
    ranks = world_size(group)
    if ranks == 1:
        return list(columns)
    device = wire_device(group)
    order = destination.argsort(stable=True)
    sent = torch.bincount(destination, minlength=ranks).to(device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    outgoing, incoming = sent.tolist(), received.tolist()
    result = []
    for column in columns:
        rows = column[order].to(device).contiguous()
        out = rows.new_empty((sum(incoming), *rows.shape[1:]))
        dist.all_to_all_single(out, rows, incoming, outgoing, group=group)
        result.append(out.to(column.device))
    return result
