"""`.venv/bin/python infra/constraints.py > infra/constraints.txt`: versions installed here, of all that metadist needs.

The tests ran with these; what only they need is left out.
"""

import tomllib
from importlib.metadata import distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("server",)
"""Of pyproject.toml: what stands in an image beside the dependencies themselves."""


def versions() -> dict[str, str]:
    """Name → version of everything that `pip install .[server]` brings. Raises PackageNotFoundError."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    waiting = [Requirement(line) for line in named]
    seen: set[tuple[str, str]] = set()
    found: dict[str, str] = {}
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *sorted(wanted.extras)):
            name = canonicalize_name(wanted.name)
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            # A local part (+cpu, +cu128) is that of where it came from.
            found[name] = distribution(name).version.partition("+")[0]
            for line in requires(name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


if __name__ == "__main__":
    for name, version in sorted(versions().items()):
        print(f"{name}=={version}")
