"""What all ranks agree on in a step, by one small all-reduce between forward and backward.

Whatever one rank alone knows and all must act on travels in it: that its data ends, that its loss is not finite,
that it was told to leave, that a checkpoint is due or its writing has ended. So no rank ever waits for one that has
gone another way, and a batch can be left out before the embeddings' fused update, which cannot be undone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

FLAGS = ("not_finite", "evicted", "stop", "checkpoint", "written")


@dataclass(frozen=True)
class Flags:
    """What this rank says. ``not_finite``: its loss or logits; ``evicted``: it got SIGTERM; ``stop``: the job did;
    ``checkpoint``: one is due; ``written``: the one that was being written has ended, well or not."""

    not_finite: bool = False
    evicted: bool = False
    stop: bool = False
    checkpoint: bool = False
    written: bool = False


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step before its backward. ``weights`` (K,) float32 on the device: known labels per
    task in the global batch; ``balance``: mean over ranks of the step's cost, over the largest; ``lanes_to_come``:
    lanes with data for the step after it. ``ranks``: of each flag, how many ranks say so."""

    weights: torch.Tensor
    balance: float
    lanes_to_come: int
    ranks: dict[str, int] = field(default_factory=dict)

    def any(self, flag: str) -> bool:
        """Whether some rank says so."""
        return self.ranks[flag] > 0


def agree(weights: torch.Tensor, cost: float, lanes_to_come: int, flags: Flags, rank: int, world: int) -> Agreement:
    """The step's agreement (collective, one all-reduce). ``weights`` (K,): this rank's known labels per task, on the
    device; ``cost``: of its batch, by the model; ``lanes_to_come``: of its lanes, those with data for the next
    step."""
    tasks = weights.shape[0]
    costs = [0.0] * world
    costs[rank] = cost
    ours = torch.tensor([float(lanes_to_come), *(float(getattr(flags, name)) for name in FLAGS), *costs])
    agreed = torch.cat([weights.double(), ours.double().to(weights.device)])
    dist.all_reduce(agreed)
    coming, *rest = agreed[tasks:].tolist()  # waits for the device
    said, all_costs = rest[: len(FLAGS)], rest[len(FLAGS) :]
    largest = max(all_costs)
    return Agreement(
        weights=agreed[:tasks].float(),
        balance=sum(all_costs) / world / largest if largest else 1.0,
        lanes_to_come=int(coming),
        ranks={name: int(count) for name, count in zip(FLAGS, said, strict=True)},
    )


def lanes_alive(lanes: int, device: torch.device) -> int:
    """Over all ranks, the lanes that have data for the first step of a pass (collective)."""
    return agree_to_go_on(lanes, Flags(), device)[0]


def agree_to_go_on(lanes: int, flags: Flags, device: torch.device) -> tuple[int, Flags]:
    """Over all ranks, of a step without an update (collective): the lanes that have data for it, and of
    ``not_finite`` (in the step before), ``evicted`` and ``stop`` whether some rank says so."""
    total = torch.tensor([lanes, flags.not_finite, flags.evicted, flags.stop], device=device)
    dist.all_reduce(total)
    alive, not_finite, evicted, stop = total.tolist()
    return int(alive), Flags(not_finite > 0, evicted > 0, stop > 0)
