"""Initial embedding weights are a function of seed, table, row and column alone."""

import numpy as np
import torch

from roo_ray.models import initialise
from roo_ray.models.embeddings import EmbeddingLookup
from roo_ray.models.initialise import initialise_tables, table_weights
from tests.models.batches import schema

CPU = torch.device("cpu")


def splitmix(value: int) -> int:
    mask = (1 << 64) - 1
    value &= mask
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)


def test_equals_splitmix_in_plain_integers() -> None:
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"7/item").digest()[:8], "little")
    block = table_weights(7, "item", 3, 4, 2, 5, CPU)
    for r in range(4):
        for c in range(5):
            mixed = splitmix(splitmix(3 + r + key) + (2 + c) * 0x9E3779B97F4A7C15)
            assert float(block[r, c]) == (mixed >> 40) / 2**23 - 1


def test_blocks_are_cut_from_one_table() -> None:
    whole = table_weights(0, "item", 0, 100, 0, 16, CPU)
    assert torch.equal(table_weights(0, "item", 37, 20, 4, 8, CPU), whole[37:57, 4:12])
    assert not torch.equal(table_weights(1, "item", 0, 100, 0, 16, CPU), whole)
    assert not torch.equal(table_weights(0, "topic", 0, 100, 0, 16, CPU), whole)


def test_weights_look_uniform_and_unrelated() -> None:
    block = table_weights(0, "item", 0, 4000, 0, 32, CPU).numpy()
    counts, _ = np.histogram(block, bins=20, range=(-1, 1))
    assert abs(counts / block.size - 0.05).max() < 0.003
    rows = np.corrcoef(block[:200])
    columns = np.corrcoef(block.T)
    assert abs(rows - np.eye(200)).max() < 0.85
    assert abs(columns - np.eye(32)).max() < 0.1
    assert len(np.unique(block[:, 0])) > 3990


def test_unsharded_tables_and_chunks(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    of = schema()
    one, other = EmbeddingLookup(of), EmbeddingLookup(of)
    initialise_tables(one, 5)
    monkeypatch.setattr(initialise, "_CHUNK", 24)
    initialise_tables(other, 5)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.abs().max() <= a.shape[1] ** -0.5
        assert a.std() > 0.3 * a.shape[1] ** -0.5
    item = dict(one.named_parameters())["collections.dim_8.embeddings.item.weight"]
    torch.testing.assert_close(item, table_weights(5, "item", 0, 50, 0, 8, CPU) * 8**-0.5)
