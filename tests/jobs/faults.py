"""Disturbs a run for real, at random moments that are certain to have a checkpoint before them.

A fault waits for a checkpoint that Ray Train knows of (its snapshot in the run's folder says which), a kill for one
that is newer than that from which the workers have last begun; a signal makes one of its own. Log lines would not do:
they come half a second late, and in that time a small run takes dozens of steps, and Ray Train polls for checkpoints
as rarely.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import ray
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from roo_ray.training.saver import step_of

What = Literal["kill", "write", "notice", "stop"]
SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class Fault:
    """SIGKILL of a worker (``kill``), or of one while a checkpoint is half written (``write``), SIGTERM to a worker
    (``notice``) or to the driver, this process (``stop``). ``known``: the step of the last checkpoint that Ray Train
    knew of when it struck; ``half``: the folder that was half written then."""

    what: What
    known: int
    half: str = ""


def trainers() -> list[int]:
    """The processes of the workers of this Ray."""
    found = []
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    for process in psutil.Process(raylet).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(int(process.pid))
    return sorted(found)


def last_checkpoint(run: Path) -> int:
    """The step of the last checkpoint that Ray Train knows of; -1 before the first, and while it writes that down."""
    try:
        last = json.loads((run / SNAPSHOT).read_text())["latest_checkpoint_result"]
    except (FileNotFoundError, ValueError):
        return -1
    step = step_of(last["checkpoint_dir_name"]) if last else None
    return -1 if step is None else step


def half_written(run: Path) -> Path | None:
    """A checkpoint of which some shard is there and the last file is not."""
    for folder in run.glob("epoch-*"):
        if any(folder.glob("*.distcp")) and not (folder / "state.json").exists():
            return folder
    return None


class Faults:
    """``plan``: (a step, what to do once a checkpoint of at least that step is known). ``seed``: of the delay after
    that, up to ``delay`` seconds, and of which worker is hit. Give ``listen`` to the run as its ``say``."""

    def __init__(self, run: Path, plan: list[tuple[int, What]], seed: int = 0, delay: float = 0.4) -> None:
        self.run, self.plan, self.delay = run, list(plan), delay
        self.draw = random.Random(seed)
        self.lines: list[str] = []
        self.done: list[Fault] = []
        self.resumed: list[tuple[int, bool]] = []  # (step, whether within an epoch) of each new beginning
        self._over = threading.Event()

    def listen(self, line: str) -> None:
        """A progress line of the run."""
        self.lines.append(line)
        if found := re.search(r"resumed after epoch \d+, step (\d+)(.*)", line):
            self.resumed.append((int(found[1]), "within an epoch" in found[2]))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Faults]:
        """While the block runs, the faults strike. Fails where one could not."""
        problems: list[BaseException] = []

        def strike() -> None:
            try:
                while self.plan and not self._over.wait(0.02):
                    self._strike()
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=strike, name="faults", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()
        assert not problems, problems

    def _strike(self) -> None:
        if len(self.resumed) < len(self.done):
            return  # the workers have not begun again since the last one
        after, what = self.plan[0]
        began = self.resumed[-1][0] if self.resumed else -1
        if last_checkpoint(self.run) < (max(after, began + 1) if what in ("kill", "write") else after):
            return
        if what == "write":
            self._strike_within_a_write(after)
            return
        time.sleep(self.draw.random() * self.delay)
        del self.plan[0]
        process = os.getpid() if what == "stop" else self.draw.choice(trainers())
        known = max(last_checkpoint(self.run), after)
        self.done.append(Fault(what, known))
        os.kill(process, signal.SIGKILL if what == "kill" else signal.SIGTERM)

    def _strike_within_a_write(self, after: int) -> None:
        while (half := half_written(self.run)) is None and not self._over.wait(0.001):
            pass
        if half is None:
            return
        workers = trainers()
        for process in workers:  # nothing is written any more
            os.kill(process, signal.SIGSTOP)
        victim = self.draw.choice(workers) if half_written(self.run) == half else None  # else the last file was faster
        if victim is not None:
            del self.plan[0]
            self.done.append(Fault("write", max(last_checkpoint(self.run), after), half.name))
            os.kill(victim, signal.SIGKILL)
        for process in workers:
            if process != victim:
                os.kill(process, signal.SIGCONT)


def tensors(checkpoint: str, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    dcp_to_torch_save(checkpoint, folder / "whole.pt")
    flat: dict[str, torch.Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}/{key}", item)
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    walk("", torch.load(folder / "whole.pt", weights_only=False))
    return flat
