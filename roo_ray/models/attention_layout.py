"""How the tokens of a batch's sequences lie in length buckets, each padded to its own longest: what attention on
jagged batches computes on, made once per batch and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from roo_ray.ingest.batch import segment_positions

TIME_BUCKETS = 64  # half octaves: up to 2**32 seconds
MOST_BUCKETS = 24  # on CPU: more pad less, and are smaller matrices
QUERIES_PER_BLOCK = 80  # a block skips the keys after it, but a small one is not worth its launches
# What takes as long as the work on so many pairs of a query and a key, with 2 heads of 32:
LAUNCHES = 6_000  # of a bucket, and again of each of its blocks
SLOT = 15  # what a slot moves, beside its pairs


def time_buckets(seconds: Tensor) -> Tensor:
    """Logarithmic buckets, two per octave: float32 seconds (below 1 counts as 1) -> int32 in [0, TIME_BUCKETS).

    The exponent and the first bit of the mantissa of a float32 are its logarithm in half octaves.
    """
    half_octaves = (seconds.clamp(min=1.0).view(torch.int32) >> 22) - (127 << 1)
    return half_octaves.clamp_(max=TIME_BUCKETS - 1)


def ranks_from_end(lengths: Tensor) -> Tensor:
    """(T,) int64: how many places before the request each event stands, 1 for the newest."""
    return torch.repeat_interleave(lengths, lengths) - segment_positions(lengths)


@dataclass(frozen=True)
class Bucket:
    """Sequences padded to one length: R rows of L slots.

    ``tokens`` (T_b,) int64: the tokens of these sequences; ``slots`` (T_b,) int64: their places in the R * L
    slots; ``newest`` (R,) int64: each sequence's last token; ``ages`` (R, L) float32 as in ``layout``, 0 where there
    is no token; None without times.
    """

    rows: int
    length: int
    tokens: Tensor
    slots: Tensor
    newest: Tensor
    ages: Tensor | None
    _sources: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, compare=False)
    _gaps: list[Tensor] = field(default_factory=list, compare=False)
    _bias_rows: dict[tuple[int, int, int, bool], Tensor] = field(default_factory=dict, compare=False)

    def pad(self, values: Tensor) -> Tensor:
        """(T, C) of all tokens -> (R * L, C), 0 where there is no token."""
        padded = values.new_zeros(self.rows * self.length, values.shape[1])
        return padded.index_copy_(0, self.slots, values.index_select(0, self.tokens))

    def split_heads(self, values: Tensor, parts: int, heads: int, padding: int | None = None) -> Tensor:
        """(T, parts * H * d) of all tokens -> (parts, H * R, L, d). Padding takes the row ``padding``; without, the
        newest token of its own sequence, which no query of a token looks at."""
        count = parts * heads
        if (count, padding) not in self._sources:
            source = (
                self.newest.repeat_interleave(self.length)
                if padding is None
                else self.newest.new_full((self.rows * self.length,), padding)
            )
            source[self.slots] = self.tokens
            source = source.to(_index_type(values.shape[0] * count))
            part = torch.arange(count, device=source.device, dtype=source.dtype).unsqueeze(1)
            self._sources[count, padding] = torch.add(part, source, alpha=count).flatten()
        rows = values.reshape(values.shape[0] * count, -1)
        picked = rows.index_select(0, self._sources[count, padding])
        return picked.view(parts, heads * self.rows, self.length, rows.shape[1])

    def gaps(self) -> Tensor | None:
        """(R, L, L) int32: buckets of the time between each query and key; made once, for all layers. None without
        times."""
        if self.ages is not None and not self._gaps:
            self._gaps.append(time_buckets(self.ages[:, None, :] - self.ages[:, :, None]))
        return self._gaps[0] if self._gaps else None

    def bias_rows(self, first: int, last: int, reach: int, timed: bool) -> Tensor:
        """(R, last - first, last) int32, or (1, ...) where not ``timed``: of the queries ``first`` to ``last`` and the
        keys before ``last``, the row in a flat table of (time bucket, distance), or of distances alone. There are
        ``reach`` distances, and one more for keys after their query. Made once, for all layers."""
        key = (first, last, reach, timed)
        if key not in self._bias_rows:
            place = torch.arange(last, dtype=torch.int32, device=self.tokens.device)
            distance = place[first:, None] - place  # (S, last)
            distance = torch.where(distance < 0, reach, distance.clamp_(max=reach - 1)).unsqueeze(0)
            if timed:
                assert self.ages is not None
                gaps = time_buckets(self.ages[:, None, :last] - self.ages[:, first:last, None])  # (R, S, last)
                distance = gaps.mul_(reach + 1).add_(distance)
            self._bias_rows[key] = distance
        return self._bias_rows[key]


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch's sequences lie in buckets.

    ``lengths``, ``ages``: what it was made of, for kernels that need no buckets.
    """

    total: int
    buckets: tuple[Bucket, ...]
    lengths: Tensor
    ages: Tensor | None
    _places: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def parts_of(self, rows: Tensor, parts: int, heads: int) -> list[Tensor]:
        """Views of (parts * H * sum of R * L, d), one bucket after the other: (parts, H * R, L, d) each."""
        sizes = [parts * heads * bucket.rows * bucket.length for bucket in self.buckets]
        return [
            part.view(parts, heads * bucket.rows, bucket.length, rows.shape[1])
            for bucket, part in zip(self.buckets, rows.split(sizes), strict=True)
        ]

    def slots(self) -> int:
        """Sum of R * L over the buckets."""
        return sum(bucket.rows * bucket.length for bucket in self.buckets)

    def join_heads(self, rows: Tensor, parts: int, heads: int) -> Tensor:
        """What ``parts_of`` has views of -> (T, parts * H * d)."""
        count = parts * heads
        if count not in self._places:
            kind = _index_type(rows.shape[0])
            place = torch.empty(self.total, count, dtype=kind, device=self.lengths.device)
            start = 0
            for bucket in self.buckets:
                size = bucket.rows * bucket.length
                part = torch.arange(count, dtype=kind, device=place.device) * size + start
                place[bucket.tokens] = bucket.slots.to(kind).unsqueeze(1) + part
                start += count * size
            self._places[count] = place.flatten()
        return rows.index_select(0, self._places[count]).view(self.total, count * rows.shape[1])


