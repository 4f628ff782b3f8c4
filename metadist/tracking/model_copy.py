"""The final model in MLflow: a pyfunc that adapts, made of code, `config.yaml` and `theta.safetensors`."""

import importlib.metadata
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "model"
REQUIREMENTS = ("torch", "numpy", "safetensors", "pydantic", "pyyaml", "pyarrow")
"""What loading the model needs. Named, because MLflow would otherwise load it in a subprocess to find out."""


def create(client: "MlflowClient", experiment_id: str, run_id: str, meta_steps: int) -> str:
    """Announce the model as an output of the run; its id."""
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(experiment_id, name=NAME, source_run_id=run_id, model_type="few-shot")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=meta_steps)])
    return str(model.model_id)


def upload(client: "MlflowClient", model_id: str, run_id: str, run_dir: Path) -> None:
    """Write the model's folder and send it. Doing it again replaces the files by the same."""
    import mlflow.pyfunc
    from mlflow.models import Model

    logged = client.get_logged_model(model_id)
    with tempfile.TemporaryDirectory(prefix="metadist-model-") as folder:
        path = Path(folder) / NAME
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            # The package travels with the model, which then loads where metadist is not installed.
            code_paths=[str(Path(__file__).resolve().parents[1])],
            artifacts={"config": str(run_dir / "config.yaml"), "theta": str(run_dir / "theta.safetensors")},
            pip_requirements=requirements(),
            mlflow_model=Model(
                artifact_path=logged.artifact_location, run_id=run_id, model_uuid=model_id, model_id=model_id
            ),
        )
        client.log_model_artifacts(model_id, str(path))
    client.finalize_logged_model(model_id, "READY")


def requirements() -> list[str]:
    """The packages the model needs, at the versions it was trained with."""
    versions = {name: importlib.metadata.version(name) for name in REQUIREMENTS}
    # A local label such as +cu130 is no version that a package index has.
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]
