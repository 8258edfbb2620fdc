"""The many small tensors of a checkpoint as a few large ones.

torch's writer puts each tensor into an archive of its own, at a millisecond of CPU whatever its size, and a model has
hundreds of small ones (weights, biases, and two moments of each). What is not sharded is laid end to end, one tensor
per part of the state, device and dtype; an index says what lies where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from roo_ray.errors import DataError

PACKED = "packed"  # where the large tensors lie beside "model" and "optimizer"
Index = dict[str, list[tuple[str, list[int]]]]  # large tensor -> (name, shape) of what lies in it, in order


class ShapeError(DataError):
    """A tensor has another shape in the checkpoint."""


def pack(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor], Index]:
    """(what is not packed, nested as it was; the large tensors, in host memory and of memory of their own; their
    index). The same on all ranks, for what is not sharded is."""
    rest: dict[str, Any] = {}
    parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for path, value in leaves(tensors):
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            key = f"{path[0]}.{value.device.type}.{value.dtype}".replace("torch.", "")
            parts.setdefault(key, []).append((".".join(path), value.detach()))
        else:
            _put(rest, path, value)
    large = {key: torch.cat([value.reshape(-1) for _, value in values]).cpu() for key, values in parts.items()}
    index = {key: [(name, list(value.shape)) for name, value in values] for key, values in parts.items()}
    return rest, large, index


def unpacked(tensors: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """What of ``tensors`` is to be read by itself, and under ``PACKED`` room for the large tensors that hold the
    rest. Raises DataError for an index that names no dtype."""
    held = {name for values in index.values() for name, _ in values}
    room: dict[str, Any] = {}
    wanted: set[str] = set()
    for path, value in leaves(tensors):
        name = ".".join(path)
        if name in held:
            wanted.add(name)
        else:
            _put(room, path, value)
    large = {
        key: torch.empty(sum(torch.Size(shape).numel() for _, shape in values), dtype=_dtype(key))
        for key, values in index.items()
        if wanted.intersection(name for name, _ in values)
    }
    return room | ({PACKED: large} if large else {})


def unpack(tensors: Mapping[str, Any], large: Mapping[str, torch.Tensor], index: Index) -> None:
    """Copies out of the large tensors into ``tensors``, in place; into a sharded one what this rank has of it. Raises
    ShapeError where a shape is another."""
    named = {".".join(path): value for path, value in leaves(tensors)}
    for key, values in index.items():
        if key not in large:
            continue
        sizes = [torch.Size(shape).numel() for _, shape in values]
        for (name, shape), flat in zip(values, large[key].split(sizes), strict=True):
            target = named.get(name)
            if target is None:
                continue
            shapes = [list(target.size()), shape]
            if shapes[0] != shapes[1]:
                raise ShapeError(f"{name} is of shape {shapes[0]} here and of shape {shapes[1]} in the checkpoint")
            for whole, part in _local(target, flat.view(shape)):
                part.copy_(whole)


def _local(target: torch.Tensor | ShardedTensor, value: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(part of ``value``, the memory it belongs to) of what this rank has of ``target``."""
    if not isinstance(target, ShardedTensor):
        return [(value, target.detach())]
    found = []
    for shard in target.local_shards():
        part = value
        places = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        for dimension, (begin, size) in enumerate(places):
            part = part.narrow(dimension, begin, size)
        found.append((part, shard.tensor.detach()))
    return found


def _dtype(key: str) -> torch.dtype:
    found = getattr(torch, key.rpartition(".")[2], None)
    if not isinstance(found, torch.dtype):
        raise DataError(f"the checkpoint's index has '{key}', which names no dtype; it is damaged or not ours")
    return found


def leaves(tensors: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, tensor) of nested tensors."""
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _put(tensors: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tensors = tensors.setdefault(name, {})
    tensors[path[-1]] = value
