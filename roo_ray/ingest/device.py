"""Steps on the trainer's device: on a GPU the next step's batch is copied while this one is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from roo_ray.ingest.stream import Step


def on_device(
    steps: Iterator[Step], device: torch.device, copied: Callable[[float], None] | None = None
) -> Iterator[Step]:
    """The steps with their batches on ``device``. On a GPU from page-locked memory, by a stream of its own, one
    step ahead; a step's position stays its own. ``copied``: gets the seconds that each copy took on the device."""
    if device.type != "cuda":
        for step in steps:
            yield replace(step, batch=step.batch.to(device))
        return
    copies = torch.cuda.Stream(device)

    def start(step: Step) -> tuple[Step, torch.cuda.Event, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            began = torch.cuda.Event(enable_timing=True)
            began.record()
            batch = step.batch.pin_memory().to(device, non_blocking=True)
            done = torch.cuda.Event(enable_timing=True)
            done.record(copies)
        return replace(step, batch=batch), began, done

    coming = start(next(steps))
    while True:
        (step, began, done), coming = coming, start(next(steps))
        if copied is not None and done.query():  # else it is not over yet: nothing waits for it here
            copied(began.elapsed_time(done) / 1000)
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        step.batch.record_stream(current)
        yield step
