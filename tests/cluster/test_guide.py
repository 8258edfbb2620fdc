"""docs/cluster.md and docs/kubernetes.md, the guide: its files, commands and config are those that there are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from roo_ray.cluster.places import build_reads
from roo_ray.cluster.price_files import read_prices
from roo_ray.config import load_config
from tests.cluster.heads import ROOT
from tests.cluster.manifests import LAUNCHERS, MANIFESTS
from tests.cluster.test_files import guides_config

KUBERNETES = (ROOT / "docs/kubernetes.md").read_text()
# of KubeRay 1.7 (ray-operator/pkg/features): on by default; what else a kind or a field needs
KUBERAY_GATES = (
    "RayClusterStatusConditions",
    "RayJobDeletionPolicy",
    "RayMultiHostIndexing",
    "RayServiceIncrementalUpgrade",
)
GATE_OF = {
    "kind: RayCronJob": "RayCronJob",
    "tlsOptions:": "RayClusterMTLS",
    "networkPolicy:": "RayClusterNetworkPolicy",
}


def test_the_guide_names_what_there_is(tmp_path: Path) -> None:
    """Its config and prices are valid, its jobs and files exist, and nodes have its labels."""
    guide = (ROOT / "docs/cluster.md").read_text()
    config = load_config(guides_config(tmp_path))
    settings = config.ray
    submitted = re.findall(r"ray job submit .*?-- (?:\\\n *)?python (jobs/\w+\.py)([^\n]*)", guide)
    steps = [job for job, _ in submitted]
    assert steps[:3] == ["jobs/build_requests.py", "jobs/preflight.py", "jobs/train.py"]
    assert all("--config $STORE/configs/train.yaml" in arguments for _, arguments in submitted)
    assert config.source is not None, "jobs/build_requests.py has nothing to build from"
    assert config.run_name
    assert config.tracking.uri  # SQLite is refused on several nodes
    assert all(path.startswith("s3://BUCKET/") for path in (config.requests, config.storage, *build_reads(config)))
    for path in LAUNCHERS:
        labels = [kind.get("labels", {}) for kind in yaml.safe_load(path.read_text())["available_node_types"].values()]
        for wanted in (settings.data_labels, settings.worker_labels):
            assert any((wanted | settings.fall_back_labels).items() <= label.items() for label in labels)
    (prices,) = re.findall(r"prices.yaml <<EOF\n(.*?)EOF", guide, re.DOTALL)
    (tmp_path / "prices.yaml").write_text(prices)
    sizes = read_prices(str(tmp_path / "prices.yaml"))
    aws = yaml.safe_load(LAUNCHERS[0].read_text())["available_node_types"]
    assert sizes.trainers_per_node == aws["trainer_spot"]["resources"]["GPU"]
    assert sizes.data_node_cpus == aws["data_spot"]["resources"]["CPU"]
    files = set(re.findall(r"\b((?:jobs|benchmarks|packaging|cluster|roo_ray)/[\w/.-]+\.\w+)", guide + KUBERNETES))
    assert len(files) > 10
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_guides_commands_are_bash_and_use_what_is_set_before(tmp_path: Path) -> None:
    guide = (ROOT / "docs/cluster.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", guide + KUBERNETES, re.DOTALL)
    script = "\n".join(blocks)
    done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    known = {"name", "role", "image", "kind", "1", "IP"}  # of loops, of a function, of the head's own shell
    for line in script.splitlines():
        line = line.partition(" #")[0]
        used = set(re.findall(r"\$\{?(\w+)", line))
        assert used <= known, f"{used - known} in: {line}"
        known |= set(re.findall(r"(?:export |^)([A-Z_]+)=", line))
    assert "REGISTRY/" not in re.sub(r"\$REGISTRY/", "", script)


def test_the_operator_acts_on_all_that_the_manifests_ask_for() -> None:
    """helm replaces a list whole, and an operator without the gate leaves the object as it is, without a word."""
    (values,) = re.findall(r"kuberay.yaml <<EOF\n(.*?)EOF", KUBERNETES, re.DOTALL)
    gates = {gate["name"] for gate in yaml.safe_load(values)["featureGates"] if gate["enabled"] is True}
    assert set(KUBERAY_GATES) <= gates
    for path in MANIFESTS:
        text = path.read_text()
        lines = {line.strip() for line in text.splitlines()}
        wanted = {gate for mark, gate in GATE_OF.items() if mark in lines}
        assert wanted <= gates, path
        header = " ".join(line for line in text.splitlines() if line.startswith("#"))
        assert all(f"feature gate {gate} on" in header for gate in wanted), path
