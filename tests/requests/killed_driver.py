"""A build in a process of its own, for tests that kill it: python -m tests.requests.killed_driver FOLDER POINT

It builds FOLDER/requests from FOLDER/log in the Ray at RAY_ADDRESS and prints what the build says. At the first line
that contains POINT it says so once more and waits to be killed.
"""

from __future__ import annotations

import sys
import time

from roo_ray import session
from roo_ray.config import Build, Config, RaySettings
from roo_ray.requests.join import build_requests
from roo_ray.source_config import ImpressionSource
from tests.requests.tables import small_schema

WAITING = "waiting to be killed"


def config_of(folder: str) -> Config:
    """The config of the build."""
    return Config(
        name="test",
        schema=small_schema(),
        source=ImpressionSource(kind="impressions", path=[f"{folder}/log"]),
        requests=f"{folder}/requests",
        build=Build(row_group_requests=4, buckets=3),
    )


def main(folder: str, point: str) -> None:
    """Builds, and stops at the point."""

    def progress(line: str) -> None:
        print(line, flush=True)
        if point and point in line:
            print(WAITING, flush=True)
            time.sleep(600)

    with session.connect(RaySettings()):
        print("connected", flush=True)
        build_requests(config_of(folder), progress)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
