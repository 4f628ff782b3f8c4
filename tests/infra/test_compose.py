"""The compose file is one that compose takes, with a health check for each service and no password of its own."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
FILE = INFRA / "compose.yaml"
PASSWORDS = ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "GRAFANA_PASSWORD")


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """The command, of the plugin or of Debian's package."""
    plugin = (
        shutil.which("docker") is not None
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    )
    if not plugin and shutil.which("docker-compose") is None:
        pytest.skip("needs docker-compose (Debian's package)")
    return ["docker", "compose"] if plugin else ["docker-compose"]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
    return told


def config(compose: list[str], **passwords: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name not in PASSWORDS} | passwords
    command = [*compose, "--project-name", "metadist", "--file", str(FILE), "config"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_compose_takes_the_file(compose: list[str], services: dict[str, Any]) -> None:
    ended = config(compose, **{name: f"given{number}" for number, name in enumerate(PASSWORDS)})
    assert ended.returncode == 0, ended.stderr
    resolved = yaml.safe_load(ended.stdout)["services"]
    assert resolved.keys() == services.keys()
    assert "given0@postgres/mlflow" in resolved["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]


@pytest.mark.parametrize("missing", PASSWORDS)
def test_a_missing_password_is_refused_by_name(missing: str, compose: list[str]) -> None:
    ended = config(compose, **{name: "given" for name in PASSWORDS if name != missing})
    assert ended.returncode != 0
    assert missing in ended.stderr
    assert "draw one" in ended.stderr


def test_every_password_comes_from_the_environment() -> None:
    told = re.findall(r"^ *\w*(?:PASSWORD|SECRET\w*|ACCESS_KEY\w*): (.+)$", FILE.read_text(), re.MULTILINE)
    assert len(told) >= 6
    assert all(re.fullmatch(r"\$\{\w+:\?.+\}", value) for value in told)


def test_every_service_says_whether_it_is_well(services: dict[str, Any]) -> None:
    lasting = {name: service for name, service in services.items() if "restart" in service}
    assert lasting.keys() == services.keys() - {"buckets"}
    for name, service in lasting.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            once = "completed_successfully" if needed == "buckets" else "healthy"
            assert how == {"condition": f"service_{once}"}


def test_images_are_pinned_and_ports_are_this_hosts(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if "build" not in service:
            assert re.fullmatch(r"[a-z/]+:v?\d+(\.\d+)*", service["image"]), name
        assert all(port.startswith("${BIND:-127.0.0.1}:") for port in service.get("ports", [])), name


def test_what_is_mounted_is_there(services: dict[str, Any]) -> None:
    mounts = [mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])]
    folders = [mount for mount in mounts if mount.startswith("./")]
    assert folders
    assert all((INFRA / folder).is_dir() for folder in folders)
