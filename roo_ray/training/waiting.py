"""While no worker of a job runs: nodes with the fall-back labels are asked for, and at last the job is to end.

Ray Train by itself waits for nodes for ever, and asks for those that the cloud has none of.
"""

from __future__ import annotations

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from roo_ray import session
from roo_ray.config import RaySettings, Training
from roo_ray.errors import NoWorkers
from roo_ray.training.progress import Say


class Waiting:
    """``look`` is to be called all the time while Ray Train runs, by one thread. ``then``: what to do about the
    error, for its message."""

    def __init__(self, settings: RaySettings, training: Training, say: Say, then: str) -> None:
        self.settings, self.training, self.say, self.then = settings, training, say, then
        self.workers = training.least_workers
        bundles, labels = session.bundles_of(settings, 1, training.gpu)
        self.bundle, self.labels = bundles[0], labels[0]
        self.falls_back = bool(settings.fall_back_labels and settings.wait_for_nodes_s)
        self._request: PlacementGroup | None = None
        self._asked = 0  # places in it

    def look(self, silent: float) -> NoWorkers | None:
        """What is to be done after so many seconds in which no worker has run: the error to end with, if any."""
        if silent > self.settings.wait_for_workers_s:
            return NoWorkers(self._words(silent))
        if self.falls_back and silent >= self.settings.fall_back_after_s:
            self._ask()
        else:
            self.close()
        return None

    def close(self) -> None:
        """Takes the request for other nodes back."""
        if self._request is not None:
            remove_placement_group(self._request)
            self._request, self._asked = None, 0

    def _ask(self) -> None:
        """Asks the autoscaler for nodes with the fall-back labels in the place of those that are missing, as long as
        they are. Where there are such nodes already, they would take the request for the missing ones: so it is for as
        many places as there are to be on all of them."""
        labels = self.labels | self.settings.fall_back_labels
        missing, there = self.workers - self._room(self.labels)[1], self._room(labels)[1]
        wanted = missing + there if missing > 0 else 0  # none is missing: others hold them, or the workers are starting
        if wanted == self._asked:
            return
        self.close()
        if wanted:
            self._request = placement_group([self.bundle] * wanted, bundle_label_selector=[labels] * wanted)
            self._asked = wanted
            self.say(
                f"no worker has run for {self.settings.fall_back_after_s:g} s: asking for nodes with "
                f"{self.settings.fall_back_labels} for {missing} of {self.workers} workers"
            )

    def _room(self, labels: dict[str, str]) -> tuple[int, int]:
        """Nodes with these labels, and how many workers they have room for, whoever holds it."""
        return session.room_for(self.bundle, labels, [node for node in ray.nodes() if node["Alive"]])

    def _words(self, silent: float) -> str:
        settings, bundle, (nodes, room) = self.settings, session.words_of(self.bundle), self._room(self.labels)
        least = "" if isinstance(self.training.workers, int) else "at least "
        number = f"{least}{self.workers} worker{'' if self.workers == 1 else 's'}"
        where = f" on nodes with ray.worker_labels {self.labels}" if self.labels else ""
        there = f"{nodes} such node{'' if nodes == 1 else 's'} with " if self.labels else ""
        available = ray.available_resources()
        free = session.words_of({name: available.get(name, 0.0) for name in self.bundle})
        other = f", nor nodes with ray.fall_back_labels {settings.fall_back_labels}" if self.falls_back else ""
        return (
            f"no worker has run for {silent:.0f} s (ray.wait_for_workers_s={settings.wait_for_workers_s:g}): the job "
            f"waits for {number} of {bundle}{where}, and the cluster has {there}room for {room}, with {free} free on "
            f"all nodes together{other}. See ray status on the head: no such node may come, the cluster's max_workers "
            f"be reached, or other jobs hold them. {self.then}"
        )
