"""Where a job's trainers and data tasks go, and what it asks of an autoscaler."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data import DataContext
from ray.util.placement_group import placement_group_table

from roo_ray import session
from roo_ray.config import RaySettings
from roo_ray.errors import ClusterError
from roo_ray.session import Placing, bundles_of, place_data, placing, require_places


def node(labels: dict[str, str], **resources: float) -> dict[str, Any]:
    """As ``ray.nodes()`` says it."""
    return {"Labels": labels, "Resources": resources}


def test_nodes_without_the_labels_do_not_count() -> None:
    """Otherwise a job's tasks would wait for ever for a node that is not there."""
    settings = RaySettings(worker_labels={"role": "trainer"}, data_labels={"role": "data"}, data_cpus=2)
    trainers, data = node({"role": "trainer"}, CPU=4.0, GPU=4.0), node({"role": "data"}, CPU=2.0)
    require_places(settings, 4, True, [trainers, data])
    require_places(settings, 0, False, [data])
    with pytest.raises(ClusterError, match=r"ray.data_labels \{'role': 'data'\} \(0 of 1\) have room for 0 of 2"):
        require_places(settings, 4, True, [trainers])
    with pytest.raises(ClusterError, match=r"ray.worker_labels .* have room for 4 of 5 workers of 1 CPU, 1 GPU"):
        require_places(settings, 5, True, [trainers, data])
    disks = RaySettings(data_resources={"disk": 0.5})
    require_places(disks, 4, True, [node({}, CPU=8.0, disk=1.0)])
    with pytest.raises(ClusterError, match=r"ray.data_resources \{'disk': 0.5\}"):
        require_places(disks, 4, True, [node({}, CPU=8.0)])


def test_what_ray_data_starts_goes_where_the_config_says() -> None:
    """By Ray Data's own context, which every dataset made in the process takes a copy of."""
    try:
        place_data(Placing.of(RaySettings(data_labels={"role": "data"}, data_resources={"disk": 1})))
        assert DataContext.get_current().execution_options.label_selector == {"role": "data"}
        assert placing() == Placing({"role": "data"}, {"disk": 1})
    finally:
        place_data(Placing())
    assert DataContext.get_current().execution_options.label_selector is None


def test_what_a_job_asks_an_autoscaler_for() -> None:
    settings = RaySettings(
        worker_labels={"role": "trainer"},
        worker_resources={"fast": 1},
        data_labels={"role": "data"},
        data_resources={"disk": 0.5},
        data_cpus=1.5,
    )
    bundles, labels = bundles_of(settings, 2, True)
    assert bundles == [{"CPU": 1, "GPU": 1, "fast": 1}] * 2 + [{"CPU": 1, "disk": 0.5}] * 2
    assert labels == [{"role": "trainer"}] * 2 + [{"role": "data"}] * 2


def test_other_nodes_are_asked_for_where_the_first_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for, one after the other, of a cluster that has data nodes and no spot trainers; that Ray's
    autoscaler then brings them is in test_submitted_job."""
    asked: list[list[dict[str, str]]] = []

    def come(bundles: list[dict[str, float]], labels: list[dict[str, str]], seconds: float) -> bool:
        asked.append([dict(label) for label in labels])
        return all(label["role"] == "data" or "market" in label for label in labels)

    monkeypatch.setattr(session, "_come", come)
    settings = RaySettings(
        worker_labels={"role": "trainer"},
        data_labels={"role": "data"},
        wait_for_nodes_s=60,
        fall_back_after_s=5,
        fall_back_labels={"market": "on_demand"},
    )
    said: list[str] = []
    session.wait_for_nodes(settings, 2, True, said.append)
    trainer, data = {"role": "trainer"}, {"role": "data"}
    other = trainer | {"market": "on_demand"}
    both = [trainer, trainer, data]
    assert asked == [both, both, [trainer, trainer], [data], [other, other, data]]
    assert "for the trainers" in said[-1]
    assert "data" not in said[-1].partition("for the trainers")[2]


def test_nodes_that_came_are_held_for_a_moment(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are let go then: an autoscaler asks an idle node whether it is idle before it ends it."""
    known = set(placement_group_table())
    slept: list[tuple[float, list[str]]] = []

    def states() -> list[str]:
        return [group["state"] for name, group in placement_group_table().items() if name not in known]

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: slept.append((seconds, states())))
    monkeypatch.setattr(session, "time", clock)
    assert session._come([{"CPU": 1.0}], [{}], 60)
    assert slept == [(session.SECONDS_TO_HOLD_NODES, ["CREATED"])]
    assert states() == ["REMOVED"]


def test_nodes_that_went_again_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the config says, and no longer."""
    waited: list[float] = []
    gone = iter([True, True, False])

    def come(bundles: list[dict[str, float]], labels: list[dict[str, str]], seconds: float) -> bool:
        waited.append(seconds)
        return True

    def look(*settings: Any) -> None:
        if next(gone):
            raise ClusterError("the cluster has 0 CPUs")

    monkeypatch.setenv("RAY_ADDRESS", "anywhere")
    monkeypatch.setattr(session, "_come", come)
    monkeypatch.setattr(session, "require_resources", look)
    said: list[str] = []
    session.make_ready(RaySettings(wait_for_nodes_s=60), None, said.append)
    assert len(waited) == 3
    assert said == ["a node that came has gone again, or another job has taken it"] * 2
    gone = iter([True, True])
    with pytest.raises(ClusterError, match="0 CPUs"):
        session.make_ready(RaySettings(wait_for_nodes_s=1e-9), None, said.append)
