"""Which nodes Ray's own scheduler of the autoscaler would launch for a job, from the launcher files: no cloud."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from roo_ray.config import load_config
from roo_ray.session import bundles_of
from tests.cluster.heads import ROOT
from tests.cluster.test_files import LAUNCHERS, name_of

JOB = ["training.workers=8", "ingest.lanes=8", "training.gpu=true", "ray.cpus_per_worker=8", "ray.data_cpus=24"]
JOB += ["ray.worker_labels={role: trainer}", "ray.data_labels={role: data}"]
ON_DEMAND = {"market": "on_demand"}


Group = tuple[list[dict[str, float]], list[dict[str, str]]]


def launched(path: Path, *groups: Group) -> dict[str, int]:
    """Node type -> nodes that would be launched for placement groups of bundles on nodes with labels. Fails where one
    of them fits no type, or not beside the others."""
    config = AutoscalingConfig(yaml.safe_load(path.read_text()), skip_content_hash=True)
    equals = LabelSelectorOperator.LABEL_OPERATOR_IN
    gangs = [
        GangResourceRequest(
            requests=[
                ResourceRequestUtil.make(
                    bundle, label_selectors=[[(key, equals, [value]) for key, value in label.items()]]
                )
                for bundle, label in zip(bundles, labels, strict=True)
            ]
        )
        for bundles, labels in groups
    ]
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=gangs,
        )
    )
    assert not reply.infeasible_gang_resource_requests
    return {request.instance_type: request.count for request in reply.to_launch}


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_nodes_for_trainers_and_for_data(path: Path) -> None:
    """8 GPUs on 2 nodes of 4, 24 data CPUs on 2 of 16: spot ones, or those that the labels of falling back name; never
    a data task on a GPU node, though it would fit."""
    config = load_config(ROOT / "configs/demo.yaml", JOB)
    bundles, labels = bundles_of(config.ray, 8, True)
    assert launched(path, (bundles, labels)) == {"trainer_spot": 2, "data_spot": 2}
    others = [label | ON_DEMAND for label in labels[:8]] + labels[8:]
    assert launched(path, (bundles, others)) == {"trainer_on_demand": 2, "data_spot": 2}
    others = [label | ON_DEMAND for label in labels]
    assert launched(path, (bundles, others)) == {"trainer_on_demand": 2, "data_on_demand": 2}
    assert launched(path, (bundles[8:], labels[8:])) == {"data_spot": 2}


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_other_nodes_come_while_ray_train_asks_for_spot_ones(path: Path) -> None:
    """Of a run on all nodes that there may be, which has lost its spot ones: the requests of Ray Train and Ray Data for
    them stand, and count, however often the cloud has refused them."""
    job = ["training.workers=32", "ingest.lanes=32", "ray.data_cpus=256"]
    config = load_config(ROOT / "configs/demo.yaml", [*JOB, *job])
    bundles, labels = bundles_of(config.ray, 32, True)
    others = [label | ON_DEMAND for label in labels]
    nodes = launched(path, (bundles, labels), (bundles, others))
    assert nodes == {"trainer_spot": 8, "trainer_on_demand": 8, "data_spot": 16, "data_on_demand": 16}
