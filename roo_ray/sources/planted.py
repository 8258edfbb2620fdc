"""The planted world of the synthetic log: a catalogue, users with tastes, and the click model.

A user's events are one endless stream that is a pure function of (seed, user, number of the event): every
request of the user, in whichever task it is generated, sees the same stream up to its own time. A click's
probability is a deterministic function of logged columns and of two tables of the catalogue (item quality,
country effect), so the Bayes-optimal prediction is known:

    logit p = bias + AFFINITY * share / (share + HALF_SHARE) + quality[item] + country_effect[country]
              + POSITION * log(position) + FRESHNESS * log(1 + item_age_days) + AGE * (user_age - 40) / 20

``share`` is the share of the candidate's topic in the request's history, an event that is r places from the
newest weighing exp(-r / RECENCY): the interaction of history and candidate. It is 0 for an empty history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DAY_US = 86_400_000_000
START_US = 1_736_121_600_000_000  # 2025-01-06, a Monday: no request is earlier
COUNTRIES = 32

AFFINITY = 4.2
HALF_SHARE = 0.2
RECENCY = 32.0
POSITION = -0.2
FRESHNESS = -0.05
AGE = 0.1
QUALITY_SD = 0.3
COUNTRY_SD = 0.1

TOPIC_ZIPF = 0.6
ITEM_ZIPF = 1.0
TASTE = np.array([0.5, 0.3, 0.2])  # weights of a user's preferred topics, which may coincide
FOCUS_EVENTS = 8  # events in a row that share a focus topic
FOCUSED, STRAY = 0.5, 0.15  # shares of events on the focus topic, and on a topic that is popular with all
PREFERRED_CANDIDATES = 0.4
HISTORY_DAYS = 30  # older events are not logged
COLD_USERS = 0.04  # share of users who never leave an event

# streams of hashed random numbers
(_TASTE, _BIRTH, _RATE, _COLD, _AGE, _COUNTRY, _FOCUS, _KIND, _TOPIC, _ITEM, _JITTER) = range(11)


def _mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashed_uniform(seed: int, stream: int, *keys: Ints) -> Floats:
    """(N,) in [0, 1): random numbers that depend on seed, stream and keys (N,) alone."""
    state = _mix64(np.array([seed % 2**63], np.uint64))
    state = _mix64(state + np.uint64(stream + 1))
    for key in keys:
        state = _mix64(state * np.uint64(31) + key.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def zipf_cdf(size: int, exponent: float) -> Floats:
    """(size,) cumulative distribution of ranks 1 .. size with P proportional to rank^-exponent."""
    cdf = np.cumsum(np.arange(1, size + 1) ** -exponent)
    return np.asarray(cdf / cdf[-1], np.float64)


@dataclass(frozen=True)
class Catalogue:
    """Items, topics and countries.

    topic (items,) int64; quality (items,); published_us (items,) int64: before any event; topic_cdf (topics,);
    country_effect, country_cdf (COUNTRIES,). ``ranked`` (items,): items by topic, most popular first;
    ``item_cdf`` (items,): beside it, topic t's cumulative popularity in (t, t + 1].
    """

    topic: Ints
    quality: Floats
    published_us: Ints
    topic_cdf: Floats
    country_effect: Floats
    country_cdf: Floats
    ranked: Ints
    item_cdf: Floats

    def draw_items(self, topic: Ints, uniform: Floats) -> Ints:
        """(N,) items of the given topics (N,), Zipf by rank, from uniform (N,) in [0, 1)."""
        below_next = np.minimum(uniform, 1 - 1e-9)
        return self.ranked[np.searchsorted(self.item_cdf, topic + below_next, side="right")]

    def draw_topics(self, uniform: Floats) -> Ints:
        """(N,) topics by their popularity."""
        return np.searchsorted(self.topic_cdf, uniform, side="right").astype(np.int64)


def make_catalogue(seed: int, items: int, topics: int) -> Catalogue:
    """The catalogue of a seed. Needs ``items >= topics``; topics have equally many items (give or take one)."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**63, 0, 1])))
    ranked_topic = np.arange(items, dtype=np.int64) * topics // items
    sizes = np.bincount(ranked_topic, minlength=topics)
    rank = np.arange(items) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    cdf = zipf_cdf(int(sizes.max()), ITEM_ZIPF)
    item_cdf = ranked_topic.astype(np.float64) + np.minimum(cdf[rank] / cdf[sizes[ranked_topic] - 1], 1.0)
    ranked = rng.permutation(items).astype(np.int64)
    topic = np.empty(items, np.int64)
    topic[ranked] = ranked_topic
    return Catalogue(
        topic=topic,
        quality=rng.normal(0, QUALITY_SD, items),
        published_us=START_US - ((HISTORY_DAYS + rng.exponential(200, items)) * DAY_US).astype(np.int64),
        topic_cdf=zipf_cdf(topics, TOPIC_ZIPF),
        country_effect=rng.normal(0, COUNTRY_SD, COUNTRIES),
        country_cdf=zipf_cdf(COUNTRIES, 1.0),
        ranked=ranked,
        item_cdf=np.asarray(item_cdf, np.float64),
    )


