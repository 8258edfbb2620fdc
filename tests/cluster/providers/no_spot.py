"""Ray's fake nodes in a cloud that has no spot nodes to give. Loaded by the autoscaler of a head (``ray_head``)."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException


class NoSpot(FakeMultiNodeProvider):
    """Refuses nodes that are labelled ``market: spot``, as a cloud does."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: dict[str, str]
    ) -> Any:
        if labels.get("market") == "spot":
            raise NodeLaunchException("InsufficientInstanceCapacity", "no spot nodes", None)
        return super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
