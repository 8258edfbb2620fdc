"""Nodes and identities of a Kubernetes cluster (cluster/eks*.yaml, the commands of docs/kubernetes.md for GKE) against
the pods of the manifests: a pod that fits no node waits for ever, and one without an identity reads nothing."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.cluster.heads import ROOT
from tests.cluster.manifests import CLUSTER, MANIFESTS, groups

POOL = "roo-ray/pool"
GPU = "nvidia.com/gpu"
GUIDE = (ROOT / "docs/kubernetes.md").read_text()
MACHINES = {  # CPUs, GiB, GPUs; of the clouds' own lists
    "m7i.2xlarge": (8, 32, 0),
    "m6i.2xlarge": (8, 32, 0),
    "n2-standard-8": (8, 32, 0),
    "m7i.4xlarge": (16, 64, 0),
    "m6i.4xlarge": (16, 64, 0),
    "n2-standard-16": (16, 64, 0),
    "g6.12xlarge": (48, 192, 4),
    "g2-standard-48": (48, 192, 4),
}
OF_A_NODE = (0.6, 1.0)  # CPUs and GiB that the cloud's own pods ask for on every node


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind. ``most``: at most so many; ``markets``: spot, on-demand or both; ``taint``: a key or None."""

    machine: str
    most: int
    markets: frozenset[str]
    taint: str | None


def left_for_pods(machine: str) -> tuple[float, float, int]:
    """CPUs, GiB and GPUs of a node that pods may ask for, by the rules of both clouds: what they reserve for the system
    (Google's steps, in CPUs Amazon's as well; Karpenter takes 7.5 % of memory for what a machine lacks, and Amazon
    255 MiB and 11 MiB for each of 110 pods)."""
    cpus, memory, gpus = MACHINES[machine]
    cpu = 0.06 + 0.01 + 2 * 0.005 + (cpus - 4) * 0.0025
    if machine[0] in "ng" and "-" in machine:
        steps = ((4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06), (1 << 20, 0.02))
        reserved, rest = 0.1, float(memory)
        for size, share in steps:
            reserved += min(rest, size) * share
            rest -= min(rest, size)
    else:
        reserved = memory * 0.075 + (255 + 11 * 110 + 100) / 1024
    return cpus - cpu - OF_A_NODE[0], memory - reserved - OF_A_NODE[1], gpus


def eks_pools() -> dict[str, list[Pool]]:
    """Label -> the pools of cluster/eks-nodes.yaml, one for each machine type."""
    found: dict[str, list[Pool]] = {}
    for item in yaml.safe_load_all((CLUSTER / "eks-nodes.yaml").read_text()):
        if item["kind"] == "NodePool":
            template = item["spec"]["template"]
            wants = {want["key"]: want["values"] for want in template["spec"]["requirements"]}
            [taint] = [taint["key"] for taint in template["spec"].get("taints", [])] or [None]
            for machine in wants["node.kubernetes.io/instance-type"]:
                most = int(item["spec"]["limits"]["cpu"]) // MACHINES[machine][0]
                pool = Pool(machine, most, frozenset(wants["karpenter.sh/capacity-type"]), taint)
                found.setdefault(template["metadata"]["labels"][POOL], []).append(pool)
    return found


def gke_pools() -> dict[str, list[Pool]]:
    """Label -> the pools that the guide's commands make. GKE taints GPU nodes itself."""
    script = "\n".join(re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)).replace("\\\n", " ")
    variables: dict[str, str] = {}
    for name, value in re.findall(r'^([A-Z]+)="(.*)"$', script, re.MULTILINE):
        variables[name] = value.replace(f"${name}", variables.get(name, ""))
    commands = re.findall(r"^(?:gcloud container clusters create|pool) (.*)$", script, re.MULTILINE)
    found: dict[str, list[Pool]] = {}
    for command in commands:
        words = shlex.split(re.sub(r"\$([A-Z]+)$", lambda use: variables[str(use[1])], command))
        flags = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
        taint = flags.get("--node-taints", "").partition("=")[0] or (GPU if "--accelerator" in flags else None)
        market = frozenset(["spot" if "--spot" in words else "on-demand"])
        pool = Pool(flags["--machine-type"], int(flags["--max-nodes"]), market, taint)
        found.setdefault(flags["--node-labels"].removeprefix(f"{POOL}="), []).append(pool)
        gpus = re.search(r"count=(\d+),gpu-driver-version=latest", flags.get("--accelerator", ""))
        assert (int(gpus[1]) if gpus else 0) == MACHINES[pool.machine][2]
    return found


