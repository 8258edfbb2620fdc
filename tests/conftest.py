"""Shared fixtures. Tests never touch the user's own runs: roo_ray's home is a temporary folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["ROO_RAY_HOME"] = tempfile.mkdtemp(prefix="roo_ray_tests_")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)

import pytest
from hypothesis import HealthCheck, settings

from roo_ray import session
from roo_ray.config import RaySettings

# Time is no property: a busy machine must not fail a test. The examples are the same in every run, so that a failure
# comes from a change; `pytest --hypothesis-profile explore` tries others.
anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("the same", anywhere, derandomize=True)
settings.register_profile("explore", anywhere, max_examples=200)
settings.load_profile("the same")

ROOT = Path(__file__).parents[1]
EBNERD = ROOT.parent / "shared" / "data" / "ebnerd"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with 4 logical CPUs (enough for 2 trainers and Ray Data), shared by the whole test run."""
    with session.connect(RaySettings(local_cpus=4, object_store_bytes=500_000_000)):
        yield


@pytest.fixture(scope="session")
def ebnerd_folder() -> Path:
    """The folder with EB-NeRD's real files; skips where it is missing."""
    if not (EBNERD / "behaviors.parquet").is_file():
        pytest.skip(f"real data not found at {EBNERD}; the same path is tested on generated data")
    return EBNERD


@pytest.fixture
def bucket() -> Iterator[Callable[[str], str]]:
    """Path -> its URI in a bucket on an S3 server on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
        aws_access_key_id="key", aws_secret_access_key="hunter2",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    yield lambda path: f"s3://key:hunter2@bucket/{path}?{query}"
    server.stop()
