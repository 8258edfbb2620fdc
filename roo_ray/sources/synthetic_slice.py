"""A slice of the synthetic log: what one generator task makes, as Arrow; a pure function of the settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_ray.errors import BadInput
from roo_ray.source_config import SyntheticSource
from roo_ray.sources import planted
from roo_ray.sources.planted import Catalogue, Floats, Histories, Ints, Profiles

CLICK_RATE = 0.125
_PILOT_REQUESTS = 2_000
_PILOT_TASK = 2**40
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Slice:
    """The requests of a task (R) and their impressions (N), grouped by request; ``row`` (N,) is the request of
    each impression, ``probability`` (N,) float32 as logged."""

    request_id: Ints
    user: Ints
    time_us: Ints
    profile: Profiles
    history: Histories
    row: Ints
    item: Ints
    topic: Ints
    position: Ints
    item_age_days: npt.NDArray[np.float32]
    share: Floats
    probability: npt.NDArray[np.float32]
    clicked: npt.NDArray[np.int8]
    scattered: Ints

    @property
    def request_table(self) -> pa.Table:
        """(R rows) the request-level columns."""
        offsets = np.concatenate([[0], np.cumsum(self.history.lengths)]).astype(np.int32)

        def lists(values: pa.Array) -> pa.ListArray:
            return pa.ListArray.from_arrays(pa.array(offsets), values)

        return pa.table(
            {
                "request_id": pa.array(self.request_id),
                "user_id": pa.array(self.user),
                "request_time": pa.array(self.time_us).cast(_TIME),
                "user_age": pa.array(self.profile.age),
                "user_activity": pa.array(self.profile.activity),
                "country_id": pa.array(self.profile.country),
                "history_item": lists(pa.array(self.history.item.astype(np.int32))),
                "history_topic": lists(pa.array(self.history.topic.astype(np.int32))),
                "history_time": lists(pa.array(self.history.time_us).cast(_TIME)),
            }
        )

    @property
    def impression_table(self) -> pa.Table:
        """(N rows) the impression-level columns."""
        return pa.table(
            {
                "item_id": pa.array(self.item.astype(np.int32)),
                "topic_id": pa.array(self.topic.astype(np.int32)),
                "position": pa.array(self.position.astype(np.int32)),
                "item_age_days": pa.array(self.item_age_days),
                "clicked": pa.array(self.clicked),
                "click_probability": pa.array(self.probability),
            }
        )

    def tables(self, parts: int) -> Iterator[pa.Table]:
        """The log's rows in their scattered order, in ``parts`` tables of about equal size."""
        requests, impressions = self.request_table, self.impression_table
        for rows in np.array_split(self.scattered, parts):
            table = requests.take(pa.array(self.row[rows]))
            for name, column in zip(impressions.column_names, impressions.take(pa.array(rows)).columns, strict=True):
                table = table.append_column(name, column)
            yield table


def tasks_of(source: SyntheticSource) -> int:
    """Number of generator tasks."""
    return math.ceil(source.requests / source.requests_per_task)


def check_settings(source: SyntheticSource) -> None:
    """Raises BadInput, naming the setting, where the settings cannot be met together."""
    if source.mean_impressions > source.max_impressions:
        raise BadInput(
            f"source.mean_impressions {source.mean_impressions:g} is more than source.max_impressions "
            f"{source.max_impressions}; raise max_impressions"
        )
    if source.items < source.topics:
        raise BadInput(f"source.items {source.items} is less than source.topics {source.topics}")
    if source.items < 2 * source.max_impressions:
        raise BadInput(
            f"source.items {source.items} must be at least twice source.max_impressions "
            f"{source.max_impressions}: the items of a request differ"
        )


def generate_slice(source: SyntheticSource, task: int) -> pa.Table:
    """The rows of one task, in scattered order; needs no Ray. Raises BadInput where settings do not fit."""
    check_settings(source)
    if not 0 <= task < tasks_of(source):
        raise BadInput(f"task {task} is outside 0 .. {tasks_of(source) - 1}")
    return next(make_slice(source, task).tables(1))


def make_slice(source: SyntheticSource, task: int) -> Slice:
    """The requests of a task: numbers ``task * requests_per_task`` and following."""
    first = task * source.requests_per_task
    count = min(source.requests_per_task, source.requests - first)
    return _sample(source, task, first, count, catalogue_of(source), bias_of(source))


@lru_cache(maxsize=2)
def catalogue_of(source: SyntheticSource) -> Catalogue:
    """The catalogue of a source, made once per process."""
    return planted.make_catalogue(source.seed, source.items, source.topics)


