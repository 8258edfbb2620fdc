"""CPU, GPU, memory, disk and network of rank 0's node, read by MLflow's own monitors (``system/...``)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from roo_ray.training.tracking import RunLogger

SECONDS_BETWEEN_SAMPLES = 10.0  # a sample costs about 20 ms of CPU


@contextmanager
def system_metrics(logger: RunLogger) -> Iterator[None]:
    """Samples while the block runs, in a thread, into the run's queue: a server that is down or slow neither stops the
    block nor the sampling. A sample's step is its number since the run began, so that a restarted run goes on with
    its steps. Nothing where tracking is off. GPUs need ``nvidia-ml-py`` (extra ``gpu``)."""
    if logger.run.uri is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(logger, ended), name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _sample(logger: RunLogger, ended: threading.Event) -> None:
    monitors = _monitors()
    psutil.cpu_percent()  # it gives the share since a thread's call before, and 0 in a new thread
    while not ended.wait(SECONDS_BETWEEN_SAMPLES):
        values: dict[str, float] = {}
        for monitor in monitors:
            with suppress(Exception):  # a figure that the machine does not give is no reason to miss the others
                monitor.collect_metrics()
                values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        logger.metrics(values, int((time.time() - logger.run.started) / SECONDS_BETWEEN_SAMPLES))


def _monitors() -> list[Any]:
    """Those that work here. Importing them imports MLflow, which takes seconds: in the thread."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
        with suppress(Exception):  # no such device, or no library for it
            monitors.append(kind())
    return monitors
