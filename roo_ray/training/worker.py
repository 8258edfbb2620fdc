"""What every rank does: build the sharded model, then per epoch train, evaluate on held-out data, checkpoint.

All ranks take the same steps: one small all-reduce before each step carries the weights that the loss is
normalised by and the number of lanes that still have data; zero ends the pass on all ranks at once. A rank
without data takes part with a weightless dummy request.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from roo_ray.config import Config
from roo_ray.errors import ConfigError
from roo_ray.ingest.device import on_device
from roo_ray.ingest.plan import Position, differences
from roo_ray.ingest.stream import RankStream, Step, StreamSettings, shared_feed
from roo_ray.metrics.collection import RankingMetrics, WindowAndLifetime
from roo_ray.metrics.curves import CURVES_FILE, curves_of
from roo_ray.metrics.held_out import HeldOutScores
from roo_ray.models.cost import training_megaflops
from roo_ray.models.item_index import RetrievalEvaluation
from roo_ray.models.keyed_random import set_epoch
from roo_ray.models.objective import logits_of, retrieval_towers, training_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.review.system import system_metrics
from roo_ray.training import checkpoint
from roo_ray.training.clock import TrainingClock
from roo_ray.training.job import WorkerJob
from roo_ray.training.order import OrderStats
from roo_ray.training.sharding import ShardedModel, describe_plan, shard
from roo_ray.training.throughput import Throughput
from roo_ray.training.tracking import RunHandle, RunLogger

SECONDS_BETWEEN_LINES = 5.0


def build_model(config: Config, job: WorkerJob, device: torch.device) -> ShardedModel:
    """The sharded model with its initial weights, a function of the seed alone."""
    torch.use_deterministic_algorithms(config.training.deterministic)
    torch.manual_seed(config.training.seed)
    autocast = config.training.autocast == "bf16"
    model = RankingModel(config.request_schema, config.model, torch.device("meta"), autocast)
    model.dense.to(device)
    return shard(
        model,
        config.training,
        device,
        batch_requests=max(1, round(job.requests_per_step / dist.get_world_size())),
        ids_per_request=job.ids_per_request,
        embeddings=config.model.embeddings,
    )


@dataclass
class Agreement:
    """What all ranks know of a step before it is taken. ``weights`` (K,) float32: known labels per task in the
    global batch; ``lanes_alive``: lanes that still had data; ``balance``: mean over ranks of the step's cost, over
    the largest."""

    weights: torch.Tensor
    lanes_alive: int
    balance: float


@dataclass
class Trained:
    """What an epoch has trained on so far. ``before``: over all ranks, until this worker group began: requests,
    impressions, sum of the request keys modulo 2^64; the rest: this rank since then."""

    before: tuple[int, int, int]
    requests: int = 0
    impressions: int = 0
    keys: torch.Tensor | None = None

    @staticmethod
    def since(before: dict[str, int]) -> Trained:
        """Goes on from what a checkpoint says."""
        return Trained((before.get("requests", 0), before.get("impressions", 0), before.get("keys", 0)))

    def add(self, step: Step) -> None:
        """Counts a step of this rank."""
        if step.lanes_alive:
            self.requests += step.requests
            self.impressions += step.impressions
            keys = step.batch.request_key.sum()  # stays on the device
            self.keys = keys if self.keys is None else self.keys + keys

    def over_ranks(self, device: torch.device) -> dict[str, int]:
        """The sums over all ranks (collective)."""
        keys = 0 if self.keys is None else int(self.keys)
        total = torch.tensor([self.requests, self.impressions, keys], device=device)
        dist.all_reduce(total)
        sums = [(b + t) % 2**64 for b, t in zip(self.before, total.tolist(), strict=True)]
        return dict(zip(("requests", "impressions", "keys"), sums, strict=True))


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


class Worker:
    """One rank of a job; see the module's docstring."""

    def __init__(self, job: WorkerJob) -> None:
        self.job = job
        self.config = job.config
        self.schema = job.config.request_schema
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.training.threads_per_worker)
        self.model = build_model(self.config, job, self.device)
        self.task_weights = torch.tensor([x.weight for x in self.schema.labels], device=self.device)
        self.logger = RunLogger(job.run if self.rank == 0 else RunHandle(None))
        self.epochs_done, self.steps_done = 0, 0
        self.position: Position | None = None  # where the epoch in progress goes on, after a restart
        self.trained = Trained.since({})
        self.cost = training_megaflops(self.schema, self.config.model)
        self.progressive = WindowAndLifetime([label.name for label in self.schema.labels])
        self.clock = TrainingClock(self.config.training.max_seconds)

    # ---- one pass ------------------------------------------------------------------------------------

    def steps(self, stream: RankStream, epoch: int) -> Iterator[tuple[Step, Agreement]]:
        """The steps of a pass, each with what the ranks agreed on; ends on all ranks at once."""
        steps = on_device(stream.epoch(epoch), self.device)
        tasks, settings = len(self.schema.labels), stream.settings
        for step in steps:
            known = step.batch.weights.double().sum(0)  # (K,)
            ours = torch.zeros(1 + self.world, dtype=torch.float64)  # lanes alive, and the cost of each rank
            ours[0], ours[1 + self.rank] = self.clock.lanes(step, stream.settings.side), step.counts["cost"]
            agreed = torch.cat([known, ours.to(self.device)])
            dist.all_reduce(agreed)
            weights = agreed[:tasks].float()
            alive, *costs = agreed[tasks:].tolist()
            ends_early = settings.ingest.drop_last and settings.side == "train" and alive < settings.ingest.lanes
            if ends_early and alive:
                self.count_dropped(step, steps, epoch)
            if ends_early or not alive:
                return
            largest = max(costs)
            yield step, Agreement(weights, int(alive), sum(costs) / self.world / largest if largest else 1.0)

    def count_dropped(self, step: Step, steps: Iterator[Step], epoch: int) -> None:
        """Reads to the end of an epoch that ``drop_last`` has ended, and says what was dropped (collective)."""
        dropped = 0
        while step.lanes_alive:
            dropped += step.requests
            step = next(steps)
        total = torch.tensor([dropped], device=self.device)
        dist.all_reduce(total)
        self.logger.metrics({"epoch/dropped_requests": float(total)}, self.steps_done)
        self.say(f"epoch {epoch + 1}: ingest.drop_last drops the last {int(total):,} requests")

    def stream(self, side: Literal["train", "evaluation"]) -> RankStream:
        """This rank's batches (collective): ``train`` over the remaining epochs, ``evaluation`` in stored order.

        The evaluation between epochs reads in a thread: a second Ray Data pipeline would take the CPUs of the
        training pipeline, which is reading the next epoch ahead, and cost its start-up each time.
        """
        training = side == "train"
        ingest = self.config.ingest
        if not training and self.job.mode == "train":
            ingest = ingest.model_copy(update={"reader": "thread"})
        settings = StreamSettings(
            data_set=self.config.requests,
            version=self.job.data_version,
            schema=self.schema,
            ingest=ingest,
            holdout=self.config.holdout,
            side=side,
            seed=self.config.training.seed,
            epochs=tuple(range(self.epochs_done, self.config.training.epochs)) if training else (0,),
            mode=ingest.mode if training else "sequential",
            start=self.position if training else None,
            cost=self.cost,
        )
        feed = [shared_feed(settings, self.world) if self.rank == 0 else None]
        dist.broadcast_object_list(feed, src=0, device=self.device)
        return RankStream(settings, self.rank, self.world, feed[0])

    def evaluate(self, stream: RankStream) -> dict[str, float]:
        """Metrics of the held-out data over all ranks."""
        metrics = RankingMetrics([label.name for label in self.schema.labels])
        oracle = RankingMetrics([label.name for label in self.schema.labels])
        scored = HeldOutScores(metrics.tasks, self.config.evaluation.exact_rows)
        towers = retrieval_towers(self.model.module)
        retrieval = None if towers is None else RetrievalEvaluation(towers)
        throughput = Throughput()
        last_line = time.perf_counter()
        self.model.module.eval()
        with torch.no_grad():
            for step, _ in self.steps(stream, 0):
                batch = step.batch
                outputs = self.model.module(batch)
                logits = logits_of(self.model.module, outputs, len(self.schema.labels))
                if retrieval is not None:
                    retrieval.update(outputs, batch)
                metrics.update(logits, batch.labels, batch.weights, batch.num_impressions)
                scored.add(batch, logits)
                oracle.update_probabilities(batch.oracle, batch.labels, batch.weights, batch.num_impressions)
                throughput.add(step.requests, step.impressions, step.wait_seconds)
                if time.perf_counter() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.perf_counter()
                    self.say(f"evaluating: rank 0 has scored {throughput.requests:,} requests")
        self.model.module.train()
        merged = metrics.merge()
        values = {f"eval/{name}": value for name, value in merged.compute().items()} | scored.result()
        scored.write(self.config.evaluation.scores, self.rank)
        self.logger.json(curves_of(merged), CURVES_FILE)
        if retrieval is not None:
            values |= {f"eval/{name}": value for name, value in retrieval.result().items()}
        for name, value in oracle.merge().compute().items():
            task, metric = name.split("/")
            if metric in ("ne", "auc") and math.isfinite(value):  # NaN without an oracle: there is no such figure
                values[f"eval/{task}/bayes_{metric}"] = value
        values |= throughput.over_ranks(self.device, "eval")
        task = self.schema.labels[0].name
        self.say(
            f"held out: {values['eval/requests']:,.0f} requests  {task} NE {values[f'eval/{task}/ne']:.4f}  "
            f"AUC {values[f'eval/{task}/auc']:.4f}  GAUC {values[f'eval/{task}/gauc']:.4f}"
        )
        return values

    # ---- training ------------------------------------------------------------------------------------

    def train_epoch(self, stream: RankStream, epoch: int) -> dict[str, float]:
        """Trains one epoch, or the rest of it; returns its throughput over all ranks, and what it trained on in
        all."""
        losses: list[torch.Tensor] = []
        set_epoch(self.model.module, self.config.training.seed, epoch)
        epoch_throughput, window_throughput, order = Throughput(), Throughput(), OrderStats()
        every = self.config.training.checkpoint_every_steps
        for step, agreement in self.steps(stream, epoch):
            batch = step.batch
            num_impressions, split = batch.num_impressions, batch.split  # of the requests, also where exploded next
            if self.config.training.form == "impression":
                batch = batch.explode()
            logits, loss = training_loss(
                self.model.module, batch, self.task_weights, agreement.weights, self.world
            )  # (B_NRO, K), scalar
            # progressive validation: the batch is scored before it is trained on
            self.progressive.window.update(logits.detach(), batch.labels, batch.weights, num_impressions, split)
            self.model.optimizer.zero_grad()
            loss.backward()
            self.model.optimizer.step()
            self.steps_done += 1
            losses.append(loss.detach() / self.world)
            for throughput in (epoch_throughput, window_throughput):
                throughput.add(step.requests, step.impressions, step.wait_seconds)
            order.add(step, agreement.balance)
            self.trained.add(step)
            saves = bool(every) and self.steps_done % (every or 1) == 0
            if saves or self.steps_done % self.config.training.log_every == 0:
                self.log_window(epoch, losses, window_throughput, order)
                losses, window_throughput, order = [], Throughput(), OrderStats()
            if saves:
                self.report({}, self.position_of(epoch, step))
        if losses:
            self.log_window(epoch, losses, window_throughput, order)
        metrics = epoch_throughput.over_ranks(self.device, "epoch") | self.skipped(stream)
        counted = self.trained.over_ranks(self.device)
        return metrics | {f"epoch/{name}": float(counted[name]) for name in ("requests", "impressions")}

    def skipped(self, stream: RankStream) -> dict[str, float]:
        """What ``ingest.on_bad_shard: skip`` has passed over so far, where it has (collective)."""
        total = torch.tensor([stream.skipped_requests], device=self.device)
        dist.all_reduce(total)
        if not int(total):
            return {}
        self.say(f"{int(total):,} requests of shards that cannot be read were skipped so far (ingest.on_bad_shard)")
        return {"epoch/skipped_requests": float(total)}

    def position_of(self, epoch: int, step: Step) -> Position:
        """The run's position after a step, from all ranks' lanes (collective)."""
        lanes = _zeros(self.config.ingest.lanes, 2)
        for lane, at in step.position.items():
            lanes[lane] = torch.tensor(at)
        lanes = lanes.to(self.device)
        dist.all_reduce(lanes)
        return Position(epoch, tuple((window, taken) for window, taken in lanes.tolist()))

    def log_window(
        self,
        epoch: int,
        losses: list[torch.Tensor],
        throughput: Throughput,
        order: OrderStats,
    ) -> None:
        """Logs the steps since the last call, over all ranks (collective)."""
        curve = torch.stack(losses).double()
        dist.all_reduce(curve)
        first = self.steps_done - len(losses) + 1
        for offset, loss in enumerate(curve.tolist()):
            self.logger.metrics({"train/loss": loss}, first + offset)
        values = self.progressive.close("train")
        values |= throughput.over_ranks(self.device, "train")
        values |= order.over_ranks(self.device, "train", self.config.ingest.interleave is not None)
        self.logger.metrics(values, self.steps_done)
        task = self.schema.labels[0].name
        self.say(
            f"epoch {epoch + 1}/{self.config.training.epochs}  step {self.steps_done}  "
            f"loss {curve.mean():.4f}  {task} NE {values[f'train/{task}/ne']:.4f}  "
            f"{values['train/requests_per_second']:,.0f} requests/s  "
            f"{values['train/impressions_per_second']:,.0f} impressions/s  "
            f"data wait {values['train/data_wait_share']:.1%}"
        )

    def say(self, line: str) -> None:
        """A progress line on the job's terminal, from rank 0."""
        if self.rank == 0:
            self.job.board.post.remote(line)

    def restore(self, source: ray.train.Checkpoint) -> None:
        """Loads a checkpoint and takes its position. Raises ConfigError where training would go on in another
        order (other data, schema, truncation, seed, lanes, budgets, cost coefficients or holdout)."""
        with source.as_directory() as folder:
            state = checkpoint.load(folder, self.model)
        changed = differences(state.plan, self.job.plan)
        if self.job.mode == "train" and changed:
            raise ConfigError(
                f"the run cannot go on from {source.path}, because its data would come in another order: "
                f"{'; '.join(changed)}; restore this, or choose another run_name"
            )
        self.epochs_done, self.steps_done = state.epoch, state.step
        if state.position is not None:
            self.position = Position(state.epoch, tuple(state.position))
            self.trained = Trained.since(state.trained)

    def report(self, metrics: dict[str, float], position: Position | None = None) -> None:
        """Checkpoints the model with its metrics, through Ray Train (collective); within an epoch, with the
        ``position`` that it goes on from."""
        state = checkpoint.RunState(
            epoch=self.epochs_done,
            step=self.steps_done,
            schema_yaml=self.schema.to_yaml(),
            model=self.config.model,
            data_version=self.job.data_version,
            data_digest=self.job.data_digest,
            plan=self.job.plan,
            position=None if position is None else list(position.lanes),
            trained=self.trained.over_ranks(self.device),
            metrics=checkpoint.finite(metrics),
        )
        self.logger.flush()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, self.model, state, self.rank)
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"epoch-{self.epochs_done:04d}"
                + (f"-step-{self.steps_done:08d}" if position else ""),
            )


