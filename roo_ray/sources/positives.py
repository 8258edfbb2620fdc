"""Labels from lists: 1 for each impression of a request that is in its list of positives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from roo_ray.errors import DataError
from roo_ray.sources.columns import list_parts, offsets_of


def positives_to_labels(
    shown: pa.Array, positives: pa.Array, names: tuple[str, str], path: str, describe: Callable[[int], str]
) -> pa.Array:
    """(N,) lists of int8 as long as those of ``shown`` (N,) lists of ids: 1 where the id is in the row's list of
    ``positives``. ``names``: the two columns; ``describe``: a row in words.

    Raises DataError naming the file and request for a positive that is not shown: it would be lost.
    """
    lengths, ids = list_parts(shown)
    positive_lengths, positive_ids = list_parts(positives)
    try:
        positive_ids = positive_ids.cast(ids.type)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: '{names[1]}' and '{names[0]}' have unlike ids: {error}") from None
    codes = pa.concat_arrays([ids, positive_ids]).dictionary_encode(null_encoding="encode")
    code = np.asarray(codes.indices).astype(np.int64)
    rows = np.concatenate(
        [np.repeat(np.arange(len(lengths)), lengths), np.repeat(np.arange(len(lengths)), positive_lengths)]
    )
    pairs = rows * max(len(codes.dictionary), 1) + code  # one number per (request, id)
    shown_pairs, positive_pairs = pairs[: len(ids)], pairs[len(ids) :]
    lost = np.flatnonzero(~np.isin(positive_pairs, shown_pairs))
    if len(lost):
        first = int(lost[0])
        raise DataError(
            f"{path}: {len(lost)} values of '{names[1]}' are not in '{names[0]}' of their request, and would be lost "
            f"(first: {positive_ids[first]} of request {describe(int(rows[len(ids) + first]))}); correct one of "
            "the columns"
        )
    labels = np.isin(shown_pairs, positive_pairs).astype(np.int8)
    return pa.ListArray.from_arrays(offsets_of(lengths), pa.array(labels))
