"""Which MLflow a run is copied to: the rule behind `tracking.uri`, without importing MLflow."""

import importlib.metadata
import re
from pathlib import Path
from urllib.parse import urlsplit

from metadist.errors import ConfigError

VALID = "auto, off, sqlite:///FILE.db, http(s)://HOST:PORT, a postgresql, mysql or mssql URL, databricks"
_DATABASES = ("postgresql", "mysql", "mssql")
_SQLITE = "sqlite:///"


def check_uri(uri: str) -> None:
    """Refuse in one line a `tracking.uri` that MLflow could never write to."""
    scheme = _scheme(uri)
    problem = None
    if uri in ("auto", "off", "databricks") or scheme == "databricks":
        pass
    elif scheme in ("", "file"):
        problem = f"{uri!r} is a folder, and MLflow no longer writes to folders"
    elif scheme in ("http", "https"):
        problem = None if urlsplit(uri).hostname else f"{uri!r} names no host"
    elif scheme == "sqlite":
        problem = None if _sqlite_file(uri) else f"{masked(uri)!r} names no database file"
    elif scheme.partition("+")[0] in _DATABASES:
        problem = _missing_driver(uri)
    elif scheme not in {plugin.name for plugin in importlib.metadata.entry_points(group="mlflow.tracking_store")}:
        problem = f"MLflow does not know the scheme of {masked(uri)!r}"
    if problem:
        raise ConfigError(f"tracking.uri: {problem}; valid: {VALID}")


def resolve_uri(uri: str, run_dir: Path) -> str | None:
    """The MLflow URI of a run, with absolute paths; None when tracking is off."""
    if uri == "off":
        return None
    if uri == "auto":
        return f"{_SQLITE}{run_dir.absolute().parent / 'mlflow.db'}"
    database = sqlite_database(uri)
    return f"{_SQLITE}{database}" if database and _scheme(uri) == "sqlite" else uri


def sqlite_database(uri: str) -> Path | None:
    """The absolute path of the database file behind an SQLite URI."""
    if _scheme(uri).partition("+")[0] != "sqlite" or not _sqlite_file(uri):
        return None
    return Path(_sqlite_file(uri)).absolute()


def artifact_location(uri: str, run_dir: Path) -> str | None:
    """Where a new experiment keeps its artifacts; None leaves it to the server.

    A bare database says nothing of artifacts, and MLflow would put them under the
    current folder of whoever writes: they go beside the database file, or beside the run.
    """
    database = sqlite_database(uri)
    if database:
        return (database.parent / "mlartifacts").as_uri()
    if _scheme(uri).partition("+")[0] in _DATABASES:
        return (run_dir.absolute().parent / "mlartifacts").as_uri()
    return None


def look_here(uri: str, experiment_id: str, run_id: str) -> str:
    """How a person opens the run: an address, or the command that shows it."""
    if _scheme(uri) in ("http", "https"):
        return f"{masked(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    if uri.startswith("databricks"):
        return f"run {run_id} on {masked(uri)}"
    quoted = f"'{masked(uri)}'" if re.search(r"[^\w:/.+@=-]", uri) else uri
    return f"mlflow ui --backend-store-uri {quoted}"


def masked(text: str) -> str:
    """`text` with the passwords of URLs hidden; it is shown to people and written to files."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].lower() if "://" in uri or uri.startswith("file:") else ""


def _sqlite_file(uri: str) -> str:
    path = uri.partition(":///")[2].partition("?")[0]
    return "" if path == ":memory:" else path


def _missing_driver(uri: str) -> str | None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except SQLAlchemyError:
        return f"{masked(uri)!r} is no database URL"
    except ImportError as error:
        return f"{masked(uri)!r} needs the Python package {error.name}, which is not installed"
    return None