def preferred_topics(catalogue: Catalogue, seed: int, user: Ints) -> Ints:
    """(N, 3) the preferred topics of users (N,), in the order of ``TASTE``."""
    each = [hashed_uniform(seed, _TASTE, user, np.full_like(user, place)) for place in range(len(TASTE))]
    return np.stack([catalogue.draw_topics(uniform) for uniform in each], axis=1)


def draw_taste(uniform: Floats) -> Ints:
    """(N,) places in a user's preferred topics, by ``TASTE``."""
    return np.searchsorted(np.cumsum(TASTE)[:-1], uniform, side="right").astype(np.int64)


@dataclass(frozen=True)
class Profiles:
    """Of users (N,): age in years, expected events per day (0: cold user), country, all as logged; and the
    time of the first event and the mean gap between events, in microseconds."""

    age: npt.NDArray[np.int32]
    activity: npt.NDArray[np.float32]
    country: npt.NDArray[np.int32]
    birth_us: Ints
    gap_us: Ints


def profiles(catalogue: Catalogue, seed: int, user: Ints, history_length: int) -> Profiles:
    """The profiles of users (N,). A user in the middle leaves half of ``history_length`` in HISTORY_DAYS."""
    spread = _normal(hashed_uniform(seed, _RATE, user))
    per_day = max(history_length, 1) / HISTORY_DAYS * 0.5 * np.exp(0.9 * spread)
    cold = hashed_uniform(seed, _COLD, user) < COLD_USERS
    country = np.searchsorted(catalogue.country_cdf, hashed_uniform(seed, _COUNTRY, user), side="right")
    birth = START_US - (90 * DAY_US * hashed_uniform(seed, _BIRTH, user)).astype(np.int64)
    return Profiles(
        age=np.clip(38 + 13 * _normal(hashed_uniform(seed, _AGE, user)), 16, 90).astype(np.int32),
        activity=np.where(cold, 0, per_day).astype(np.float32),
        country=country.astype(np.int32),
        birth_us=birth,
        gap_us=np.maximum((DAY_US / per_day).astype(np.int64), 1),
    )


def _normal(uniform: Floats) -> Floats:
    """Roughly standard normal, by the logistic quantile cut to +-3.5: enough for skewed traits."""
    u = np.clip(uniform, 1e-9, 1 - 1e-9)
    return np.clip(np.log(u / (1 - u)) * 0.5513, -3.5, 3.5)


@dataclass(frozen=True)
class Histories:
    """Histories of requests, oldest event first: lengths (N,), and of all events (T,) their request (row),
    item, topic and time in microseconds."""

    lengths: Ints
    row: Ints
    item: Ints
    topic: Ints
    time_us: Ints


