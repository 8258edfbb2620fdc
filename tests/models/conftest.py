"""Tests of models run on tiny tensors: one thread, because threads that wait for each other cost more."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch's compiler does where it is there


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread for this package's tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def many_buckets() -> Iterator[None]:
    """Attention has as many buckets for tiny batches as for large ones, where launches cost nothing."""
    from roo_ray.models import attention_layout  # imports torch's compiler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_layout, "LAUNCHES", 0)
        yield