def layout(lengths: Tensor, ages: Tensor | None, max_buckets: int | None = None) -> Layout:
    """Sorts sequences by length into at most ``max_buckets`` buckets of about equally many tokens.

    lengths (B,) int64; ages (T,) float32 seconds from event to request, or None. Empty sequences are in no
    bucket. Default for ``max_buckets``: on CPU those that cost least; one on a GPU, where padding is cheaper than
    launches.
    """
    if max_buckets is None and lengths.device.type != "cpu":
        max_buckets = 1
    order = torch.argsort(lengths, descending=True, stable=True)  # (B,)
    ordered = lengths[order]
    starts = (lengths.cumsum(0) - lengths)[order]  # (B,) first token of each sequence
    buckets = []
    for first, last in _splits(ordered, max_buckets):
        length = int(ordered[first])
        kept = ordered[first:last]  # (R,)
        column = torch.arange(length, device=lengths.device)
        slots = (column < kept.unsqueeze(1)).flatten().nonzero().squeeze(1)  # (T_b,)
        tokens = (starts[first:last].unsqueeze(1) + column).flatten().index_select(0, slots)  # (T_b,)
        bucket = Bucket(last - first, length, tokens, slots, starts[first:last] + kept - 1, None)
        if ages is not None:
            bucket = replace(bucket, ages=bucket.pad(ages.unsqueeze(1)).view(bucket.rows, length))
        buckets.append(bucket)
    return Layout(int(lengths.sum()), tuple(buckets), lengths, ages)


def query_blocks(length: int) -> list[tuple[int, int]]:
    """(first, last) of blocks of about equally many queries, QUERIES_PER_BLOCK at most: on CPU a bucket's attention is
    computed by these, each with the keys up to its own end."""
    count = max(1, -(-length // QUERIES_PER_BLOCK))
    edges = [place * length // count for place in range(count + 1)]
    return list(pairwise(edges))


@torch.compiler.disable  # type: ignore[misc]  # by values, which the compiler cannot follow
def _splits(descending: Tensor, max_buckets: int | None) -> Sequence[tuple[int, int]]:
    """Row ranges of the buckets, for lengths in descending order, without the empty sequences: about equally many
    tokens each; None: those that cost least."""
    count = int((descending > 0).sum())
    if count == 0:
        return []
    lengths = descending[:count]
    return cheapest_cuts(lengths) if max_buckets is None else even_cuts(lengths, max_buckets)


def cheapest_cuts(descending: Tensor) -> list[tuple[int, int]]:
    """Row ranges whose attention on CPU costs least, by LAUNCHES and SLOT: lengths (N,) int64 in descending order,
    N > 0. A bucket may begin at about MOST_BUCKETS places, evenly apart in tokens, never between rows of one length;
    among these the choice is exact."""
    begins = torch.tensor([first for first, _ in even_cuts(descending, MOST_BUCKETS)])
    begins = torch.searchsorted(-descending, -descending[begins]).unique()
    edges = [*begins.tolist(), descending.numel()]
    fixed, of_row = [], []  # what a bucket that begins here costs, whatever its rows, and for each of them
    for length in descending[begins].tolist():
        blocks = query_blocks(length)
        fixed.append(LAUNCHES * (1 + len(blocks)))
        of_row.append(SLOT * length + sum((last - first) * last for first, last in blocks))
    cost, end = [0] * len(edges), [0] * len(edges)  # of all rows from an edge on, and where its bucket ends
    for begin in reversed(range(len(fixed))):
        cost[begin], end[begin] = min(
            (fixed[begin] + (edges[after] - edges[begin]) * of_row[begin] + cost[after], after)
            for after in range(begin + 1, len(edges))
        )
    cuts, begin = [], 0
    while begin < len(fixed):
        cuts.append((edges[begin], edges[end[begin]]))
        begin = end[begin]
    return cuts


def even_cuts(costs: Tensor, parts: int) -> list[tuple[int, int]]:
    """Ranges of about equal cost, at most ``parts``: costs (N,) int64, N > 0. In integers: a GPU has no deterministic
    sum of floats from the left."""
    summed = costs.cumsum(0)
    targets = (summed[-1] * torch.arange(1, parts, device=costs.device) + parts - 1) // parts  # rounded up
    cuts = torch.searchsorted(summed, targets).tolist()
    return list(pairwise(sorted({0, costs.numel(), *(cut for cut in cuts if cut < costs.numel())})))


def _index_type(rows: int) -> torch.dtype:
    return torch.int32 if rows < 2**31 else torch.int64  # half the memory to read, where it reaches
