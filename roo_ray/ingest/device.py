"""Steps on the trainer's device: on a GPU the next step's batch is copied while this one is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from roo_ray.ingest.stream import Step


def on_device(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """The steps with their batches on ``device``. On a GPU from page-locked memory, by a stream of its own, one
    step ahead; a step's position stays its own."""
    if device.type != "cuda":
        for step in steps:
            yield replace(step, batch=step.batch.to(device))
        return
    copies = torch.cuda.Stream(device)

    def start(step: Step) -> tuple[Step, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            batch = step.batch.pin_memory().to(device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(copies)
        return replace(step, batch=batch), done

    coming = start(next(steps))
    while True:
        (step, done), coming = coming, start(next(steps))
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        step.batch.record_stream(current)
        yield step
