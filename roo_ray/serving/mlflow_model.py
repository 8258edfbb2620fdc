"""The code of the logged MLflow model: MLflow runs this file when the model is loaded (models from code: no pickle)."""

from __future__ import annotations

from typing import Any

import mlflow
import mlflow.pyfunc
import pandas as pd

from roo_ray.serving.scorer import Scorer


def plain_values(column: pd.Series) -> list[Any]:
    """The values, None for each of pandas' forms of null."""
    return [None if null else value for value, null in zip(column.tolist(), column.isna(), strict=True)]


class RequestScorer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A row per request in, a row per request out: per task the list of its candidates' scores, in order."""

    def load_context(self, context: Any) -> None:
        """Reads the exported model."""
        self.scorer = Scorer.load(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """See ``Scorer.predict``."""
        columns = {name: plain_values(model_input[name]) for name in model_input.columns}
        return pd.DataFrame(self.scorer.predict(columns))


mlflow.models.set_model(RequestScorer())
