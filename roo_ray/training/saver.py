"""Checkpoints in the background: the training thread copies the tensors, a thread writes them.

The thread has a process group of its own (gloo), so that its collectives never meet those of training. On local
storage the shards are written where they stay; otherwise into a temporary folder, and copied from there. Only when
rank 0 has found every rank's files in place does it write ``state.json``, in one piece; then the ranks, at a step that
they agree on, report the checkpoint to Ray Train. What fails before that leaves no checkpoint, and takes none away.
A state with values that are not finite is not written.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from roo_ray.errors import ConfigError
from roo_ray.training.checkpoint import STATE_FILE, RunState, state_json, tensors_of, write_tensors
from roo_ray.training.packing import PACKED, pack
from roo_ray.training.sharding import ShardedModel
from roo_ray.training.soundness import infinite_by_nature, unsound

SEEN_BY_ALL = "`storage` must be one that all nodes see: a file system mounted on all (NFS), or an object store"
Said = TypeVar("Said")


@dataclass(frozen=True)
class Written:
    """How the writing of a checkpoint ended, the same on all ranks. ``path``: in the storage's file system;
    ``problem``: why there is none; ``diverged``: because the state is not finite; ``seconds``: in the background;
    ``metrics``: what it is reported with."""

    path: str
    metrics: dict[str, float]
    seconds: float
    problem: str | None
    diverged: bool = False


def on_cpu(shard: ShardMetadata) -> ShardMetadata:
    """Where a shard lies, and that it is in its rank's host memory: torch takes no tensor on another device than its
    metadata say."""
    rank = shard.placement.rank() if shard.placement is not None else None
    if rank is None:
        raise ValueError(f"a shard without a rank: {shard}")
    return ShardMetadata(list(shard.shard_offsets), list(shard.shard_sizes), f"rank:{rank}/cpu")


def copy_of(value: Any, group: dist.ProcessGroup | None) -> Any:
    """A copy in host memory of nested tensors; a sharded tensor's local shards, with what they are part of."""
    if isinstance(value, Mapping):
        return {name: copy_of(item, group) for name, item in value.items()}
    if isinstance(value, ShardedTensor):
        shards = [
            Shard(shard.tensor.detach().to("cpu", copy=True), on_cpu(shard.metadata)) for shard in value.local_shards()
        ]
        whole = value.metadata()
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards,
            replace(whole, shards_metadata=[on_cpu(shard) for shard in whole.shards_metadata]),
            process_group=value._process_group,
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
        self._overlooked: set[str] = set()

    @property
    def busy(self) -> bool:
        """A checkpoint was begun and not yet collected."""
        return self._writing is not None

    @property
    def written(self) -> bool:
        """The one that was begun has ended on this rank."""
        return self._writing is not None and self._writing.done()

    def require_shared(self, sign: str) -> None:
        """Looks on every rank for a file that the driver has written to the run's folder (collective). Raises
        ConfigError on all ranks where one does not see it: its files would lie on another disk, and no checkpoint be
        whole."""
        if not isinstance(self.filesystem, pafs.LocalFileSystem):
            return
        seen = list[bool]()
        if (problem := self._together(lambda: seen.append(Path(sign).is_file()))) is not None:
            raise OSError(f"{self.folder}: {problem}")  # storage that fails for now, perhaps
        words = "" if seen[0] else f"{socket.gethostname()} does not see what the driver has written to {self.folder}"
        if (missing := self._first_word(words)) is not None:
            raise ConfigError(f"{missing}; {SEEN_BY_ALL}")

    def overlook(self, model: ShardedModel) -> str | None:
        """Takes the state as it is now for what a run starts from: tensors that are not finite in it are no sign of
        an overflow later on (collective). The first rank's words for them, if any; None without."""
        tensors = tensors_of(model)
        self._overlooked = set(unsound(tensors, {}, {}, infinite_by_nature(tensors, model.module.buffers())))
        return self._first_word(", ".join(sorted(self._overlooked)))

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
        state_now = tensors_of(model)
        excused = infinite_by_nature(state_now, model.module.buffers())
        rest, large, index = pack(state_now)
        rest = copy_of(rest, self.group)
        tensors = rest | ({"run": copy_of(run, self.group)} if run else {}) | {PACKED: large}
        state = state.model_copy(update={"packed": index})

        def look() -> str:
            found = unsound(rest, large, index, excused)
            return next((name for name in found if name not in self._overlooked), "")

        self._writing = self._threads.submit(self._write, name, tensors, state, metrics, look)

    def collect(self) -> Written:
        """How the one underway has ended; waits for it."""
        assert self._writing is not None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(
        self,
        name: str,
        tensors: dict[str, Any],
        state: RunState,
        metrics: dict[str, float],
        look: Callable[[], str],
    ) -> Written:
        begin = time.perf_counter()
        target = f"{self.folder}/{name}"
        seen, files = list[str](), dict[str, int]()

        def first_look() -> None:
            self.first()
            seen.append(look())

        problem = self._together(first_look)
        if problem is None and (found := self._first_word(seen[0])) is not None:
            return Written(target, metrics, time.perf_counter() - begin, found, diverged=True)
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        folder, scratch = Path(target), list[Path]()

        def make_scratch() -> None:
            scratch.append(Path(tempfile.mkdtemp(prefix="roo-ray-checkpoint-")))

        try:
            if problem is None:
                problem = self._together(lambda: self._clear(target) if self.rank == 0 else None)
            if problem is None and not local:
                problem = self._together(make_scratch)
                folder = scratch[0] if scratch else folder
            if problem is None:
                problem = self._together(
                    lambda: files.update(write_tensors(folder, tensors, self.group, durable=local))
                )
            if problem is None and not local:
                problem = self._together(lambda: self._upload(folder, target))
            if problem is None:
                every = self._gather(files)
                problem = self._together(lambda: self._complete(target, state, every) if self.rank == 0 else None)
        finally:
            for made in scratch:
                shutil.rmtree(made, ignore_errors=True)
        if problem is not None:
            self._together(lambda: self._clear(target, remake=False) if self.rank == 0 else None)
        return Written(target, metrics, time.perf_counter() - begin, problem)

    def _together(self, action: Callable[[], Any]) -> str | None:
        """Does something on all ranks; None, or the same words on all of them where it failed on one. Whatever is
        raised, every rank learns of it: the others would wait for this one."""
        problem = ""
        try:
            action()
        except Exception as error:
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            problem = f"{kind}{error}"
        return self._first_word(problem)

    def _first_word(self, ours: str) -> str | None:
        """What the first rank says that says something, with its number; None where none does (collective)."""
        return next((f"rank {rank}: {words}" for rank, words in enumerate(self._gather(ours)) if words), None)

    def _gather(self, ours: Said) -> list[Said]:
        """What every rank says (collective)."""
        every = [ours] * self.world
        dist.all_gather_object(every, ours, group=self.group)
        return every

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

    def _complete(self, target: str, state: RunState, every: list[dict[str, int]]) -> None:
        """Writes ``state.json`` where the files of every rank (name -> bytes) are in place; raises OSError where one is
        not. Asks for each by name: a listing on NFS may be of before."""
        files = {name: size for of_rank in every for name, size in of_rank.items()}
        found = self.filesystem.get_file_info([f"{target}/{name}" for name in files])
        lacks = [item.base_name for item in found if not item.is_file or item.size != files[item.base_name]]
        if lacks:
            whose = next(rank for rank, of_rank in enumerate(every) if lacks[0] in of_rank)
            raise OSError(
                f"{len(lacks)} of {len(files)} files are not in {target} as they were written, {lacks[0]} of rank "
                f"{whose} among them; {SEEN_BY_ALL}"
            )
        content = state_json(state, files).encode()
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
