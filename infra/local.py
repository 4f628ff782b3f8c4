"""`python infra/local.py FOLDER`: an MLflow server on a PostgreSQL of its own, on this machine, without containers.

For development and tests. Needs Debian's package postgresql, and of Python mlflow and psycopg2-binary. Both listen on
loopback only and end with this process; the folder keeps database and artifacts for the next time. PostgreSQL does not
run as root: started by root, it runs as `postgres` (the package makes this user) or `nobody`, to whom the database's
folder then belongs.
"""

import argparse
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any


def binaries() -> Path | None:
    """The folder of the newest PostgreSQL's programs; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    beside = shutil.which("postgres")
    newest = found[-1] if found else Path(beside).resolve() if beside else None
    return newest.parent if newest else None


def identity() -> dict[str, Any]:
    """Whom PostgreSQL runs as, for subprocess; this process's own user unless that is root."""
    if os.geteuid() != 0:
        return {}
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def database(folder: Path, port: int) -> tuple["subprocess.Popen[bytes]", str]:
    """Start PostgreSQL on a folder; its process and the URI of its database, made where it is not there."""
    there = binaries()
    if there is None:
        sys.exit("error: PostgreSQL is not installed; on Debian: apt-get install postgresql")
    who, data, password = identity(), folder / "data", folder / "password"
    if not (data / "PG_VERSION").exists():
        password.touch(mode=0o600)
        password.write_text(secrets.token_hex(16))
        if who:
            for path in (folder, password):
                os.chown(path, who["user"], who["group"])
        make = [there / "initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", "--pwfile", password, "-E", "UTF8"]
        made = subprocess.run([*make, "--no-sync"], **who, cwd=folder, capture_output=True, text=True, check=False)
        if made.returncode:
            sys.exit(f"error: {folder}: PostgreSQL cannot make its database there: {made.stderr.strip()}")
    server = subprocess.Popen(
        [there / "postgres", "-D", data, "-k", "", "-h", "127.0.0.1", "-p", str(port)],
        **who,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=(folder / "postgres.log").open("a"),
        stderr=subprocess.STDOUT,
    )
    uri = f"postgresql+psycopg2://mlflow:{password.read_text()}@127.0.0.1:{port}/postgres"
    return server, uri


def tracking(folder: Path, uri: str, port: int) -> "subprocess.Popen[bytes]":
    """Start an MLflow server on a database."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--artifacts-destination", str(folder / "artifacts"),
        ],
        # The password stays out of what `ps` shows.
        env={**os.environ, "MLFLOW_BACKEND_STORE_URI": uri},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=(folder / "mlflow.log").open("a"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _until(ready: Callable[[], bool], server: "subprocess.Popen[bytes]", log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if server.poll() is not None:
            sys.exit(f"error: the server ended at once; {log} says why")
        if time.monotonic() > deadline:
            sys.exit(f"error: the server did not come up within {seconds:g} s; {log} says why")
        time.sleep(0.1)


def main() -> None:
    """Run both until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="An MLflow server on PostgreSQL, on this machine.")
    parser.add_argument("folder", type=Path, help="made where it is not there")
    parser.add_argument("--port", type=int, default=5000, help="of the MLflow server")
    told = parser.parse_args()
    if _accepts(told.port):
        sys.exit(f"error: --port: something listens on {told.port} already; name another one")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(0))
    folder, place = told.folder.resolve(), told.folder.resolve() / "postgresql"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {place}: {error.strerror}; name another folder")
    servers: list[subprocess.Popen[bytes]] = []
    try:
        port = free_port()
        started, uri = database(place, port)
        servers.append(started)
        _until(lambda: _accepts(port), started, place / "postgres.log")
        servers.append(tracking(folder, uri, told.port))
        _until(lambda: _answers(told.port), servers[-1], folder / "mlflow.log")
        print(f"MLflow is at http://127.0.0.1:{told.port}: tracking.uri=http://127.0.0.1:{told.port}", flush=True)
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
        sys.exit(f"error: a server ended by itself; {folder}/mlflow.log and {place}/postgres.log say why")
    finally:
        for server in reversed(servers):
            server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown; MLflow ends its workers
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


if __name__ == "__main__":
    main()
