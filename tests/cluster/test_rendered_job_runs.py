"""What a rendered RayJob would run on its head, run on a cluster that is here."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.submit.package import stage
from metadist.submit.submission import submission


@pytest.mark.chaos
@pytest.mark.cluster
def test_the_entry_point_ends_with_the_bits_of_a_direct_run(
    cli: Callable[..., Any], tiny_job: Path, tiny_run: Any, tmp_path: Path, cluster_process: Any
) -> None:
    """The words of the manifest in a shell, with the job file of its ConfigMap, the package as an image has it."""
    words = [str(tiny_job), "cluster.workers=1", f"storage={tmp_path / 'results'}"]
    ended = cli("cluster", "render", *words)
    carried, manifest = yaml.safe_load_all(ended.out)
    installed = tmp_path / "installed"
    installed.mkdir()
    package, place = stage(installed, carried["data"]["job.yaml"])
    command = manifest["spec"]["entrypoint"]
    assert command.startswith("cd /etc/metadist && exec python ")
    command = command.replace("/etc/metadist", str(place)).replace("exec python", f"exec {sys.executable}")
    there = {**os.environ, "PYTHONPATH": str(package.parent), "RAY_ADDRESS": cluster_process.address}
    ran = subprocess.run(["bash", "-c", command], env=there, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = yaml.safe_load((tmp_path / "results" / submission(words).run / "run" / "result.json").read_text())
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