def train_worker(loop_config: dict[str, WorkerJob]) -> None:
    """Ray Train's entry point on each rank."""
    job = loop_config["job"]
    worker = Worker(job)
    found = ray.train.get_checkpoint()
    if job.mode == "evaluate":
        assert job.checkpoint is not None
        worker.restore(checkpoint.open_checkpoint(job.checkpoint))
        metrics = worker.evaluate(worker.stream("evaluation"))
        if worker.rank == 0:
            ray.get(job.board.keep.remote(metrics))
        return
    if found is not None:
        worker.restore(found)
        within = " (within an epoch)" if worker.position else ""
        worker.say(f"resumed after epoch {worker.epochs_done}, step {worker.steps_done}{within}")
    plan = describe_plan(worker.model.plan)
    worker.say(f"{worker.world} workers ready; tables: " + ", ".join(f"{r['table']} {r['sharding']}" for r in plan))
    worker.logger.json(plan, "sharding_plan.json")
    stream = worker.stream("train") if worker.epochs_done < job.config.training.epochs else None
    while stream is not None and worker.epochs_done < job.config.training.epochs and not worker.clock.is_over():
        with system_metrics(job.run if worker.rank == 0 else RunHandle(None)):
            epoch_metrics = worker.train_epoch(stream, worker.epochs_done)
        worker.epochs_done += 1
        worker.position = None
        held_out = worker.evaluate(worker.stream("evaluation"))
        worker.logger.metrics(epoch_metrics | held_out, worker.steps_done)
        worker.report(epoch_metrics | held_out)
        worker.trained = Trained.since({})
    worker.logger.flush()
