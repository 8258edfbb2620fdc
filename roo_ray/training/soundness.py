"""Whether a model's state is one to go on from: an update whose gradients overflow leaves NaN behind a finite loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from roo_ray.errors import TrainingDiverged
from roo_ray.training.packing import Index, leaves


def infinite_by_nature(tensors: Mapping[str, Any], buffers: Iterator[torch.Tensor]) -> set[str]:
    """The names in ``tensors`` (``checkpoint.tensors_of``) in which an infinity is no damage: buffers (a mask, a
    running minimum) and moments of an optimizer."""
    places = {buffer.data_ptr() for buffer in buffers}
    return {
        ".".join(path)
        for path, value in leaves(tensors)
        if path[0] != "model" or (not isinstance(value, ShardedTensor) and value.data_ptr() in places)
    }


def unsound(
    tensors: Mapping[str, Any], large: Mapping[str, torch.Tensor], index: Index, excused: set[str]
) -> Iterator[str]:
    """The names of tensors with a NaN, or with an infinity where it is not ``excused``. Of a sharded one this rank's
    part is looked at. ``tensors``, ``large``, ``index``: of ``packing.pack``. One pass over memory, without a copy."""
    for path, value in leaves(tensors):
        parts = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        name = ".".join(path)
        if any(_is_unsound(part, name in excused) for part in parts):
            yield name
    for key, flat in large.items():
        if _is_unsound(flat, excused=False):  # rare: whose is it?
            sizes = [torch.Size(shape).numel() for _, shape in index[key]]
            for (name, _), part in zip(index[key], flat.split(sizes), strict=True):
                if _is_unsound(part, name in excused):
                    yield name


def _is_unsound(value: Any, excused: bool) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return False
    ends = torch.stack(torch.aminmax(value.detach()))  # NaN where there is one
    return bool(ends.isnan().any() if excused else ~ends.isfinite().all())


def overflowed(name: str, found: str | None, before: str | None) -> TrainingDiverged:
    """The error for a checkpoint that was not written: ``found`` is not finite, ``before`` stays the last."""
    return TrainingDiverged(
        f"the state for checkpoint {name} is not finite (NaN or infinite; {found}): an update whose loss was finite "
        f"has overflowed, and no later step mends that. It was not written; the checkpoint before it "
        f"({before or 'there is none'}) stays the last. Lower the learning rates, or look at features with very large "
        "values"
    )
