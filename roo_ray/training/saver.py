"""Checkpoints in the background: the training thread copies the tensors, a thread writes them.

The thread has a process group of its own (gloo), so that its collectives never meet those of training. On local
storage the shards are written where they stay; otherwise into a temporary folder, and copied from there. Only when
every rank's files are in place does rank 0 write ``state.json``, in one piece; then the ranks, at a step that they
agree on, report the checkpoint to Ray Train. What fails before that leaves no checkpoint, and takes none away.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from roo_ray.training.checkpoint import STATE_FILE, RunState, state_json, tensors_of, write_tensors
from roo_ray.training.packing import PACKED, pack
from roo_ray.training.sharding import ShardedModel


@dataclass(frozen=True)
class Written:
    """How the writing of a checkpoint ended, the same on all ranks. ``path``: in the storage's file system;
    ``problem``: why there is none; ``seconds``: in the background; ``metrics``: what it is reported with."""

    path: str
    metrics: dict[str, float]
    seconds: float
    problem: str | None


def copy_of(value: Any, group: dist.ProcessGroup | None) -> Any:
    """A copy in host memory of nested tensors; a sharded tensor's local shards, with what they are part of."""
    if isinstance(value, Mapping):
        return {name: copy_of(item, group) for name, item in value.items()}
    if isinstance(value, ShardedTensor):
        shards = [Shard(shard.tensor.detach().cpu().clone(), shard.metadata) for shard in value.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, value.metadata(), process_group=value._process_group
        )
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return value


class Saver:
    """Writes the checkpoints of a run, one at a time. ``folder``: the run's, in ``filesystem``. All ranks make one
    together, and call its methods at the same steps. ``first``: done in the thread before a checkpoint is written."""

    def __init__(
        self,
        filesystem: pafs.FileSystem,
        folder: str,
        rank: int,
        world: int,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        self.filesystem, self.folder, self.first = filesystem, folder, first
        self.rank, self.world = rank, world
        self.group = dist.new_group(backend="gloo")
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="roo-ray-checkpoint")
        self._writing: Future[Written] | None = None

    @property
    def busy(self) -> bool:
        """A checkpoint was begun and not yet collected."""
        return self._writing is not None

    @property
    def written(self) -> bool:
        """The one that was begun has ended on this rank."""
        return self._writing is not None and self._writing.done()

    def begin(
        self,
        name: str,
        model: ShardedModel,
        state: RunState,
        metrics: dict[str, float],
        run: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Copies the state as it is now and begins to write it. Nothing may be underway."""
        assert self._writing is None
        rest, large, index = pack(tensors_of(model))
        tensors = copy_of(rest | ({"run": dict(run)} if run else {}), self.group) | {PACKED: large}
        state = state.model_copy(update={"packed": index})
        self._writing = self._threads.submit(self._write, name, tensors, state, metrics)

    def collect(self) -> Written:
        """How the one underway has ended; waits for it."""
        assert self._writing is not None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(self, name: str, tensors: dict[str, Any], state: RunState, metrics: dict[str, float]) -> Written:
        begin = time.perf_counter()
        target = f"{self.folder}/{name}"
        problem = self._together(self.first)
        if problem is None:
            problem = self._together(lambda: self._clear(target) if self.rank == 0 else None)
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        folder = Path(target) if local else Path(tempfile.mkdtemp(prefix="roo-ray-checkpoint-"))
        try:
            if problem is None:
                problem = self._together(lambda: write_tensors(folder, tensors, self.group, durable=local))
            if problem is None and not local:
                problem = self._together(lambda: self._upload(folder, target))
            if problem is None:
                problem = self._together(lambda: self._complete(target, state) if self.rank == 0 else None)
        finally:
            if not local:
                shutil.rmtree(folder, ignore_errors=True)
        if problem is not None:
            self._together(lambda: self._clear(target, remake=False) if self.rank == 0 else None)
        return Written(target, metrics, time.perf_counter() - begin, problem)

    def _together(self, action: Callable[[], Any]) -> str | None:
        """Does something on all ranks; None, or the same words on all of them where a rank's storage failed."""
        problem = None
        try:
            action()
        except OSError as error:
            problem = f"rank {self.rank}: {error}"
        every: list[str | None] = [None] * self.world
        dist.all_gather_object(every, problem, group=self.group)
        return next((words for words in every if words is not None), None)

    def _clear(self, target: str, remake: bool = True) -> None:
        # what a run that was killed has left under this name; its state.json goes first
        state = f"{target}/{STATE_FILE}"
        if self.filesystem.get_file_info(state).is_file:
            self.filesystem.delete_file(state)
        if self.filesystem.get_file_info(target).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(target)
        if remake:
            self.filesystem.create_dir(target, recursive=True)

    def _upload(self, folder: Path, target: str) -> None:
        for path in sorted(folder.iterdir()):
            pafs.copy_files(
                str(path), f"{target}/{path.name}", pafs.LocalFileSystem(), self.filesystem, use_threads=False
            )

    def _complete(self, target: str, state: RunState) -> None:
        listing = self.filesystem.get_file_info(pafs.FileSelector(target))
        content = state_json(state, {item.base_name: item.size for item in listing if item.is_file}).encode()
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            with open(f"{target}/{STATE_FILE}.part", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{target}/{STATE_FILE}.part", f"{target}/{STATE_FILE}")
            return
        with self.filesystem.open_output_stream(f"{target}/{STATE_FILE}") as stream:  # appears when it is whole
            stream.write(content)


KEEP_SCORE = "checkpoint_score"
UNSCORED = -1e30  # finite: Ray Train keeps it as JSON


def keep_score(metrics: Mapping[str, float], task: str) -> float:
    """What Ray Train keeps the highest of: the held-out NE, negated; a checkpoint that has none goes first. (Under its
    order ``min`` a checkpoint without the figure would count as the best of all.)"""
    ne = metrics.get(f"eval/{task}/ne", math.nan)
    return -ne if math.isfinite(ne) else UNSCORED


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None for another folder."""
    parts = name.split("-")
    return int(parts[3]) if len(parts) == 4 and parts[0] == "epoch" and parts[3].isdigit() else None


def name_of(epoch: int, step: int) -> str:
    """The folder of a checkpoint, by epochs done and steps."""
    return f"epoch-{epoch:04d}-step-{step:08d}"


def remove_leftovers(filesystem: pafs.FileSystem, folder: str, last_step: int) -> list[str]:
    """Removes what a killed run has left: folders that are no complete checkpoint, and checkpoints after the step
    that the run goes on from, which Ray Train does not know. Returns their names."""
    removed = []
    for item in filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
        step = step_of(item.base_name)
        if item.type != pafs.FileType.Directory or step is None:
            continue
        whole = filesystem.get_file_info(f"{item.path}/{STATE_FILE}").is_file
        if not whole or step > last_step:
            filesystem.delete_dir(item.path)
            removed.append(item.base_name)
    return removed
