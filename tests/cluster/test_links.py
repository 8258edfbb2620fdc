"""The measurement of the workers' network: ranks that are processes, over gloo, by the path that NCCL takes on GPUs."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.cluster.links import links_of, measure_rank
from tests.cluster.heads import free_port

SIZE = 1_000_000


def test_ranks_measure_what_lies_between_them() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        calls = [pool.submit(measure_rank, address, rank, 2, False, SIZE) for rank in range(2)]
        times = [call.result(timeout=120) for call in calls]
    links = links_of(times, False, 1, SIZE)
    assert (links.backend, links.world, links.nodes) == ("gloo", 2, 1)
    assert 1e6 < links.all_to_all < 1e12
    assert 1e6 < links.all_reduce < 1e12
    assert 0 < links.latency_s < 10


@given(st.lists(st.tuples(*[st.floats(1e-6, 10)] * 3), min_size=2, max_size=16), st.booleans())
def test_the_slowest_rank_counts(times: list[tuple[float, float, float]], gpu: bool) -> None:
    links = links_of(times, gpu, 1, SIZE)
    world = len(times)
    assert links.backend == ("nccl" if gpu else "gloo")
    assert links.all_to_all == pytest.approx(SIZE * (world - 1) / world / max(one[1] for one in times))
    assert links.all_reduce == pytest.approx(2 * SIZE * (world - 1) / world / max(one[0] for one in times))
    assert links.latency_s == max(one[2] for one in times)


def test_one_worker_has_nothing_to_exchange() -> None:
    assert links_of([(1.0, 1.0, 1.0)], True, 1, SIZE).all_reduce == 0
