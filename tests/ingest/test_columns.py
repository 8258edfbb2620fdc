"""Ids of managed tables, as the data pipeline gives them to the model."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from roo_ray.errors import DataError
from roo_ray.ingest.columns import NO_ID, ids_of
from roo_ray.schema import Table
from roo_ray.sources.hashing import hash_array

MANAGED = Table(rows=100, dim=4, managed=True)


def where(place: int) -> str:
    return f"row {place}"


@pytest.mark.parametrize("values", [["a", "b", "c" * 100], [0, -1, 2**62]])
def test_ids_of_any_type_keep_61_bits_of_their_hash(values: list[object]) -> None:
    """Whatever the number of rows: which row an id has is for training to say."""
    ids = ids_of(pa.array(values), "item_id", "item", MANAGED, where)
    assert ids.dtype == np.int64
    assert (ids % (1 << 61)).tolist() == [int(of) >> 3 for of in hash_array(pa.array(values))]
    assert ids.min() >= 1 << 61
    assert ids.max() < 1 << 62


def test_null_is_an_id_of_its_own_which_no_value_and_no_dummy_has() -> None:
    ids = ids_of(pa.array(["0", None, "4", None]), "item_id", "item", MANAGED, where, fill_id=0)
    assert ids[1] == ids[3] == 1 != NO_ID
    assert len(set(ids.tolist())) == 3
    with pytest.raises(DataError, match=r"column 'item_id' is null in row 1; give the feature a fill_id"):
        ids_of(pa.array(["0", None]), "item_id", "item", MANAGED, where)