def pods() -> list[tuple[str, dict[str, Any], int]]:
    """(pool, pod, how many at most) of all manifests."""
    found = []
    for _, group in groups():
        kept = group["template"]["metadata"]["annotations"]
        assert kept["karpenter.sh/do-not-disrupt"] == "true"
        assert kept["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        found.append((group.get("groupName", "head"), group["template"]["spec"], group.get("maxReplicas", 1)))
    for item in yaml.safe_load_all((CLUSTER / "mlflow/kubernetes.yaml").read_text()):
        if item["kind"] in ("StatefulSet", "Deployment"):
            found.append(("head", item["spec"]["template"]["spec"], 1))
    return found


def gib(text: str) -> float:
    assert text.endswith("Gi")
    return float(text[:-2])


@pytest.mark.parametrize("pools", [eks_pools(), gke_pools()], ids=["eks", "gke"])
def test_every_pod_has_nodes_that_it_fits(pools: dict[str, list[Pool]]) -> None:
    assert {name: {pool.taint for pool in of} for name, of in pools.items()} == {
        "head": {None},  # what tolerates nothing has a place
        "data": {POOL},
        "trainer": {GPU},
    }
    assert {market for pool in pools["head"] for market in pool.markets} == {"on-demand"}
    for name in ("data", "trainer"):
        assert {market for pool in pools[name] for market in pool.markets} == {"spot", "on-demand"}
    for name, pod, most in pods():
        assert pod["nodeSelector"] == {POOL: name}
        tolerated = {item["key"] for item in pod.get("tolerations", [])}
        [container] = pod["containers"]
        wants = container["resources"]["requests"]
        for pool in pools[name]:
            cpus, memory, gpus = left_for_pods(pool.machine)
            assert tolerated == ({pool.taint} if pool.taint else set())
            assert float(wants["cpu"]) <= cpus, (name, pool)
            assert gib(wants["memory"]) <= memory, (name, pool)
            assert int(wants.get(GPU, 0)) == gpus, (name, pool)  # a part of a node's GPUs would leave others idle
            assert pool.most >= most


def test_one_head_mlflow_and_its_database_fit_one_node() -> None:
    """Beside the autoscaler in the head's pod: a small cluster is one node, until a job runs."""
    spec = yaml.safe_load(MANIFESTS[0].read_text())["spec"]
    together = [spec["autoscalerOptions"]["resources"]["requests"]]
    heads = [pod["containers"][0]["resources"]["requests"] for name, pod, _ in pods() if name == "head"]
    together += [heads[0], *heads[len(MANIFESTS) :]]  # of one of the manifests
    cpus = sum(
        float(wants["cpu"].removesuffix("m")) / (1000 if wants["cpu"].endswith("m") else 1) for wants in together
    )
    for pools in (eks_pools(), gke_pools()):
        for pool in pools["head"]:
            assert cpus <= left_for_pods(pool.machine)[0]
            assert sum(gib(wants["memory"]) for wants in together) <= left_for_pods(pool.machine)[1]


def test_the_pods_accounts_are_bound_to_the_bucket() -> None:
    accounts = {pod["serviceAccountName"] for _, pod, _ in pods() if "serviceAccountName" in pod}
    associations = yaml.safe_load((CLUSTER / "eks.yaml").read_text())["iam"]["podIdentityAssociations"]
    assert {item["serviceAccountName"] for item in associations} == accounts
    for item in associations:
        assert item["namespace"] == "default"
        [allowed] = item["permissionPolicy"]["Statement"]
        assert allowed["Resource"] == ["arn:aws:s3:::BUCKET", "arn:aws:s3:::BUCKET/*"]
        assert set(allowed["Action"]) == {
            f"s3:{verb}" for verb in ("GetObject", "PutObject", "DeleteObject", "ListBucket")
        }
    [bound] = re.findall(
        r"for name in (.*); do\n.*buckets add-iam-policy-binding.*\n.*/subject/ns/default/sa/\$name", GUIDE
    )
    assert set(bound.split()) == accounts
    assert set(re.findall(r"kubectl create serviceaccount (\S+)", GUIDE)) == accounts


def test_the_files_for_eks_name_one_cluster_and_its_volumes() -> None:
    cluster = yaml.safe_load((CLUSTER / "eks.yaml").read_text())
    items = list(yaml.safe_load_all((CLUSTER / "eks-nodes.yaml").read_text()))
    [nodes] = [item for item in items if item["kind"] == "NodeClass"]
    name = cluster["metadata"]["name"]
    assert nodes["spec"]["securityGroupSelectorTerms"] == [{"tags": {"aws:eks:cluster-name": name}}]
    assert nodes["spec"]["subnetSelectorTerms"][0]["tags"]["alpha.eksctl.io/cluster-name"] == name
    assert f"--name {name} " in GUIDE
    for item in items:
        if item["kind"] == "NodePool":
            assert item["spec"]["template"]["spec"]["nodeClassRef"]["name"] == nodes["metadata"]["name"]
    spilled = max(
        gib(volume["emptyDir"]["sizeLimit"])
        for _, pod, _ in pods()
        for volume in pod.get("volumes", [])
        if "medium" not in volume["emptyDir"]
    )
    assert gib(nodes["spec"]["ephemeralStorage"]["size"]) >= spilled + 50  # images beside it
    assert int(re.findall(r"--disk-size (\d+)", GUIDE)[-1]) >= (spilled + 50) * 2**30 / 1e9
    [volumes] = [item for item in items if item["kind"] == "StorageClass"]
    assert volumes["metadata"]["annotations"]["storageclass.kubernetes.io/is-default-class"] == "true"
