"""The store that tracked runs go to, and its address without the password."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

URI = "MLFLOW_TRACKING_URI"
OFF = "off"
HIDDEN = "***"
SQLITE = b"SQLite format 3\0"
"""The first bytes of a sqlite database."""
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|ACCESS_KEY")
"""Names of environment variables whose values must not be shown."""


@dataclass(frozen=True)
class Store:
    """Names a tracking server or a database, and holds what mlflow needs to reach it."""

    uri: str
    """The address, safe to show and to store: a password in it is hidden."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables that mlflow needs to reach it, with the credentials."""

    @property
    def file(self) -> Path | None:
        """The file of a sqlite database; None for another store."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    @property
    def artifacts(self) -> Path | None:
        """The folder for files beside a sqlite database; None for another store, which has its own."""
        return None if self.file is None else self.file.parent / "mlartifacts"

    @property
    def page(self) -> str | None:
        """The address of MLflow's pages; None for a database, which shows none."""
        return self.uri.rstrip("/") if self.uri.startswith(("http://", "https://")) else None


def default_store() -> Path:
    """Return the database that runs are tracked to by default, beside the default folders of runs."""
    return Path("runs", "mlflow.db").absolute()


def resolve_store(given: str | None, environment: Mapping[str, str] = os.environ) -> Store | None:
    """Resolve the store that the user gave, or else the environment, or else the default; None for "off".

    ValueError for an address that names no store.
    """
    text = given or environment.get(URI) or f"sqlite:///{default_store()}"
    if text == OFF:
        return None
    where = "the tracking URI" if given else URI
    if "://" not in text and Path(text).suffix in {".db", ".sqlite"}:
        text = f"sqlite:///{text}"
    if text.startswith("sqlite:///"):
        file = Path(text.removeprefix("sqlite:///")).absolute()
        if problem := _database_problem(file):
            raise ValueError(f"{where} = {text}: {problem}")
        return Store(f"sqlite:///{file}", {URI: f"sqlite:///{file}"})
    if text == "databricks" or text.startswith("databricks://"):
        return Store(text, {URI: text})
    parts = _split(text)
    if parts.scheme in {"http", "https"} and parts.hostname:
        return _server(text)
    if re.match(r"(postgresql|mysql|mssql)(\+\w+)?$", parts.scheme) and parts.hostname:
        return Store(hide_password(text), {URI: text})
    raise ValueError(
        f"{where} = {hide_password(text)}: is no store for runs; name a server (http://host:5000), a database"
        f' (sqlite:///runs/mlflow.db, postgresql://...), or "{OFF}" for no tracking'
    )


def _split(text: str) -> SplitResult:
    """Split an address into its parts, which are empty if it is not valid."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # is parsed on access, which raises for an invalid one
    except ValueError:
        return urlsplit("")
    return parts


def _database_problem(file: Path) -> str | None:
    """Explain why a file cannot be created or used as a sqlite database, without opening it as one; None if it can."""
    try:
        if file.is_dir():
            return "is a folder; name a file in it, such as mlflow.db"
        if file.is_file():
            with file.open("rb") as opened:
                head = opened.read(len(SQLITE))
            return None if head in (b"", SQLITE) else "is no sqlite database; name another file"
        above = next(parent for parent in file.parents if parent.exists())
        return None if above.is_dir() else f"cannot be created, since {above} is a file"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _server(text: str) -> Store:
    """Make the store of a server: its credentials move from the address to the variables that mlflow reads."""
    parts = urlsplit(text)
    uri = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    environment = {URI: uri}
    if parts.username:
        environment["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    if parts.password:
        environment["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return Store(uri, environment)


def hide_password(uri: str) -> str:
    """Replace the user and password in an address by stars."""
    return re.sub(r"(?<=://)[^/?#]*@", f"{HIDDEN}@", uri)


def find_secrets(environment: Mapping[str, str]) -> list[str]:
    """Collect passwords and other secrets from environment variables, also percent-encoded; longest first."""
    secrets = {value for name, value in environment.items() if SECRET.search(name) and len(value) > 3}
    for name, value in environment.items():
        if name.endswith("_URI") and "@" in value and (password := urlsplit(value).password):
            secrets.add(password)
    secrets |= {quote(secret, safe="") for secret in secrets} | {unquote(secret) for secret in secrets}
    return sorted(secrets, key=len, reverse=True)
