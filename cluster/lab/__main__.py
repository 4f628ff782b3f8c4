"""`python cluster/lab up 3`: hosts on one machine, for development and tests."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import hosts as lab_of
import typer
from hosts import LabError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Several hosts on one machine. Needs root.")
Folder = Annotated[Path, typer.Option("--folder", help="where the lab keeps its books and logs")]
Name = Annotated[str, typer.Argument(help="host-0 is the head")]
HERE = Path(tempfile.gettempdir()) / "metadist-lab"


@app.command()
def up(
    count: Annotated[int, typer.Argument(min=1, max=50, metavar="HOSTS")] = 3,
    cpus: Annotated[int, typer.Option(min=0, help="logical CPUs of each")] = 2,
    folder: Folder = HERE,
) -> None:
    """Bring hosts up, with Ray on each; host-0 is the head."""
    lab = lab_of.up(folder, count, cpus)
    print(f"{count} hosts are up; the cluster is at {lab.address}. On it:")
    print(f"  python {Path(sys.argv[0])} run host-0 metadist train quickstart cluster.address={lab.address}")


@app.command()
def status(folder: Folder = HERE) -> None:
    """Which hosts are up, with the process id of each one's root."""
    for host in lab_of.open_lab(folder).hosts.values():
        print(f"{host.name}  {host.address}  {f'up, process {host.pid}' if lab_of.alive(host.pid) else 'down'}")


@app.command(context_settings={"ignore_unknown_options": True})
def run(name: Name, words: list[str], folder: Folder = HERE) -> None:
    """Run a command on a host."""
    raise typer.Exit(lab_of.run(lab_of.open_lab(folder), name, words).returncode)


@app.command()
def add(name: Name, folder: Folder = HERE) -> None:
    """One host more (host-N), or one that was killed again."""
    lab_of.add(lab_of.open_lab(folder), name)


@app.command()
def kill(name: Name, folder: Folder = HERE) -> None:
    """Pull a host's plug."""
    lab_of.kill(lab_of.open_lab(folder), name)


@app.command()
def cut(name: Name, folder: Folder = HERE) -> None:
    """Unplug a host's network cable."""
    lab_of.cut(lab_of.open_lab(folder), name)


@app.command()
def heal(name: Name, folder: Folder = HERE) -> None:
    """Plug it in again."""
    lab_of.heal(lab_of.open_lab(folder), name)


@app.command()
def processes(name: Name, folder: Folder = HERE) -> None:
    """What runs on a host, by process id."""
    for pid, line in lab_of.processes(lab_of.open_lab(folder), name).items():
        print(f"{pid:>8}  {line[:150]}")


@app.command()
def freeze(pid: int) -> None:
    """Stop a process without ending it."""
    lab_of.freeze(pid)


@app.command()
def thaw(pid: int) -> None:
    """Let it go on."""
    lab_of.thaw(pid)


@app.command()
def down(folder: Folder = HERE) -> None:
    """End everything, by process id."""
    lab_of.down(lab_of.open_lab(folder))


if __name__ == "__main__":
    try:
        app(standalone_mode=False)
    except (LabError, subprocess.SubprocessError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    except typer.Exit as end:
        sys.exit(end.exit_code)
