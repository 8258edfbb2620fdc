"""Lists of ids in the form that TorchRec looks up."""

from __future__ import annotations

import torch
from torchrec import KeyedJaggedTensor

from roo_ray.ingest.batch import Jagged


def keyed_jagged(lists: dict[str, Jagged], names: list[str]) -> KeyedJaggedTensor:
    """The named lists as TorchRec's input; its stride is the number of lists of each."""
    return KeyedJaggedTensor(
        keys=names,
        values=torch.cat([lists[name].values for name in names]),
        lengths=torch.cat([lists[name].lengths for name in names]),
        stride=lists[names[0]].lengths.numel(),
    )
