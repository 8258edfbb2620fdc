"""CPU, GPU, memory, disk and network of rank 0's node, by MLflow's own system metrics (``system/...``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from roo_ray.training.tracking import RunHandle

SECONDS_BETWEEN_SAMPLES = 10.0  # a sample costs about 20 ms of CPU
SECONDS_TO_END = 5.0


@contextmanager
def system_metrics(run: RunHandle) -> Iterator[None]:
    """Samples while the block runs, in a thread; a restarted run goes on with its steps. A store that does not answer
    costs a warning. Nothing where tracking is off. GPUs need ``nvidia-ml-py``."""
    if run.uri is None:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run.run_id, sampling_interval=SECONDS_BETWEEN_SAMPLES, resume_logging=True, tracking_uri=run.uri
    )
    monitor.start()
    try:
        yield
    finally:
        # it waits for a sample under way: for minutes, where the server is down
        ending = threading.Thread(target=monitor.finish, name="system-metrics-end", daemon=True)
        ending.start()
        ending.join(SECONDS_TO_END)
