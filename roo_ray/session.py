"""Ray as the jobs need it: settings that must stand before ``import ray``, a local or remote session, and the
check that Ray Data has CPUs left beside the trainers.

Import this module before ``ray``; ``connect`` starts or joins Ray.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, Literal

from roo_ray.config import RaySettings, Training
from roo_ray.errors import ClusterError

# Why each: docs/architecture.md, "Ray settings". A value set by the user wins.
ENVIRONMENT = {
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "60",
    "RAY_num_workers_soft_limit": "10",
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_TRAIN_ENABLE_V2": "1",
    "RAY_DEDUP_LOGS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def apply_environment() -> None:
    """Sets what must be set before ``import ray``, where the user has not set it.

    Authentication is left alone where a cluster is to be joined (``RAY_ADDRESS``). A local Ray runs without:
    otherwise it would write a token into the user's home, after which ``ray start`` turns authentication on
    and ``ray job submit`` is refused.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")


apply_environment()

import ray  # noqa: E402  (after the environment, on purpose)
from ray._private import ray_constants  # noqa: E402
from ray._private.services import get_node_ip_address  # noqa: E402
from ray.data import DataContext  # noqa: E402
from ray.data._internal.block_batching.util import iter_threaded  # noqa: E402
from ray.data._internal.execution.streaming_executor import StreamingExecutor  # noqa: E402
from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402

SECONDS_FOR_RESOURCES_TO_COME_BACK = 10.0
SECONDS_TO_HOLD_NODES = 2.0  # longer than an autoscaler mostly takes from looking at idle nodes to ending them
PLACING = "roo_ray.placing"


