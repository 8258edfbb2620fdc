"""What every rank does: build the sharded model, then per epoch train, evaluate on held-out data, checkpoint.

All ranks take the same steps: one small all-reduce before each step carries the weights that the loss is
normalised by and the number of lanes that still have data; zero ends the pass on all ranks at once. A rank
without data takes part with a weightless dummy request.
"""

from __future__ import annotations

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
from roo_ray.ingest.stream import RankStream, Step, StreamSettings
from roo_ray.metrics.collection import RankingMetrics
from roo_ray.models.item_index import RetrievalEvaluation
from roo_ray.models.keyed_random import set_epoch
from roo_ray.models.objective import logits_of, retrieval_towers, training_loss
from roo_ray.models.ranking import RankingModel
from roo_ray.training import checkpoint
from roo_ray.training.job import WorkerJob
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
    global batch; ``lanes_alive``: lanes that still had data."""

    weights: torch.Tensor
    lanes_alive: int


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

    # ---- one pass ------------------------------------------------------------------------------------

    def steps(self, stream: RankStream, epoch: int) -> Iterator[tuple[Step, Agreement]]:
        """The steps of a pass, each with what the ranks agreed on; ends on all ranks at once."""
        for step in stream.epoch(epoch):
            known = step.batch.weights.double().sum(0)  # (K,)
            agreed = torch.cat([known, torch.tensor([step.lanes_alive], dtype=torch.float64)]).to(self.device)
            dist.all_reduce(agreed)
            if agreed[-1] == 0:
                return
            yield step, Agreement(agreed[:-1].float(), int(agreed[-1]))

    def stream(self, side: Literal["train", "evaluation"]) -> RankStream:
        """This rank's batches: ``train`` shuffled over the remaining epochs, ``evaluation`` in stored order.

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
            mode="shuffled" if training else "sequential",
        )
        return RankStream(settings, self.rank, self.world)

    def evaluate(self, stream: RankStream) -> dict[str, float]:
        """Metrics of the held-out data over all ranks."""
        metrics = RankingMetrics([label.name for label in self.schema.labels])
        oracle = RankingMetrics([label.name for label in self.schema.labels])
        towers = retrieval_towers(self.model.module)
        retrieval = None if towers is None else RetrievalEvaluation(towers)
        throughput = Throughput()
        last_line = time.perf_counter()
        self.model.module.eval()
        with torch.no_grad():
            for step, _ in self.steps(stream, 0):
                batch = step.batch.to(self.device)
                outputs = self.model.module(batch)
                logits = logits_of(self.model.module, outputs, len(self.schema.labels))
                if retrieval is not None:
                    retrieval.update(outputs, batch)
                metrics.update(logits, batch.labels, batch.weights, batch.num_impressions)
                oracle.update_probabilities(batch.oracle, batch.labels, batch.weights, batch.num_impressions)
                throughput.add(step.requests, step.impressions, step.wait_seconds)
                if time.perf_counter() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.perf_counter()
                    self.say(f"evaluating: rank 0 has scored {throughput.requests:,} requests")
        self.model.module.train()
        values = {f"eval/{name}": value for name, value in metrics.merge().compute().items()}
        if retrieval is not None:
            values |= {f"eval/{name}": value for name, value in retrieval.result().items()}
        for name, value in oracle.merge().compute().items():
            task, metric = name.split("/")
            if metric in ("ne", "auc"):
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
        """Trains one epoch; returns its throughput over all ranks."""
        tasks = [label.name for label in self.schema.labels]
        window, losses = RankingMetrics(tasks), []
        set_epoch(self.model.module, self.config.training.seed, epoch)
        epoch_throughput, window_throughput = Throughput(), Throughput()
        for step, agreement in self.steps(stream, epoch):
            batch = step.batch.to(self.device)
            num_impressions = batch.num_impressions  # of the requests, also where they are exploded next
            if self.config.training.form == "impression":
                batch = batch.explode()
            logits, loss = training_loss(
                self.model.module, batch, self.task_weights, agreement.weights, self.world
            )  # (B_NRO, K), scalar
            # progressive validation: the batch is scored before it is trained on
            window.update(logits.detach(), batch.labels, batch.weights, num_impressions)
            self.model.optimizer.zero_grad()
            loss.backward()
            self.model.optimizer.step()
            self.steps_done += 1
            losses.append(loss.detach() / self.world)
            for throughput in (epoch_throughput, window_throughput):
                throughput.add(step.requests, step.impressions, step.wait_seconds)
            if self.steps_done % self.config.training.log_every == 0:
                self.log_window(epoch, losses, window, window_throughput)
                window, losses, window_throughput = RankingMetrics(tasks), [], Throughput()
        if losses:
            self.log_window(epoch, losses, window, window_throughput)
        return epoch_throughput.over_ranks(self.device, "epoch")

    def log_window(
        self, epoch: int, losses: list[torch.Tensor], window: RankingMetrics, throughput: Throughput
    ) -> None:
        """Logs the steps since the last call, over all ranks (collective)."""
        curve = torch.stack(losses).double()
        dist.all_reduce(curve)
        first = self.steps_done - len(losses) + 1
        for offset, loss in enumerate(curve.tolist()):
            self.logger.metrics({"train/loss": loss}, first + offset)
        values = {f"train/{name}": value for name, value in window.merge().compute().items()}
        values |= throughput.over_ranks(self.device, "train")
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
        order (other data, schema, seed, lanes, budgets or holdout)."""
        with source.as_directory() as folder:
            state = checkpoint.load(folder, self.model)
        changed = [
            f"{name} was {value} and is {self.job.plan.get(name)}"
            for name, value in state.plan.items()
            if value != self.job.plan.get(name)
        ]
        if self.job.mode == "train" and changed:
            raise ConfigError(
                f"the run cannot go on from {source.path}, because its data would come in another order: "
                f"{'; '.join(changed)}; restore this, or choose another run_name"
            )
        self.epochs_done, self.steps_done = state.epoch, state.step

    def report(self, metrics: dict[str, float]) -> None:
        """Checkpoints the model with its metrics, through Ray Train (collective)."""
        state = checkpoint.RunState(
            epoch=self.epochs_done,
            step=self.steps_done,
            schema_yaml=self.schema.to_yaml(),
            model=self.config.model,
            data_version=self.job.data_version,
            data_digest=self.job.data_digest,
            plan=self.job.plan,
            metrics=checkpoint.finite(metrics),
        )
        self.logger.flush()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, self.model, state, self.rank)
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"epoch-{self.epochs_done:04d}",
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
        worker.say(f"resumed after epoch {worker.epochs_done}, step {worker.steps_done}")
    plan = describe_plan(worker.model.plan)
    worker.say(f"{worker.world} workers ready; tables: " + ", ".join(f"{r['table']} {r['sharding']}" for r in plan))
    worker.logger.json(plan, "sharding_plan.json")
    stream = worker.stream("train") if worker.epochs_done < job.config.training.epochs else None
    while stream is not None and worker.epochs_done < job.config.training.epochs:
        epoch_metrics = worker.train_epoch(stream, worker.epochs_done)
        worker.epochs_done += 1
        held_out = worker.evaluate(worker.stream("evaluation"))
        worker.logger.metrics(epoch_metrics | held_out, worker.steps_done)
        worker.report(epoch_metrics | held_out)
    worker.logger.flush()
