"""The checks of a cluster and a config: facts of the nodes -> findings. Pure; ``probe`` and ``links`` ask the nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from roo_ray.cluster.findings import Finding, fail, ok, skip, warn
from roo_ray.cluster.links import Links
from roo_ray.cluster.memory import USABLE, WorkerMemory
from roo_ray.cluster.places import trainer_resources, workers_least, workers_wanted
from roo_ray.cluster.probe import DISTRIBUTIONS, NodeFacts
from roo_ray.config import Config
from roo_ray.errors import BadInput
from roo_ray.grace import GRACE_VARIABLE
from roo_ray.storage import is_local
from roo_ray.terminal import human_bytes
from roo_ray.training.hosts import TABLES_SHARE
from roo_ray.training.layout import in_time

TRIPLES = {  # torch -> (torchrec, fbgemm)
    "2.11": ("1.6", "1.6"),
    "2.12": ("1.7", "1.7"),
    "2.13": ("1.8", "1.8"),
}
LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}  # CUDA of the torch build -> major version of NVIDIA's driver
LEAST_GRACE_S = 30.0
LEAST_OBJECT_STORE = 300_000_000
LEAST_DISK = 10_000_000_000
BRING = "bring the nodes: jobs/preflight.py --bring, which waits for them as a run does (ray.wait_for_nodes_s)"
LEAST_BANDWIDTH = 100_000_000  # bytes per second; below it a step waits for the network


def check_nodes(nodes: Sequence[NodeFacts], silent: Sequence[str]) -> list[Finding]:
    """Nodes that did not answer, and whether the head, of which a run's end depends, is among those that did."""
    todo = "run the same image on every node, with roo_ray's dependencies in it (ray status, the node's logs)"
    findings = [fail("nodes", f"{name} does not answer", todo) for name in silent]
    if not nodes:
        findings.append(fail("nodes", "no node answers", todo))
    elif not any(node.is_head for node in nodes):
        findings.append(fail("nodes", f"the head is not among the {len(nodes)} nodes that answer", todo))
    return findings or [ok("nodes", f"{len(nodes)} nodes answer, the head among them")]


def _nobody(check: str) -> Finding:
    return fail(check, "no node answers", "see nodes")


