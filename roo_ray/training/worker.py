"""What every rank does: build the sharded model, then per epoch train, evaluate on held-out data, checkpoint.

All ranks take the same steps (``steps``), and whatever changes their course they agree on in a step (``agreement``).
A rank without data takes part with a weightless dummy request. Checkpoints are written in the background (``saver``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NoReturn

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from roo_ray import session
from roo_ray.allocator import keep_freed_memory
from roo_ray.config import Holdout
from roo_ray.errors import Evicted, RooError, Stopped, TrainingDiverged
from roo_ray.ingest.device import on_device
from roo_ray.ingest.plan import Position
from roo_ray.ingest.stream import RankStream, Step, StreamSettings, shared_feed
from roo_ray.metrics.curves import CURVES_FILE
from roo_ray.models.attention import say_fallbacks
from roo_ray.models.cost import training_megaflops
from roo_ray.models.keyed_random import set_epoch
from roo_ray.redact import guard_process
from roo_ray.training import checkpoint, evaluation
from roo_ray.training.agreement import Flags
from roo_ray.training.build import build_model, choose_algorithms
from roo_ray.training.clock import TrainingClock
from roo_ray.training.counts import Counts, unreadable
from roo_ray.training.ids import id_metrics
from roo_ray.training.job import WorkerJob
from roo_ray.training.positions import position_over_ranks, refuse_another_stream
from roo_ray.training.requests_of import request_ids
from roo_ray.training.saver import KEEP_SCORE, Saver, keep_score, name_of
from roo_ray.training.signals import watch_worker
from roo_ray.training.soundness import overflowed
from roo_ray.training.steps import Trainer
from roo_ray.training.throughput import Throughput
from roo_ray.training.tracking import RunHandle, RunLogger
from roo_ray.training.window import Window, WindowLog


class Worker:
    """One rank of a job; see the module's docstring."""

    def __init__(self, job: WorkerJob, stop: threading.Event) -> None:
        self.job, self.stop = job, stop  # set where the job is to end
        self.config, self.schema = job.config, job.config.request_schema
        self.tasks = [label.name for label in self.schema.labels]
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        choose_algorithms(self.config.training)
        self.device = get_device()
        guard_process()
        session.place_data(session.Placing.of(self.config.ray))
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.training.threads_per_worker)
            keep_freed_memory()  # every step works on arrays of much the same sizes
        say_fallbacks(lambda line: self.say(f"warning: {line}"))
        self.model = build_model(self.config, job, self.device)
        handle = job.run if self.rank == 0 else RunHandle(None)
        self.logger = RunLogger(handle, self.say, self.config.tracking.end_wait_seconds)
        self.epochs_done, self.steps_done, self.skipped = 0, 0, 0
        self.position: Position | None = None  # where the epoch in progress goes on, after a restart
        self.trained_to: Position | None = None  # where the epoch that was last trained on has ended
        self.saved_as: str | None = None  # the checkpoint that was last written or loaded
        self.counts = Counts.since({})
        self.windows = WindowLog(self.config, self.logger, self.say)
        self.cost = training_megaflops(self.schema, self.config.model)
        self.clock = TrainingClock(self.config.training.max_seconds)
        self.saved_at, self.failed_saves, self.overdue = time.monotonic(), 0, False
        storage = context.get_storage()
        self.storage, self.folder = storage.storage_filesystem, storage.experiment_fs_path
        if job.mode == "train":
            self.saver = Saver(self.storage, self.folder, self.rank, self.world, self.logger.keep)
            if job.sign is not None:
                self.saver.require_shared(job.sign)
            self.evicted = watch_worker()

    def say(self, line: str) -> None:
        """A progress line on the job's terminal, from rank 0."""
        if self.rank == 0:
            self.job.board.post.remote(line)

    # ---- data ----------------------------------------------------------------------------------------

    def stream(self, side: Literal["train", "evaluation"], holdout: Holdout | None = None) -> RankStream:
        """This rank's batches (collective): ``train`` over the remaining epochs, ``evaluation`` in stored order, of
        the config's holdout or another one.

        The evaluation between epochs reads in a thread: a second Ray Data pipeline would take the CPUs of the
        training pipeline, which is reading the next epoch ahead, and cost its start-up each time. Elastic workers
        that have left no CPUs to Ray Data read in threads as well; the stream is the same.
        """
        training = side == "train"
        ingest, settings = self.config.ingest, self.config.training
        crowded = False
        if not isinstance(settings.workers, int):
            taken = self.world * self.config.ray.cpus_per_worker
            crowded = ray.cluster_resources().get("CPU", 0.0) - taken < self.config.ray.data_cpus
        if crowded or (not training and self.job.mode == "train"):
            ingest = ingest.model_copy(update={"reader": "thread"})
        streams = StreamSettings(
            data_set=self.config.requests,
            version=self.job.data_version,
            schema=self.schema,
            ingest=ingest,
            holdout=holdout or self.config.holdout,
            side=side,
            seed=settings.seed,
            epochs=tuple(range(self.epochs_done, settings.epochs)) if training else (0,),
            mode=ingest.mode if training else "sequential",
            start=self.position if training else None,
            cost=self.cost,
        )
        # rank 0 says whether there is a feed: nodes may come and go while the ranks look
        feed = [(shared_feed(streams, self.world), ingest.reader) if self.rank == 0 else None]
        dist.broadcast_object_list(feed, src=0, device=self.device)
        assert feed[0] is not None
        shared, reader = feed[0]
        if reader != ingest.reader:
            ingest = ingest.model_copy(update={"reader": reader})
            streams = StreamSettings(**{**vars(streams), "ingest": ingest})
        return RankStream(streams, self.rank, self.world, shared)

    def evaluate(self, holdout: Holdout | None = None) -> dict[str, float]:
        """Metrics of held-out data over all ranks (collective), under ``eval/``. Raises Stopped and Evicted on all
        ranks together, after a checkpoint of the epoch that was to be evaluated, if it was trained on."""
        stream, settings = self.stream("evaluation", holdout), self.config.evaluation
        try:
            values, curves = evaluation.evaluate(
                self.model, self.schema, stream, self.device, self.say, settings, self.rank, self.wishes, self.job.items
            )
        except evaluation.CutShort as cut:
            self.leave_evaluation(cut.stop)
        self.logger.json(curves, CURVES_FILE)
        return values

    # ---- training ------------------------------------------------------------------------------------

    def wishes(self) -> Flags:
        """Whether this rank was told to leave, or to end the job."""
        if self.job.mode != "train":
            return Flags()
        return Flags(evicted=self.evicted.is_set(), stop=self.stop.is_set())

    def flags(self, taken: int) -> Flags:
        """What this rank says in the agreement of the step in progress."""
        settings, step = self.config.training, self.steps_done + 1
        every, minutes = settings.checkpoint_every_steps, settings.checkpoint_every_minutes
        due = self.overdue or bool(every and step % every == 0)
        if minutes and self.rank == 0:
            due = due or time.monotonic() - self.saved_at > 60 * minutes
        busy = self.saver.busy
        self.overdue = due and busy
        return replace(self.wishes(), checkpoint=due and not busy, written=self.saver.written)

    def train_epoch(self, stream: RankStream, epoch: int) -> dict[str, float]:
        """Trains one epoch, or the rest of it; returns its throughput over all ranks, and what it trained on in
        all. Raises TrainingDiverged, Evicted and Stopped on all ranks together."""
        settings, ingest = self.config.training, stream.settings.ingest
        set_epoch(self.model.module, settings.seed, epoch)
        total, window = Throughput(), Window(self.tasks, self.device)

        def begin() -> None:
            for counted in (total, window.throughput):
                counted.start()

        trainer = Trainer(
            model=self.model,
            schema=self.schema,
            seed=settings.seed,
            task_weights=torch.tensor([x.weight for x in self.schema.labels], device=self.device),
            rank=self.rank,
            world=self.world,
            exploded=settings.form == "impression",
            skips=settings.on_nan == "skip",
            says=self.flags,
            clock=self.clock,
            names=lambda step: request_ids(stream.settings, epoch, step),
            begins=begin,
        )
        coming = on_device(stream.epoch(epoch), self.device, lambda s: trainer.times.add("host_to_device", s))
        ends_below = ingest.lanes if ingest.drop_last else 1
        last: Step | None = None
        for taken in trainer.steps(coming, self.device, window.times, ends_below):
            step, agreement = taken.step, taken.agreement
            self.steps_done += 1
            if taken.logits is not None and taken.loss is not None:
                # progressive validation: the batch was scored before it was trained on
                batch = step.batch
                window.metrics.update(taken.logits, batch.labels, batch.weights, batch.num_impressions, batch.split)
                window.losses.append((self.steps_done, taken.loss))
            else:
                self.count_skipped()
            for throughput in (total, window.throughput):
                throughput.add(step.requests, step.impressions, step.wait_seconds)
            window.order.add(step, agreement.balance)
            self.counts.add(step, taken.skipped)
            if agreement.ranks["written"] == self.world and not taken.skipped:
                self.collect()  # this step was finite from the weights that were written
            leaves = agreement.any("evicted") or agreement.any("stop")
            due = agreement.any("checkpoint")
            self.overdue = self.overdue or (due and taken.skipped)  # weights may be why the batch was left out
            saves = leaves or (due and not taken.skipped)
            if saves or self.steps_done % settings.log_every == 0:
                trainer.times.lap("other")
                self.windows.log(window, epoch, self.steps_done)
                window = Window(self.tasks, self.device)
                trainer.times = window.times
            if saves:
                position = position_over_ranks(epoch, step, ingest.lanes, ingest.window_units, self.device)
                self.save({}, position, wait=leaves)
            if leaves:
                self.leave(agreement.any("stop"))
            last = step
        self.windows.log(window, epoch, self.steps_done)
        over, end = trainer.clock.is_over(), last
        if ingest.drop_last and not over:
            end = self.count_dropped(trainer.left, coming, epoch)
        elif not trainer.left.lanes_alive:  # the end, not the clock's: what lanes passed over behind their last batches
            end = trainer.left
            self.counts.add(end)
        self.trained_to = self.position
        if last is not None or not over:  # it lies behind all that was counted
            assert end is not None
            self.trained_to = position_over_ranks(epoch, end, ingest.lanes, ingest.window_units, self.device)
        counted = self.counts.over_ranks(self.device)
        metrics = total.over_ranks(self.device, "epoch") | self.unreadable(counted, epoch)
        metrics |= id_metrics(self.model.module)
        if counted["skipped_requests"]:
            metrics["epoch/not_finite_requests"] = float(counted["skipped_requests"])
            metrics["epoch/not_finite_batches"] = float(self.skipped)
        return metrics | {f"epoch/{name}": float(counted[name]) for name in ("requests", "impressions")}

    def leave(self, stop: bool) -> NoReturn:
        """Ends this worker group after its last checkpoint."""
        if stop:
            raise Stopped(f"at step {self.steps_done}; the checkpoint is written, and the same run_name goes on there")
        raise Evicted(f"a worker got SIGTERM at step {self.steps_done}; the checkpoint is written")

    def leave_evaluation(self, stop: bool) -> NoReturn:
        """Ends this worker group within an evaluation (collective); the epoch before it is not trained on again."""
        if self.trained_to is None:
            raise (Stopped if stop else Evicted)("before training began; the same run_name begins anew")
        if self.saver.busy:
            self.collect()
        if self.saved_as != name_of(self.trained_to.epoch, self.steps_done):  # as it may be right after a restart
            self.epochs_done = self.trained_to.epoch  # the one that goes on, to be evaluated
            self.save({}, self.trained_to, wait=True)
        self.leave(stop)

    def count_skipped(self) -> None:
        """Counts a batch that was left out. Raises TrainingDiverged where there are too many."""
        self.skipped += 1
        most = self.config.training.max_nan_batches
        self.logger.metrics({"train/not_finite_batches": float(self.skipped)}, self.steps_done)
        self.say(f"step {self.steps_done}: the loss is not finite; the batch is left out ({self.skipped} of {most})")
        if self.skipped > most:
            raise TrainingDiverged(
                f"more than training.max_nan_batches={most} batches have a loss that is not finite, the last at step "
                f"{self.steps_done}: the model has probably diverged; lower the learning rates, or go back to a "
                "checkpoint before"
            )

    def count_dropped(self, step: Step, steps: Iterator[Step], epoch: int) -> Step:
        """Reads to the end of an epoch that ``drop_last`` has ended, and says what was dropped (collective). Returns
        the end."""
        dropped = 0
        while step.lanes_alive:
            dropped += step.requests
            self.counts.unreadable_requests += unreadable(step)
            step = next(steps)
        self.counts.unreadable_requests += unreadable(step)
        total = torch.tensor([dropped], device=self.device)
        dist.all_reduce(total)
        if int(total):
            self.logger.metrics({"epoch/dropped_requests": float(total)}, self.steps_done)
            self.say(f"epoch {epoch + 1}: ingest.drop_last drops the last {int(total):,} requests")
        return step

    def unreadable(self, counted: dict[str, int], epoch: int) -> dict[str, float]:
        """What ``ingest.on_bad_shard: skip`` has passed over in an epoch, where it has."""
        skipped = counted["unreadable_requests"]
        if not skipped:
            return {}
        self.say(
            f"epoch {epoch + 1}: {skipped:,} requests of shards that cannot be read were skipped (ingest.on_bad_shard)"
        )
        return {"epoch/skipped_requests": float(skipped)}

    # ---- checkpoints ---------------------------------------------------------------------------------

    def run_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds beside the model: the metrics of training so far, and this rank's random number
        generators."""
        tensors = self.windows.quality.tensors() | {f"rng_{self.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors[f"rng_cuda_{self.rank}"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def restore(self, source: ray.train.Checkpoint, weights_only: bool = False) -> None:
        """Loads a checkpoint and takes its position, or only what was learnt; to be evaluated, the model alone. Raises
        ConfigError where training would go on in another order (other data, schema, truncation, seed, lanes, budgets,
        cost coefficients or holdout)."""
        if self.job.mode == "evaluate":
            with source.as_directory() as folder:
                checkpoint.load_weights(folder, self.model)
            return
        run = self.run_tensors()
        with source.as_directory() as folder:
            state = checkpoint.load(folder, self.model, run)
        if weights_only:
            return
        refuse_another_stream(source.path, state.plan, self.job.plan)
        self.epochs_done, self.steps_done, self.skipped = state.epoch, state.step, state.skipped
        self.clock.go_on(state.seconds, within=state.position is not None)
        self.saved_as = name_of(state.epoch, state.step)
        self.windows.quality.go_on(run)
        self.windows.totals = dict(state.totals)
        if f"rng_{self.rank}" in run:
            torch.set_rng_state(run[f"rng_{self.rank}"])
        if self.device.type == "cuda" and f"rng_cuda_{self.rank}" in run:
            torch.cuda.set_rng_state(run[f"rng_cuda_{self.rank}"], self.device)
        if state.position is not None:
            skipped = tuple(tuple(units) for units in state.position_skipped)
            self.position = Position(state.epoch, tuple(state.position), skipped)
            self.counts = Counts.since(state.trained)

    def save(self, metrics: dict[str, float], position: Position | None = None, wait: bool = False) -> None:
        """Begins a checkpoint of the model with its metrics (collective); within an epoch, with the ``position`` that
        it goes on from. Waits for one underway, and, with ``wait``, for this one."""
        if self.saver.busy:
            self.collect()
        state = checkpoint.RunState(
            epoch=self.epochs_done,
            step=self.steps_done,
            schema_yaml=self.schema.to_yaml(),
            model=self.config.model,
            data_version=self.job.data_version,
            data_digest=self.job.data_digest,
            plan=self.job.plan,
            position=None if position is None else list(position.lanes),
            position_skipped=[] if position is None else [list(units) for units in position.skipped],
            trained=self.counts.over_ranks(self.device),
            metrics=checkpoint.finite(metrics),
            skipped=self.skipped,
            seconds=self.clock.passed if position is not None else self.clock.reached(),
            totals=dict(self.windows.totals),
        )
        name = name_of(self.epochs_done, self.steps_done)
        begin = time.perf_counter()
        self.saver.begin(name, self.model, state, metrics | self.windows.lifetime(), self.run_tensors())
        self.logger.metrics({"checkpoint/copy_ms": 1000 * (time.perf_counter() - begin)}, self.steps_done)
        self.saved_at, self.overdue = time.monotonic(), False
        if wait:
            self.collect(required=True)

    def collect(self, required: bool = False) -> None:
        """Reports the checkpoint that was written to Ray Train (collective). One that could not be written is said
        and counted; the run goes on, unless this one is ``required``, which raises RooError. Raises TrainingDiverged
        where the state was not finite."""
        written = self.saver.collect()
        name = written.path.rsplit("/", 1)[-1]
        if written.diverged:
            raise overflowed(name, written.problem, self.saved_as)
        if written.problem is None:
            self.saved_as = name
            begin = time.perf_counter()
            ray.train.report(
                written.metrics | {KEEP_SCORE: keep_score(written.metrics, self.tasks[0])},
                checkpoint=ray.train.Checkpoint(written.path, filesystem=self.storage),
                checkpoint_dir_name=name,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            )
            took = {"write": written.seconds, "report": time.perf_counter() - begin}
            self.logger.metrics({f"checkpoint/{part}_ms": 1000 * s for part, s in took.items()}, self.steps_done)
            return
        self.failed_saves += 1
        self.logger.metrics({"checkpoint/failed": float(self.failed_saves)}, self.steps_done)
        words = (
            f"checkpoint {name} could not be written ({written.problem}); the one before it stays the last. Is the "
            f"storage {self.folder} full?"
        )
        if required:
            raise RooError(f"{words} Make room, and run again with the same run_name")
        if self.failed_saves == 1:
            self.say(f"warning: {words} Training goes on; further failures are counted in checkpoint/failed")
