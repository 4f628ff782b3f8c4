"""The logged model, as code instead of a pickle: MLflow runs this file when the model is loaded.

`predict` adapts to a support set and classifies queries:

    model = mlflow.pyfunc.load_model("models:/<model id>")
    probabilities = model.predict({"support_images": ..., "support_labels": ..., "query_images": ...})

Images are uint8 `[n, C, H, W]`, labels are integers `[n]`; the answer is float32 `[queries, ways]`. A run that
learned regression takes `{"support_x": ..., "support_y": ..., "query_x": ...}`, each `[n, 1]`, and answers with
numbers, float32 `[queries, 1]`.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class FewShot:
    """Meta-parameters and the method that adapts them."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the config and θ that were logged with the model."""
        # Imported here: the file also runs when the model is written, which needs no torch.
        from metadist.config import load
        from metadist.evaluation.adapter import Adapter

        self.adapter = Adapter(load(context.artifacts["config"]), Path(context.artifacts["theta"]))

    # The input has no type hint: MLflow would take it for the schema of a table, and this is no table.
    def predict(self, context: PythonModelContext, model_input, params=None) -> np.ndarray:  # type: ignore[no-untyped-def]
        """Class probabilities, or numbers, of the queries after adaptation to the support set."""
        if "support_x" in model_input:
            points = (_array(model_input, key, np.float64) for key in ("support_x", "support_y", "query_x"))
            return self.adapter.regress(*points)
        return self.adapter.predict(
            _array(model_input, "support_images", np.uint8),
            _array(model_input, "support_labels", np.int64),
            _array(model_input, "query_images", np.uint8),
        )


class FewShotModel(FewShot, PythonModel):
    """As MLflow wants it. It inherits `predict`, because MLflow warns of one that is defined here without hints."""


def _array(model_input: dict[str, Any], key: str, dtype: type) -> np.ndarray:
    if key not in model_input:
        raise ValueError(
            f"the input has no {key}; it is a dict of support_images, support_labels and query_images, "
            f"or for regression of support_x, support_y and query_x"
        )
    return np.asarray(model_input[key], dtype=dtype)


mlflow.models.set_model(FewShotModel())