def check_versions(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Equal on all nodes; torch, torchrec and fbgemm of one release."""
    if not nodes:
        return [_nobody("versions")]
    findings = []
    for name in ("python", *DISTRIBUTIONS):
        # CPU and GPU builds of one release differ in name or local part alone
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            version = node.versions.get(name, "none").partition("+")[0]
            by_version.setdefault(version, []).append(node.node)
        if name.startswith("fbgemm"):
            by_version.pop("none", None)
        if len(by_version) > 1:
            words = "; ".join(f"{v} on {', '.join(where)}" for v, where in sorted(by_version.items()))
            findings.append(fail("versions", f"{name} differs: {words}", "build all images from one commit"))
    for node in nodes:
        release = {name: ".".join(v.split(".")[:2]) for name, v in node.versions.items()}
        fbgemm = release.get("fbgemm-gpu-cpu", release.get("fbgemm-gpu", "none"))
        found = (release.get("torchrec", "none"), fbgemm)
        wanted = TRIPLES.get(release.get("torch", "none"))
        if wanted is not None and found != wanted:
            findings.append(
                fail(
                    "versions",
                    f"{node.node}: torch {release['torch']} with torchrec {found[0]} and fbgemm {found[1]}",
                    f"install torchrec {wanted[0]} and fbgemm {wanted[1]} (cluster/requirements-*.txt)",
                )
            )
        elif wanted is None:
            text = f"{node.node}: torch {release.get('torch', 'none')} is untried here"
            findings.append(warn("versions", text, f"take torch {', '.join(TRIPLES)}"))
    if findings:
        return findings
    first = nodes[0].versions
    names = [f"{name} {first[name]}" for name in ("python", "ray", "torch", "torchrec") if name in first]
    return [ok("versions", f"equal on {len(nodes)} nodes: {', '.join(names)}")]


def room_for(config: Config, nodes: Sequence[NodeFacts]) -> int:
    """How many of the run's trainers the nodes with its labels have room for, were they free."""
    wanted = trainer_resources(config)
    places = [node for node in nodes if config.ray.worker_labels.items() <= node.labels.items()]
    totals = [node.resources | {"CPU": node.cpus, "GPU": node.gpus} for node in places]
    return sum(int(min(has.get(name, 0.0) // one for name, one in wanted.items() if one)) for has in totals)


def workers_here(config: Config, nodes: Sequence[NodeFacts]) -> int:
    """The trainers that the run would begin with on these nodes: of an elastic one as many as there is room for."""
    return max(workers_least(config), min(workers_wanted(config), room_for(config, nodes)))


def check_places(config: Config, nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Whether nodes have the labels, CPUs, GPUs and custom resources that the config asks for. An elastic run wants
    room for its fewest workers. Where an autoscaler may still bring them, what is missing is not checked."""
    findings = []
    training, settings = config.training, config.ray
    for what, wanted in (
        ("ray.worker_labels", settings.worker_labels),
        ("ray.data_labels", settings.data_labels),
    ):
        if wanted and not any(wanted.items() <= node.labels.items() for node in nodes):
            todo = "label the nodes (cluster/*.yaml), or wait for the autoscaler: ray.wait_for_nodes_s"
            text = f"no node has {what} {wanted}"
            later = settings.wait_for_nodes_s
            findings.append(skip("places", text, BRING) if later else fail("places", text, todo))
    room, least, most = room_for(config, nodes), workers_least(config), workers_wanted(config)
    of = "" if set(trainer_resources(config)) <= {"CPU", "GPU"} else f" of {trainer_resources(config)}"
    if room < least:
        todo = "lower training.workers, add nodes, or set ray.wait_for_nodes_s on an autoscaled cluster"
        text = f"room for {room} of {least} workers{of}"
        findings.append(skip("places", text, BRING) if settings.wait_for_nodes_s else fail("places", text, todo))
    elif room < most:
        todo = "none is needed: it begins with fewer and grows; add nodes for it to be sooner done"
        findings.append(warn("places", f"room for {room} of {least} to {most} elastic workers{of}", todo))
    trainers = [node for node in nodes if settings.worker_labels.items() <= node.labels.items()]
    if training.gpu and not any(node.gpus for node in trainers):
        findings.append(skip("gpus", "driver, CUDA and kernels: no trainer node with a GPU is there", BRING))
    for node in trainers:
        least_driver = LEAST_DRIVER.get(node.cuda.partition(".")[0])
        if (
            training.gpu
            and node.gpus
            and least_driver
            and node.driver
            and int(node.driver.split(".")[0]) < least_driver
        ):
            text = f"{node.node}: NVIDIA driver {node.driver}, and torch is built for CUDA {node.cuda}"
            findings.append(fail("gpus", text, f"a machine image with a driver from {least_driver} on"))
        if training.gpu and node.gpus and len(node.gpu_names) < node.gpus:
            text = f"{node.node}: Ray counts {node.gpus:g} GPUs and torch sees {len(node.gpu_names)}"
            findings.append(fail("gpus", text, "take the GPU image, and a driver for its CUDA"))
        if training.gpu and node.gpus and node.kernel:
            text = f"{node.node}: attention without its kernel, slower and in more memory: {node.kernel}"
            findings.append(warn("gpus", text, "take the GPU image, or install triton, gcc and libc6-dev"))
    return findings or [ok("places", f"room for {room} workers; {most} wanted")]


def check_reach(nodes: Sequence[NodeFacts], places: Sequence[str]) -> list[Finding]:
    """Storage and MLflow from every node."""
    if not nodes:
        return [_nobody("reach")]
    todo = "give the nodes' identity the rights, open the network, or correct the address"
    findings = [
        fail("reach", f"{node.node} cannot use {place}: {problem}", todo)
        for node in nodes
        for place, problem in node.problems.items()
    ]
    return findings or [ok("reach", f"{len(nodes)} nodes reach {', '.join(places)}")]


def check_local_paths(nodes: Sequence[NodeFacts], written: Sequence[str], read: Sequence[str]) -> list[Finding]:
    """Local paths on a cluster of several nodes are different disks, unless all nodes mount one there. What is
    ``written`` there must be seen by all; what is ``read`` may be there on each."""
    if len(nodes) < 2:
        return []
    todo = "use s3://... or gs://..., or a file system that all nodes mount there (NFS)"
    findings = []
    for path in sorted({path for path in written if is_local(path)}):
        blind = [node.node for node in nodes if path in node.unseen]
        if blind:
            text = f"{path} is not one folder on {len(nodes)} nodes: {', '.join(blind)} cannot see a file written there"
            findings.append(fail("storage", text, todo))
        else:
            findings.append(ok("storage", f"{len(nodes)} nodes see one folder at {path}"))
    if local := sorted({path for path in read if is_local(path)} - set(written)):
        findings.append(warn("storage", f"local paths on {len(nodes)} nodes: {', '.join(local)}", todo))
    return findings


def check_memory(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Shared memory, object stores, disks to spill to."""
    findings = [] if nodes else [_nobody("memory")]
    for node in nodes:
        if node.shared_memory < node.object_store:
            shm, store = human_bytes(node.shared_memory), human_bytes(node.object_store)
            text = f"{node.node}: {shm} of /dev/shm, object store {store}"
            findings.append(warn("shared memory", text, "enlarge /dev/shm (--shm-size; emptyDir of medium Memory)"))
        if node.object_store < LEAST_OBJECT_STORE and node.cpus:
            text = f"{node.node}: object store of {human_bytes(node.object_store)}"
            findings.append(warn("object store", text, f"--object-store-memory of at least {LEAST_OBJECT_STORE}"))
        if node.object_store > 0.6 * node.memory:
            text = f"{node.node}: object store {human_bytes(node.object_store)} of {human_bytes(node.memory)}"
            findings.append(warn("object store", text, "leave the workers' own memory: about 30 % is the store's"))
        if node.disk_free < LEAST_DISK:
            text = f"{node.node}: {human_bytes(node.disk_free)} free for spilling"
            findings.append(warn("disk", text, f"at least {human_bytes(LEAST_DISK)}: a larger disk, or --temp-dir"))
    if findings:
        return findings
    least = min((node.object_store for node in nodes), default=0)
    return [ok("memory", f"object stores of at least {human_bytes(least)}, all within /dev/shm")]


def check_order(config: Config, look: Callable[[], None] | None) -> list[Finding]:
    """Whether the data lies in the order of time, where that is asked for. ``look`` raises BadInput where it does not;
    None: there is no data set yet, and the config says how it will be built."""
    if not in_time(config):
        return []
    built = f"build.order={config.build.order} and build.buckets={config.build.buckets}"
    if look is None:
        if config.build.order == "time" and config.build.buckets == 1:
            return [ok("order", f"{built}: days will lie in order of time")]
        todo = "build: {order: time, buckets: 1}"
        return [fail("order", f"{built}: days of several row groups will not lie in order of time", todo)]
    try:
        look()
    except BadInput as error:
        return [fail("order", str(error), "build the data set again, before trainers come")]
    return [ok("order", "the data lies in order of time")]


def check_grace(nodes: Sequence[NodeFacts], checkpoint_s: float = 0.0) -> list[Finding]:
    """What `ray job stop` leaves a run for its last checkpoint, on the head."""
    wanted = max(LEAST_GRACE_S, 3 * checkpoint_s)
    todo = f"{GRACE_VARIABLE}={max(300, round(wanted))} where ray start --head runs"
    head = next((node for node in nodes if node.is_head), None)
    if head is None:
        return [fail("job stop", "the head does not answer", "see nodes")]
    if math.isnan(head.grace_s):
        return [fail("job stop", f"{GRACE_VARIABLE} on the head is no whole number: Ray stops no job then", todo)]
    if head.grace_s < wanted:
        text = f"the head gives a stopped job {head.grace_s:g} s, and its last checkpoint wants {wanted:g}"
        return [fail("job stop", text, todo)]
    return [ok("job stop", f"a stopped job has {head.grace_s:g} s")]


def check_links(measure: Callable[[], Links]) -> list[Finding]:
    """Whether the workers see each other, and how fast. ``measure`` raises ClusterError where they do not."""
    try:
        links = measure()
    except RuntimeError as error:
        return [fail("network", str(error), "open all ports between the nodes; NCCL_DEBUG=INFO says more")]
    except ValueError as error:  # ClusterError
        return [fail("network", str(error), "free places (ray status), open all ports between the nodes")]
    if links.world == 1:
        return [ok("network", f"{links.backend}: one worker, nothing to exchange")]
    text = (
        f"{links.backend} over {links.world} workers on {links.nodes} nodes: all-reduce "
        f"{human_bytes(links.all_reduce)}/s, all-to-all {human_bytes(links.all_to_all)}/s, "
        f"{links.latency_s * 1e3:.1f} ms"
    )
    if min(links.all_reduce, links.all_to_all) < LEAST_BANDWIDTH:
        return [warn("network", text, "place the trainers close together; choose nodes with more network")]
    return [ok("network", text)]


def check_plan(
    memory: WorkerMemory, nodes: Sequence[NodeFacts], config: Config, activations: bool = False
) -> list[Finding]:
    """Whether the fullest worker's tables, state and batch (``sizing.memory_of``) fit its GPU, with its share of the
    host's memory for tables that the planner puts there (UVM), or without a GPU its share of a node's memory beside
    the object store. ``activations``: whether what a step holds until backward is in it."""
    without = "" if activations else ", activations not counted (--costs does)"
    labels, training = config.ray.worker_labels, config.training
    needs = memory.device
    room, host = [], []
    for node in nodes:
        if not labels.items() <= node.labels.items() or node.cpus < config.ray.cpus_per_worker:
            continue
        here = min(int(node.cpus // config.ray.cpus_per_worker), workers_wanted(config))
        if training.gpu and node.gpus:
            room.append(float(node.gpu_memory))
            host.append(TABLES_SHARE * (node.memory - node.object_store) / min(here, int(node.gpus)))
        elif not training.gpu:
            room.append((node.memory - node.object_store) / here)
    if not room:
        return [skip("plan", f"a worker needs {human_bytes(needs)}{without}, and no trainer node is there", BRING)]
    text = f"the fullest worker needs {human_bytes(needs)} of {human_bytes(min(room))}{without}"
    todo = "more workers, row-wise tables (training.row_wise_from), fp16 weights, smaller batches"
    in_host = memory.in_host(USABLE * min(room)) if training.gpu else None
    if in_host:
        text += f"; {human_bytes(in_host)} of tables in host memory, of {human_bytes(min(host))}, slower"
        return [warn("plan", text, todo) if in_host <= min(host) else fail("plan", text, todo)]
    if needs > 0.9 * min(room):
        return [fail("plan", text, todo)]
    return [warn("plan", text, todo)] if needs > 0.7 * min(room) else [ok("plan", text)]