@contextmanager
def connect(
    settings: RaySettings,
    training: Training | None = None,
    say: Callable[[str], None] = lambda line: None,
    check: Literal["all", "data", "nothing"] = "all",
) -> Iterator[None]:
    """Joins the cluster at ``RAY_ADDRESS`` (a submitted job finds it set), or starts a local Ray on loopback
    for the duration of the block, and checks that the trainers, if any, leave CPUs for Ray Data. Ray Data's tasks
    and actors run on the nodes that the settings name (``data_labels``, ``data_resources``). ``say`` gets a line
    before it begins. ``check``: what must be there at once; with ``data`` the caller asks for the trainers by
    ``make_ready`` when it needs them.

    Raises ClusterError, before anything runs, where they do not fit.
    """
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    say(f"joining the Ray cluster at {address}" if address else "starting Ray on this machine")
    terminates = signal.getsignal(signal.SIGTERM)
    if address:
        try:
            with _on_loopback() if _is_on_loopback_alone(address) else nullcontext():
                ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ClusterError(
                f"no Ray cluster can be joined at '{address}' ({reason}); give the address of a head (HOST:6379, "
                "or auto) in ray.address or RAY_ADDRESS, or unset it to run on this machine. From outside the "
                "cluster, use ray job submit"
            ) from None
    else:
        most = training.most_workers if training else 0
        wanted = math.ceil(most * settings.cpus_per_worker + max(settings.data_cpus, 2))
        with _on_loopback():
            ray.init(
                address="local",  # without it, Ray joins whatever cluster was last started on this machine
                num_cpus=settings.local_cpus or max(os.cpu_count() or 1, wanted),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=settings.object_store_bytes,
                **options,
            )
    if callable(terminates) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminates)  # Ray has put its own there, which exits with 15
    quiet_data_context()
    place_data(Placing.of(settings))
    try:
        if check != "nothing":
            make_ready(settings, training if check == "all" else None, say)
        yield
    finally:
        end_iterations()
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within the block Ray takes 127.0.0.1 as it is given, and its processes then listen there alone. It does so on
    Windows and macOS; on Linux it would put the machine's address in its place, and listen on all interfaces, without
    authentication."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _is_on_loopback_alone(address: str) -> bool:
    """Whether a head's address is that of a Ray here that no other machine reaches, as ``connect`` starts it.
    Ray would look for it at the machine's address, without end."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    try:
        socket.create_connection((get_node_ip_address(), int(port)), timeout=5).close()
    except OSError:
        return True
    return False


_END_SECONDS = 60  # for the threads of what was left in the middle, which may be in a call of Ray


def end_iterations() -> None:
    """Ends what Ray Data still runs for iterations that were left in the middle, after an error say, and waits for it.
    It runs in threads of this process, and the first of them that calls Ray after its shutdown ends the process with
    1; an iteration that is collected later wants Ray for its end, too, and would start another one."""
    gc.collect()
    threads = threading.enumerate()
    executors = [thread for thread in threads if isinstance(thread, StreamingExecutor)]
    readers = [thread for thread in threads if thread.name == iter_threaded.__name__]
    for left in gc.get_objects() if readers else ():
        if isinstance(left, GeneratorType) and left.gi_code is iter_threaded.__code__:
            with suppress(Exception):
                left.close()  # its threads read no further
    for executor in executors:
        with suppress(Exception):
            executor.shutdown(force=True)  # waits 2 s for its thread, which a busy machine may not give it
    end = time.monotonic() + _END_SECONDS
    for thread in [*executors, *readers]:
        thread.join(max(0.0, end - time.monotonic()))


def make_ready(settings: RaySettings, training: Training | None, say: Callable[[str], None]) -> None:
    """Waits for the nodes of the trainers, if any, and of the data tasks, where the cluster is autoscaled
    (``wait_for_nodes_s``), again where one that came has gone. Raises ClusterError where they do not fit."""
    workers, gpu = (training.least_workers, training.gpu) if training else (0, False)
    autoscaled = "RAY_ADDRESS" in os.environ and settings.wait_for_nodes_s > 0
    deadline = time.monotonic() + settings.wait_for_nodes_s
    while autoscaled:
        left = deadline - time.monotonic()
        wait_for_nodes(settings.model_copy(update={"wait_for_nodes_s": max(left, 1.0)}), workers, gpu, say)
        try:
            return require_resources(settings, workers, gpu)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            say("a node that came has gone again, or another job has taken it")
    return require_resources(settings, workers, gpu)


@contextmanager
def nodes_held(settings: RaySettings, training: Training, say: Callable[[str], None]) -> Iterator[None]:
    """As ``make_ready``, and keeps the nodes for the block, of however short a time an idle node stays; their CPUs and
    GPUs are taken meanwhile. For what looks at nodes and takes none of their resources."""
    group = None
    if "RAY_ADDRESS" in os.environ and settings.wait_for_nodes_s:
        bundles, labels = wait_for_nodes(settings, training.least_workers, training.gpu, say)
        group = placement_group(bundles, bundle_label_selector=labels if any(labels) else None)
    else:
        require_resources(settings, training.least_workers, training.gpu)
    try:
        yield
    finally:
        if group is not None:
            remove_placement_group(group)


def require_resources(settings: RaySettings, workers: int, gpu: bool) -> None:
    """Raises ClusterError where the cluster has too few CPUs or GPUs for the trainers and Ray Data together, too few
    nodes of the labels and custom resources that they want, or where other jobs hold them.

    Two 1-CPU trainers on 2 CPUs would leave Ray Data none: the job would wait for ever without a word.
    """
    cpus_per_worker, data_cpus = settings.cpus_per_worker, settings.data_cpus
    total = ray.cluster_resources()
    needed = workers * cpus_per_worker + data_cpus
    cpus = total.get("CPU", 0)
    if cpus < needed:
        raise ClusterError(
            f"the cluster has {cpus:g} CPUs, and the job needs {needed:g}: {workers} workers of "
            f"{cpus_per_worker:g} and {data_cpus:g} for Ray Data; lower training.workers or "
            "ray.cpus_per_worker, or start Ray with more (logical) CPUs: ray start --head --num-cpus=N"
        )
    if gpu and total.get("GPU", 0) < workers:
        raise ClusterError(
            f"training.gpu is on and the cluster has {total.get('GPU', 0):g} GPUs for {workers} workers; "
            "lower training.workers, add GPU nodes, or set training.gpu=false"
        )
    require_places(settings, workers, gpu, [node for node in ray.nodes() if node["Alive"]])
    wanted = {"CPU": needed} | ({"GPU": float(workers)} if gpu else {})
    deadline = time.monotonic() + SECONDS_FOR_RESOURCES_TO_COME_BACK
    while short := {name: n for name, n in wanted.items() if ray.available_resources().get(name, 0) < n}:
        if time.monotonic() > deadline:
            free = ray.available_resources()
            words = [f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s" for name in short]
            raise ClusterError(
                f"other jobs hold the cluster: {' and '.join(words)} are free, and the job needs "
                f"{' and '.join(f'{n:g} {name}s' for name, n in short.items())}; wait for them (ray job list), or "
                "on an autoscaled cluster set ray.wait_for_nodes_s"
            )
        time.sleep(0.2)


def require_places(settings: RaySettings, workers: int, gpu: bool, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raises ClusterError where too few nodes (entries of ``ray.nodes()``) have the labels and custom resources that
    the config asks for: what is started for none would wait for ever. CPUs of all nodes together are not enough."""
    bundles, labels = bundles_of(settings, workers, gpu)
    for what, number, first in (("worker", workers, 0), ("data", len(bundles) - workers, workers)):
        if not number or not (labels[first] or set(bundles[first]) - {"CPU", "GPU"}):
            continue
        there, room = room_for(bundles[first], labels[first], nodes)
        if room < number:
            keys = [f"ray.{what}_labels {labels[first]}"] if labels[first] else []
            keys += [f"ray.{what}_resources {wants}"] if (wants := getattr(settings, f"{what}_resources")) else []
            raise ClusterError(
                f"the nodes with {' and '.join(keys)} ({there} of {len(nodes)}) have room for {room} of "
                f"{number} {'workers' if what == 'worker' else 'data CPUs'} of {words_of(bundles[first])}; start nodes "
                "with them (ray start --labels, --resources), correct the config, or on an autoscaled cluster set "
                "ray.wait_for_nodes_s"
            )


