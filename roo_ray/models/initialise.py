"""Initial embedding weights as a pure function of (seed, table, row, column): whatever the world size, the
sharding plan and the device, a table starts the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.shards_wrapper import LocalShardsWrapper

_COLLECTIONS = (
    EmbeddingCollection,
    EmbeddingBagCollection,
    ShardedEmbeddingCollection,
    ShardedEmbeddingBagCollection,
)
_CHUNK = 1 << 22  # weights made at once: 32 MB per int64 temporary


def as_int64(value: int) -> int:
    """A 64-bit pattern as a signed integer."""
    return value - (1 << 64) if value >= 1 << 63 else value


def mix64(state: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (products wrap around; shifts are made logical by masks)."""
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * as_int64(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * as_int64(0x94D049BB133111EB)
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def table_weights(
    seed: int, table: str, first_row: int, rows: int, first_column: int, columns: int, device: torch.device
) -> Tensor:
    """A block of a table's initial weights: (rows, columns) float32, uniform in [-1, 1)."""
    return _weights_of(seed, table, torch.arange(first_row, first_row + rows, device=device), first_column, columns)


def _weights_of(seed: int, table: str, rows: Tensor, first_column: int, columns: int) -> Tensor:
    """Initial weights of the rows (R,) int64: (R, columns)."""
    digest = hashlib.sha256(f"{seed}/{table}".encode()).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    column = torch.arange(first_column, first_column + columns, device=rows.device)  # (columns,)
    mixed = mix64(mix64(rows.unsqueeze(1) + key) + column * as_int64(0x9E3779B97F4A7C15))  # (R, columns)
    return ((mixed >> 40) & 0xFFFFFF).float() * 2.0**-23 - 1.0  # 24 bits are exact in float32


def table_scale(dim: int) -> float:
    """Initial weights are uniform in [-s, s) with s = dim ** -0.5: an embedding's norm is about 0.58."""
    return float(dim**-0.5)


def _blocks(weight: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """(local tensor, its first row, its first column) of the parts of a table, or of an optimizer's state of it, that
    this rank holds."""
    if isinstance(weight, ShardedTensor):
        for shard in weight.local_shards():
            row, *columns = shard.metadata.shard_offsets
            yield shard.tensor, row, columns[0] if columns else 0
    elif isinstance(weight, DTensor):
        local = weight.to_local()
        assert isinstance(local, LocalShardsWrapper)
        # not strict: a rank without a shard has no tensor, yet an offset
        for tensor, (row, *columns) in zip(local.local_shards(), local.local_offsets(), strict=False):
            yield tensor, row, columns[0] if columns else 0
    else:
        yield weight, 0, 0


def _dim(weight: Tensor) -> int:
    # a ShardedTensor's own ``shape`` warns of its deprecation
    return int(weight.metadata().size[1] if isinstance(weight, ShardedTensor) else weight.shape[1])


@torch.no_grad()
def initialise_tables(module: nn.Module, seed: int) -> None:
    """Sets all TorchRec embedding tables within ``module``, sharded or not, in place: uniform in [-s, s) with s
    of ``table_scale``. Each rank sets the parts that it holds; nothing is communicated."""
    for collection in module.modules():
        if not isinstance(collection, _COLLECTIONS):
            continue
        for name, weight in collection.state_dict().items():
            table = name.split(".")[1]  # embeddings.<table>.weight or embedding_bags.<table>.weight
            for tensor, first_row, first_column in _blocks(weight):
                _fill(tensor, seed, table, first_row, first_column, table_scale(_dim(weight)))


@torch.no_grad()
def begin_rows_anew(
    lookup: nn.Module, seed: int, table: str, rows: Tensor, optimizer_state: Mapping[str, Any] | None = None
) -> None:
    """Sets rows (R,) int64 of a table of ``lookup``, the model's ``sparse``, sharded or not, to their initial weights,
    in place, and to 0 what ``optimizer_state`` (parameter of the model -> its tensors) has of them. Each rank sets the
    parts that it holds."""
    for collection in lookup.modules():
        if not isinstance(collection, _COLLECTIONS):
            continue
        for name, weight in collection.state_dict().items():
            if name.split(".")[1] == table:
                parts = list(_blocks(weight))
                scale = table_scale(_dim(weight))
                for tensor, first_row, first_column in parts:
                    for own in _within(rows, first_row, tensor).split(max(1, _CHUNK // tensor.shape[1])):
                        block = _weights_of(seed, table, own + first_row, first_column, tensor.shape[1])
                        tensor[own] = (block * scale).to(tensor.dtype)
                _forget(optimizer_state or {}, table, rows, parts)


def _forget(optimizer_state: Mapping[str, Any], table: str, rows: Tensor, parts: list[tuple[Tensor, int, int]]) -> None:
    """``parts``: of the table's weights, as ``_blocks`` has them. Those of the state are in their order, and their own
    offsets are not rows where an accumulator per row and column shard is one long vector."""
    for name, state in optimizer_state.items():
        if not (name.startswith("sparse.") and name.split(".")[-2:] == [table, "weight"]):
            continue
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                for (tensor, _, _), (weight, first_row, _) in zip(_blocks(value), parts, strict=True):
                    tensor[_within(rows, first_row, weight)] = 0


def _within(rows: Tensor, first: int, tensor: Tensor) -> Tensor:
    """The rows of a table that lie in a part of it, counted from the part's first."""
    return rows[(rows >= first) & (rows < first + tensor.shape[0])] - first


def _fill(tensor: Tensor, seed: int, table: str, first_row: int, first_column: int, scale: float) -> None:
    rows, columns = tensor.shape
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = table_weights(
            seed, table, first_row + start, count, first_column, columns, tensor.device
        )  # (count, columns)
        tensor[start : start + count] = (block * scale).to(tensor.dtype)
