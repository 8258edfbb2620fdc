"""A driver with a Ray of two nodes: prints how many of five feeds, which a task on the second node opens, lie there. A
process of its own, as the tests have another Ray."""

from __future__ import annotations

import sys

from roo_ray import session  # first: it sets what must stand before ray is imported

import ray  # isort: skip
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roo_ray.config import Holdout, Ingest
from roo_ray.ingest.feed import open_feed
from roo_ray.ingest.stream import StreamSettings
from tests.ingest import shard_maker


@ray.remote(num_cpus=0)
def open_some(count: int) -> list[bool]:
    """Of so many feeds: whether each lies on this task's node."""
    schema = shard_maker.schema()
    how = StreamSettings("nowhere", 1, schema, Ingest(), Holdout(), "train", 0, (0,), "shuffled")
    here = ray.get_runtime_context().get_node_id()
    feeds = [open_feed(how, [[0]], 0.0) for _ in range(count)]
    return [node == here for node in ray.get([f.__ray_call__.remote(node_of_this) for f in feeds])]


def node_of_this(actor: object) -> str:
    return str(ray.get_runtime_context().get_node_id())


def main() -> None:
    ray._private.utils.write_ray_address = lambda *where: None  # this Ray is not the machine's default one
    small = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={**small, "include_dashboard": False})
    try:
        second = cluster.add_node(**small)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        session.place_data(session.Placing())
        there = NodeAffinitySchedulingStrategy(second.node_id, soft=False)
        found = ray.get(open_some.options(scheduling_strategy=there).remote(5))  # type: ignore[attr-defined]
        print("feeds at home:", sum(found))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
