"""The files of cluster/ that several tests read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.heads import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHERS = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def groups() -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, group of pods) of all KubeRay manifests: of each the head's, then the workers'."""
    for path in MANIFESTS:
        spec = yaml.safe_load(path.read_text())["spec"]
        spec = spec.get("jobTemplate", spec)
        cluster = spec.get("rayClusterSpec", spec)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield path, group
