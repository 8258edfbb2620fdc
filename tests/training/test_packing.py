"""Many tensors as a few: packed and unpacked they are the same, also into sharded ones; misfits are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

from roo_ray.errors import DataError
from roo_ray.training.packing import PACKED, ShapeError, pack, unpack, unpacked
from tests.training.ranks import run_ranks

shapes = st.lists(st.integers(0, 3), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool])


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Nested tensors of any dtype and shape, scalars and empty ones among them."""

    def some() -> dict[str, torch.Tensor]:
        names = draw(st.lists(st.sampled_from(["a", "b.weight", "b.bias", "c"]), unique=True))
        return {name: (8 * torch.rand(draw(shapes))).to(draw(dtypes)) for name in names}

    return {"model": some(), "optimizer": {"x": some(), "y.z": some()}}


def flat(tensors: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Path -> tensor."""
    found = {}
    for name, value in tensors.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


@settings(max_examples=60, deadline=None)
@given(states())
def test_what_is_packed_comes_back(state: dict[str, Any]) -> None:
    rest, large, index = pack(state)
    assert not flat(rest)
    assert len(large) <= 10  # five dtypes of model and optimizer
    before = flat(state)
    target = {path: torch.zeros_like(value) for path, value in before.items()}
    nested = {
        "model": {name: target[f"model/{name}"] for name in state["model"]},
        "optimizer": {x: {n: target[f"optimizer/{x}/{n}"] for n in of} for x, of in state["optimizer"].items()},
    }
    index = json.loads(json.dumps(index))
    room = unpacked(nested, index)
    assert {name: value.shape for name, value in room.get(PACKED, {}).items()} == {
        name: value.shape for name, value in large.items()
    }
    for value in before.values():
        value.zero_()  # what was packed has memory of its own
    copies = {path: value.clone() for path, value in before.items()}
    unpack(nested, large, index)
    again = pack(nested)[1]
    assert again.keys() == large.keys()
    for name, value in large.items():
        assert torch.equal(again[name], value)
    assert all(torch.equal(copies[path], before[path]) for path in before)


def test_a_tensor_that_is_not_in_the_index_is_read_by_itself() -> None:
    _, _, index = pack({"model": {"a": torch.ones(2)}})
    room = unpacked({"model": {"a": torch.zeros(2), "new": torch.zeros(3)}}, index)
    assert room["model"].keys() == {"new"}
    assert unpacked({"model": {"new": torch.zeros(3)}}, index).keys() == {"model"}  # nothing of it is needed


def test_another_shape_and_a_damaged_index_are_refused() -> None:
    _, large, index = pack({"model": {"a": torch.ones(2, 3)}})
    with pytest.raises(ShapeError, match=r"model\.a is of shape \[6\] here and of shape \[2, 3\] in the checkpoint"):
        unpack({"model": {"a": torch.zeros(6)}}, large, index)
    with pytest.raises(DataError, match="names no dtype"):
        unpacked({"model": {"a": torch.zeros(6)}}, {"model.cpu.load": index["model.cpu.float32"]})


def _unpack_into_shards(rank: int, world: int) -> torch.Tensor:
    table = torch.arange(15.0).view(5, 3)
    _, large, index = pack({"model": {"bias": torch.ones(2), "table": table}})
    begin, end = (0, 3) if rank == 0 else (3, 5)
    shard = Shard.from_tensor_and_offsets(torch.zeros(end - begin, 3), [begin, 0], rank)
    target = {"model": {"bias": torch.zeros(2), "table": init_from_local_shards([shard], 5, 3)}}
    room = unpacked(target, index)
    unpack(target, large, index)
    assert room.keys() == {PACKED}
    assert torch.equal(target["model"]["bias"], torch.ones(2))
    return shard.tensor


def test_each_rank_takes_its_part_into_a_sharded_tensor() -> None:
    parts = run_ranks(2, _unpack_into_shards)
    assert torch.equal(torch.cat(parts), torch.arange(15.0).view(5, 3))