def room_for(
    bundle: Mapping[str, float], labels: Mapping[str, str], nodes: Sequence[Mapping[str, Any]]
) -> tuple[int, int]:
    """Of these nodes (entries of ``ray.nodes()``): how many have the labels, and for how many such bundles these have
    room, whoever holds it now."""
    there = [node for node in nodes if labels.items() <= node.get("Labels", {}).items()]
    each = (min(node["Resources"].get(name, 0.0) / one for name, one in bundle.items()) for node in there)
    return len(there), sum(map(int, each))


def wait_for_nodes(
    settings: RaySettings, workers: int, gpu: bool, say: Callable[[str], None]
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Asks an autoscaled cluster for what the job needs, and waits until it is there and free. Returns the places
    (``bundles_of``), with the labels of those that came.

    Asked by a placement group, which ends with this process: a standing request to the autoscaler would outlive a
    killed job, and keep its nodes. Ray's autoscaler takes node types by priority, and asks again and again for a type
    of which the cloud has none: after ``fall_back_after_s`` other labels bring another type. Raises ClusterError after
    ``settings.wait_for_nodes_s``.
    """
    bundles, labels = bundles_of(settings, workers, gpu)
    wanted = f"{workers} x {words_of(bundles[0])} for the trainers and " if workers else ""
    wanted += f"{settings.data_cpus:g} CPUs for data"
    if _come(bundles, labels, 1):
        return bundles, labels
    say(f"waiting up to {settings.wait_for_nodes_s:g} s for nodes with {wanted}")
    deadline = time.monotonic() + settings.wait_for_nodes_s
    if settings.fall_back_labels:
        if _come(bundles, labels, min(settings.wait_for_nodes_s, settings.fall_back_after_s)):
            return bundles, labels
        missing = [
            (whom, part)
            for whom, part in (("the trainers", slice(workers)), ("data", slice(workers, None)))
            if bundles[part] and not _come(bundles[part], labels[part], 1)
        ]
        for _, part in missing:
            labels[part] = [label | settings.fall_back_labels for label in labels[part]]
        if missing:
            names = " and ".join(whom for whom, _ in missing)
            say(f"no such nodes yet: asking for nodes with {settings.fall_back_labels} for {names}")
    if _come(bundles, labels, deadline - time.monotonic()):
        return bundles, labels
    total = {name: n for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    raise ClusterError(
        f"after {settings.wait_for_nodes_s:g} s (ray.wait_for_nodes_s) the cluster has {words_of(total)}, and not free "
        f"{wanted}; see ray status on the head: no node type may fit, max_workers be reached, or the cloud have none"
    )


def _come(bundles: list[dict[str, float]], labels: list[dict[str, str]], seconds: float) -> bool:
    """Asks for places, and whether they are there and free within so many seconds.

    Held for a moment: the autoscaler may just have decided to end a node that was idle, and asks it whether it is.
    Their idle time begins anew after it.
    """
    group = placement_group(bundles, bundle_label_selector=labels if any(labels) else None)
    try:
        came = bool(group.wait(max(seconds, 1)))
        if came:
            time.sleep(SECONDS_TO_HOLD_NODES)
        return came
    finally:
        remove_placement_group(group)


def bundles_of(settings: RaySettings, workers: int, gpu: bool) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """The resources of the job's trainers, then of its data tasks, one CPU each; the labels of their nodes."""
    trainer = {"CPU": settings.cpus_per_worker} | ({"GPU": 1.0} if gpu else {}) | settings.worker_resources
    data = math.ceil(settings.data_cpus)
    labels = [dict(settings.worker_labels)] * workers + [dict(settings.data_labels)] * data
    return [trainer] * workers + [{"CPU": 1.0} | settings.data_resources] * data, labels


def words_of(resources: Mapping[str, float]) -> str:
    """``4 CPU, 1 GPU``."""
    return ", ".join(f"{n:g} {name}" for name, n in resources.items()) or "nothing"


def alive_nodes() -> int:
    """Nodes of the cluster that are alive."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


@dataclass(frozen=True)
class Placing:
    """Where Ray Data's tasks and actors run: labels of their nodes, and custom resources that each takes."""

    labels: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(settings: RaySettings) -> Placing:
        """What the config says."""
        return Placing(dict(settings.data_labels), dict(settings.data_resources))


def place_data(placing: Placing) -> None:
    """From here on this process's Ray Data starts tasks and actors on such nodes only, whatever the operator. It
    knows labels by itself; custom resources are an argument of each operator (``placing().resources``)."""
    context = DataContext.get_current()
    context.execution_options.label_selector = dict(placing.labels) or None
    context.set_config(PLACING, placing)


def placing() -> Placing:
    """What ``place_data`` has set in this process."""
    found = DataContext.get_current().get_config(PLACING)
    return found if isinstance(found, Placing) else Placing()


def quiet_data_context() -> None:
    """Settings of Ray Data in this process: no progress bars, no per-operator log lines."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
