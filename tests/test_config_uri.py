"""A config by URI: a real S3 server on loopback, and file://."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from roo_ray.config import load_config
from roo_ray.errors import ConfigError, DataError
from roo_ray.storage import beside
from tests.cluster.heads import ROOT

CONFIGS = ROOT / "configs"


def test_config_and_schema_from_an_object_store() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "hunter2"}
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="configs")
        for name in ("demo.yaml", "schemas/synthetic.yaml"):
            client.put_object(Bucket="configs", Key=name, Body=(CONFIGS / name).read_bytes())
        base = "s3://testing:hunter2@configs/{}?scheme=http&region=us-east-1&endpoint_override=" + endpoint[7:]
        config = load_config(base.format("demo.yaml"), ["training.epochs=3"])
        assert config == load_config(CONFIGS / "demo.yaml", ["training.epochs=3"])
        with pytest.raises(ConfigError, match=r"config file not found: s3://configs/none\.yaml") as error:
            load_config(base.format("none.yaml"))
        assert "hunter2" not in str(error.value)
    finally:
        server.stop()


def test_file_uris() -> None:
    assert load_config((CONFIGS / "demo.yaml").as_uri()) == load_config(CONFIGS / "demo.yaml")
    with pytest.raises(DataError, match="cannot open nothing://") as error:
        load_config("nothing://id:hunter2@x/y.yaml")
    assert "hunter2" not in str(error.value)


def test_beside(tmp_path: Path) -> None:
    assert beside("/a/b.yaml", "c/d.yaml") == "/a/c/d.yaml"
    assert beside("s3://k/a/b.yaml?x=1", "c/d.yaml") == "s3://k/a/c/d.yaml?x=1"
    assert beside("s3://k/a/b.yaml", "gs://z/d.yaml") == "gs://z/d.yaml"
    assert beside("b.yaml", "/d.yaml") == "/d.yaml"
