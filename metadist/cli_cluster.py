"""The verbs for a cluster that is to be made: `metadist cluster render`."""

from pathlib import Path
from typing import Annotated

import typer

from metadist.told import told_in_one_line

app = typer.Typer(help="Manifests for a cluster.", no_args_is_help=True)


@app.callback()
def cluster() -> None:
    """Manifests for a cluster."""


@app.command()
def render(
    words: Annotated[list[str], typer.Argument(metavar="JOB [KEY=VALUE]...", help="as of train or search")],
    kind: Annotated[str, typer.Option(help="rayjob: one run and its cluster; raycluster: one that stands")] = "rayjob",
    image: Annotated[str | None, typer.Option(help="of all pods; metadist:cuda without it")] = None,
    id: Annotated[str | None, typer.Option(help="of the job and its objects; without it of config and code")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; without it the manifest is printed")] = None,
) -> None:
    """Fill a manifest for KubeRay from a job, so that image, resources and storage are said once.

    Example: `metadist cluster render --kind rayjob omniglot-maml-5w1s storage=s3://BUCKET/runs cluster.workers=8
    engine.device=cuda --image REGISTRY/metadist:cuda --out run.yaml`, then `kubectl apply -f run.yaml`.
    """
    with told_in_one_line():
        from metadist.durable import write
        from metadist.manifests.demand import demand
        from metadist.manifests.render import render as filled

        wanted = demand(words, id)
        text = filled(kind, wanted, image)
        if out is None:
            print(text, end="")
            return
        write(out, text.encode())
        print(f"wrote {out}: {kind} {wanted.name}")