def histories(
    catalogue: Catalogue,
    seed: int,
    user: Ints,
    time_us: Ints,
    profile: Profiles,
    taste: Ints,
    history_length: int,
) -> Histories:
    """The last events of each request's user strictly before its time: at most ``history_length``, and none
    older than HISTORY_DAYS.

    Event k happens within the k-th gap after the user's birth, in integer microseconds, so order and
    "before" hold exactly.
    """
    happened = np.maximum(time_us - profile.birth_us, 0) // profile.gap_us
    happened[profile.activity == 0] = 0
    recent = HISTORY_DAYS * DAY_US // profile.gap_us - 1
    lengths = np.minimum(np.minimum(happened, np.maximum(recent, 0)), history_length)
    row = np.repeat(np.arange(len(user)), lengths)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    event = (happened - lengths)[row] + place
    who = user[row]
    kind = hashed_uniform(seed, _KIND, who, event)
    own = draw_taste(hashed_uniform(seed, _TOPIC, who, event))
    focus = draw_taste(hashed_uniform(seed, _FOCUS, who, event // FOCUS_EVENTS))
    topic = taste[row, np.where(kind < FOCUSED, focus, own)]
    stray = np.flatnonzero(kind >= 1 - STRAY)
    topic[stray] = catalogue.draw_topics(hashed_uniform(seed, _TOPIC, who[stray], event[stray]))
    item = catalogue.draw_items(topic, hashed_uniform(seed, _ITEM, who, event))
    jitter = (hashed_uniform(seed, _JITTER, who, event) * profile.gap_us[row]).astype(np.int64)
    when = profile.birth_us[row] + event * profile.gap_us[row] + np.minimum(jitter, profile.gap_us[row] - 1)
    return Histories(lengths, row, item, topic, when)


def topic_share(history: Histories, row: Ints, topic: Ints) -> Floats:
    """(N,) weighted share of a topic (N,) in the history of request ``row`` (N,); 0 for an empty history."""
    ends = np.cumsum(history.lengths)
    age = ends[history.row] - 1 - np.arange(len(history.row))  # 0: the newest event
    weight = np.exp(-age / RECENCY)
    total = np.bincount(history.row, weight, len(history.lengths))
    span = int(max(history.topic.max(initial=0), topic.max(initial=0))) + 1
    seen, place = np.unique(history.row * span + history.topic, return_inverse=True)
    sums = np.append(np.bincount(place, weight, len(seen)), 0.0)
    key = row * span + topic
    found = np.searchsorted(seen, key)
    hit = np.append(seen, -1)[found] == key
    return np.where(hit, sums[found], 0) / np.maximum(total[row], 1e-12)


def other_effects(
    catalogue: Catalogue,
    item: npt.NDArray[Any],
    position: npt.NDArray[Any],
    item_age_days: npt.NDArray[Any],
    user_age: npt.NDArray[Any],
    country: npt.NDArray[Any],
) -> Floats:
    """(N,) the logit's terms that do not depend on the history, without the bias; all inputs (N,) as logged."""
    effects = catalogue.quality[item] + catalogue.country_effect[country]
    effects = effects + POSITION * np.log(position) + FRESHNESS * np.log1p(item_age_days.astype(np.float64))
    return np.asarray(effects + AGE * (user_age - 40) / 20, np.float64)


def affinity(share: Floats) -> Floats:
    """(N,) the logit's term of history x candidate."""
    return np.asarray(AFFINITY * share / (share + HALF_SHARE), np.float64)


def sigmoid(logit: Floats) -> Floats:
    """1 / (1 + exp(-logit))."""
    return np.asarray(1 / (1 + np.exp(-logit)), np.float64)


def bias_for_rate(logit: Floats, rate: float) -> float:
    """The bias at which the mean of sigmoid(bias + logit) is ``rate``."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logit + middle).mean() < rate else (low, middle)
    return (low + high) / 2
