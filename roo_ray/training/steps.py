"""The steps of a pass over the training data: forward, agreement, backward and update, timed.

Every step's batch is scored, then the ranks agree (``agreement``), then the loss is weighted by what they agreed on.
A batch whose loss is not finite on some rank is left out on all of them, or ends the run, before any update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from roo_ray.errors import TrainingDiverged
from roo_ray.ingest.batch import RequestBatch
from roo_ray.ingest.stream import Step
from roo_ray.models.losses import ranking_loss, task_loss_sums
from roo_ray.models.objective import item_rows, logits_of, retrieval_towers
from roo_ray.models.retrieval import retrieval_loss
from roo_ray.schema import Schema
from roo_ray.training.agreement import Agreement, Flags, agree, lanes_alive
from roo_ray.training.clock import TrainingClock
from roo_ray.training.ids import meet_ids
from roo_ray.training.requests_of import requests_by_rank
from roo_ray.training.sharding import ShardedModel
from roo_ray.training.timing import StepTimes


@dataclass(frozen=True)
class Trained:
    """A step that was taken. ``logits`` (B_NRO, K), detached, from before the update; ``loss``: this rank's share of
    the global batch's. Both None where the batch was left out (``skipped``)."""

    step: Step
    agreement: Agreement
    logits: Tensor | None
    loss: Tensor | None

    @property
    def skipped(self) -> bool:
        """The batch was left out on all ranks."""
        return self.loss is None


@dataclass
class Trainer:
    """Takes steps. ``task_weights`` (K,); ``exploded``: train on the impression-level form; ``skips``: leave a batch
    out where its loss is not finite; ``says``: the flags of this rank but ``not_finite``; ``clock``: when training
    ends; ``names``: the request ids of this rank's batch of a step, for an error; ``begins``: called when the first
    batch is there, from which on time counts."""

    model: ShardedModel
    schema: Schema
    seed: int
    task_weights: Tensor
    rank: int
    world: int
    exploded: bool
    skips: bool
    says: Callable[[int], Flags]
    clock: TrainingClock
    names: Callable[[Step], list[str]]
    begins: Callable[[], None] = lambda: None
    times: StepTimes = field(init=False)
    left: Step = field(init=False)

    def steps(
        self, steps: Iterator[Step], device: torch.device, times: StepTimes, ends_below: int = 1
    ) -> Iterator[Trained]:
        """Trains on every step until fewer than ``ends_below`` lanes have data, on all ranks at once (collective).
        What is left is then in ``self.left``. ``times`` gets a lap for each part, and may be exchanged by setting
        ``self.times``. Raises TrainingDiverged on all ranks."""
        self.times = times
        self.left = coming = replace(next(steps), wait_seconds=0.0)  # the start is nobody's wait
        self.clock.begin()
        self.begins()
        alive = lanes_alive(coming.lanes_alive, device)
        self.times.start()
        taken = 0
        while alive and alive >= ends_below:
            step = coming
            self.times.lap("other")
            batch = step.batch.explode() if self.exploded else step.batch
            meet_ids(self.model, self.schema, batch, self.seed)
            buffers = self._buffers() if self.skips else []
            outputs = self.model.module(batch)
            logits = logits_of(self.model.module, outputs, len(self.task_weights))
            loss, finite = self._local(outputs, logits, batch)
            self.times.lap("forward")
            self.left = coming = next(steps)
            self.times.lap("data_wait")
            taken += 1
            said = self.says(taken)
            flags = Flags(not finite, said.evicted, said.stop, said.checkpoint, said.written)
            known = batch.weights.double().sum(0)
            agreement = agree(known, step.counts["cost"], self.clock.lanes(coming), flags, self.rank, self.world)
            self.times.lap("communication")
            alive = agreement.lanes_to_come
            if agreement.any("not_finite"):
                self._not_finite(step, finite)
                for buffer, value in buffers:
                    buffer.copy_(value)
                self.times.steps += 1
                yield Trained(step, agreement, None, None)
                continue
            if loss is None:
                weights = agreement.weights
                loss = ranking_loss(outputs, batch.labels, batch.weights, self.task_weights, weights, self.world)
            self.model.optimizer.zero_grad()
            loss.backward()
            self.times.lap("backward")
            self.model.optimizer.step()
            self.times.lap("optimizer")
            self.times.steps += 1
            yield Trained(step, agreement, logits.detach(), loss.detach() / self.world)

    def _local(self, outputs: Tensor, logits: Tensor, batch: RequestBatch) -> tuple[Tensor | None, bool]:
        """(retrieval's loss, None of a ranking model; whether this rank's loss is finite)."""
        towers = retrieval_towers(self.model.module)
        if towers is not None:
            rows = item_rows(self.model.module, towers, batch)
            loss = retrieval_loss(towers, outputs, batch, self.world, rows)
            # one rank's vectors are the others' negatives: all losses may be NaN, and its own vectors tell whose
            return loss, bool(torch.isfinite(outputs).all() & torch.isfinite(loss.detach()))
        sums = task_loss_sums(logits.detach(), batch.labels, batch.weights)
        return None, bool(torch.isfinite(sums).all() & ~logits.detach().isnan().any())

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """What a forward changes beside the outputs (running statistics, item counts), with copies."""
        buffers = self.model.module.named_buffers()
        return [(buffer, buffer.clone()) for name, buffer in buffers if not name.startswith("sparse.managed.")]

    def _not_finite(self, step: Step, finite: bool) -> None:
        if self.skips:
            return
        ours = [] if finite or not step.lanes_alive else self.names(step)
        every: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(every, ours)
        raise TrainingDiverged(name_requests(every))


def name_requests(every: list[list[str]]) -> str:
    """The message for the request ids of each rank whose loss is not finite."""
    return (
        "the loss is not finite (NaN or infinite), and nothing was updated with it; requests of the batch, by rank: "
        f"{requests_by_rank(every)}. Look at their features, lower the learning rates, or set "
        "training.on_nan=skip to leave such batches out"
    )
