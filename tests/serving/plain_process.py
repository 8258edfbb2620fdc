"""Loads an MLflow model where ``import ray`` fails, and scores: python -m tests.serving.plain_process MODEL IN OUT"""

from __future__ import annotations

import json
import sys
from typing import Any


class NoRay:
    """An import hook that refuses Ray."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "ray":
            raise ImportError("this process has no Ray")


def main(model: str, requests: str, output: str) -> None:
    sys.meta_path.insert(0, NoRay())
    import mlflow.pyfunc
    import pandas as pd
    import torch.distributed as dist

    loaded = mlflow.pyfunc.load_model(model)
    with open(requests) as file:
        rows = pd.DataFrame(json.load(file))
    scores = loaded.predict(rows)
    assert not dist.is_initialized()
    assert "ray" not in sys.modules
    with open(output, "w") as file:
        json.dump({task: scores[task].tolist() for task in scores.columns}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