@lru_cache(maxsize=8)
def bias_of(source: SyntheticSource) -> float:
    """The bias of the click model's logit, from a pilot sample, so that about CLICK_RATE of rows are clicks."""
    catalogue = catalogue_of(source)
    pilot = _sample(source, _PILOT_TASK, 0, _PILOT_REQUESTS, catalogue, 0.0)
    return planted.bias_for_rate(_logit(catalogue, pilot), CLICK_RATE)


def _logit(catalogue: Catalogue, rows: Slice) -> Floats:
    return planted.affinity(rows.share) + planted.other_effects(
        catalogue,
        rows.item,
        rows.position,
        rows.item_age_days,
        rows.profile.age[rows.row],
        rows.profile.country[rows.row],
    )


def _sample(source: SyntheticSource, task: int, first: int, count: int, catalogue: Catalogue, bias: float) -> Slice:
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([source.seed % 2**63, task])))
    # users in Zipf order with exponent 1/2, which has a closed form; the prime spreads them over the ids
    rank = (source.users * rng.random(count) ** 2).astype(np.int64)
    user = np.minimum(rank, source.users - 1) * 2_654_435_761 % source.users
    time_us = planted.START_US + (rng.random(count) * source.days * planted.DAY_US).astype(np.int64)
    profile = planted.profiles(catalogue, source.seed, user, source.history_length)
    taste = planted.preferred_topics(catalogue, source.seed, user)
    history = planted.histories(catalogue, source.seed, user, time_us, profile, taste, source.history_length)

    shown = np.searchsorted(impressions_cdf(source.mean_impressions, source.max_impressions), rng.random(count))
    shown = np.minimum(shown, source.max_impressions - 1) + 1
    row = np.repeat(np.arange(count), shown)
    position = np.arange(len(row)) - np.repeat(np.cumsum(shown) - shown, shown) + 1
    item = _candidates(rng, catalogue, taste, row)
    topic = catalogue.topic[item]
    age_days = ((time_us[row] - catalogue.published_us[item]) / planted.DAY_US).astype(np.float32)

    unknown = np.zeros(len(row), np.float32)
    rows = Slice(
        request_id=_request_ids(first, count),
        user=user,
        time_us=time_us,
        profile=profile,
        history=history,
        row=row,
        item=item,
        topic=topic,
        position=position,
        item_age_days=age_days,
        share=planted.topic_share(history, row, topic),
        probability=unknown,
        clicked=unknown.astype(np.int8),
        scattered=rng.permutation(len(row)),
    )
    probability = planted.sigmoid(_logit(catalogue, rows) + bias).astype(np.float32)
    clicked = (rng.random(len(row)) < probability).astype(np.int8)
    return replace(rows, probability=probability, clicked=clicked)


def _request_ids(first: int, count: int) -> Ints:
    """(count,) unique ids, not in order: an odd factor is a bijection modulo 2^63."""
    number = np.arange(first, first + count, dtype=np.uint64)
    mixed = number * np.uint64(0x5851F42D4C957F2D) + np.uint64(0x14057B7EF767814F)
    return (mixed & np.uint64(2**63 - 1)).astype(np.int64)


@lru_cache(maxsize=8)
def impressions_cdf(mean: float, most: int) -> Floats:
    """(most,) cumulative distribution of the number of impressions 1 .. most: geometric, cut at ``most``, its
    ratio chosen so that the mean after the cut is ``mean``."""
    numbers = np.arange(most, dtype=np.float64)
    low, high = -50.0, 50.0
    for _ in range(80):
        rate = (low + high) / 2
        weights = np.exp(rate * numbers - max(rate * (most - 1), 0.0))
        low, high = (rate, high) if (weights * (numbers + 1)).sum() / weights.sum() < mean else (low, rate)
    cdf = np.cumsum(weights)
    return np.asarray(cdf / cdf[-1], np.float64)


def _candidates(rng: np.random.Generator, catalogue: Catalogue, taste: Ints, row: Ints) -> Ints:
    """(N,) items, no two alike in a request: of the user's preferred topics or of topics popular with all.

    Repeated items are drawn again, after some rounds evenly from the whole catalogue, so that it ends.
    """
    items = len(catalogue.topic)
    item = np.zeros(len(row), np.int64)
    missing = np.arange(len(row))
    rounds = 0
    while len(missing):
        if rounds < 6:
            preferred = taste[row[missing], planted.draw_taste(rng.random(len(missing)))]
            popular = catalogue.draw_topics(rng.random(len(missing)))
            own = rng.random(len(missing)) < planted.PREFERRED_CANDIDATES
            item[missing] = catalogue.draw_items(np.where(own, preferred, popular), rng.random(len(missing)))
        else:
            item[missing] = rng.integers(0, items, len(missing))
        key = row * items + item
        order = np.argsort(key, kind="stable")
        repeated = np.flatnonzero(key[order][1:] == key[order][:-1]) + 1
        missing = order[repeated]
        rounds += 1
    return item
