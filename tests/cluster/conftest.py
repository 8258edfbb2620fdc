"""Shared fixtures of the tests of clusters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mlflow_server import Server


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server on loopback, for the tests of one file."""
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()
