"""Where tracked runs go, and how to name it without giving a password away."""

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
"""How a database's file begins."""
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|ACCESS_KEY")
"""Names of environment variables whose values must not be seen."""


@dataclass(frozen=True)
class Store:
    """A tracking server or a database."""

    uri: str
    """Safe to show and to keep: a password in it is hidden."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What mlflow has to find in its environment to get there, credentials too."""

    @property
    def file(self) -> Path | None:
        """Of a sqlite database."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    @property
    def artifacts(self) -> Path | None:
        """Where files go; None where the server knows."""
        return None if self.file is None else self.file.parent / "mlartifacts"

    @property
    def page(self) -> str | None:
        """The address of its pages, where a server shows them."""
        return self.uri.rstrip("/") if self.uri.startswith(("http://", "https://")) else None


def default_store() -> Path:
    """Where runs are tracked unless told otherwise, beside the folders that runs get by default."""
    return Path("runs", "mlflow.db").absolute()


def resolve_store(given: str | None, environment: Mapping[str, str] = os.environ) -> Store | None:
    """What the user named, else the environment, else the default; None for "off"; ValueError for nonsense."""
    text = given or environment.get(URI) or f"sqlite:///{default_store()}"
    if text == OFF:
        return None
    where = "the tracking URI" if given else URI
    if "://" not in text and Path(text).suffix in {".db", ".sqlite"}:
        text = f"sqlite:///{text}"
    if text.startswith("sqlite:///"):
        file = Path(text.removeprefix("sqlite:///")).absolute()
        if wrong := _no_database(file):
            raise ValueError(f"{where} = {text}: {wrong}")
        return Store(f"sqlite:///{file}", {URI: f"sqlite:///{file}"})
    if text == "databricks" or text.startswith("databricks://"):
        return Store(text, {URI: text})
    parts = _parts_of(text)
    if parts.scheme in {"http", "https"} and parts.hostname:
        return _server(text)
    if re.match(r"(postgresql|mysql|mssql)(\+\w+)?$", parts.scheme) and parts.hostname:
        return Store(hidden(text), {URI: text})
    raise ValueError(
        f"{where} = {hidden(text)}: no place for runs; name a server (http://host:5000), a database"
        f' (sqlite:///runs/mlflow.db, postgresql://...), or "{OFF}" for no tracking'
    )


def _parts_of(text: str) -> SplitResult:
    """Of an address; those of nothing where it is none."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # is only read, and refused, when it is asked for
    except ValueError:
        return urlsplit("")
    return parts


def _no_database(file: Path) -> str | None:
    """Why a file cannot be made or used as a sqlite database, as far as that is seen without opening it."""
    try:
        if file.is_dir():
            return "is a folder; name a file in it, such as mlflow.db"
        if file.is_file():
            with file.open("rb") as opened:
                head = opened.read(len(SQLITE))
            return None if head in (b"", SQLITE) else "is a file that is no sqlite database; name another"
        above = next(one for one in file.parents if one.exists())
        return None if above.is_dir() else f"cannot be made, for {above} is a file"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _server(text: str) -> Store:
    """Credentials leave the address for the variables that mlflow reads them from."""
    parts = urlsplit(text)
    uri = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    environment = {URI: uri}
    if parts.username:
        environment["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    if parts.password:
        environment["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return Store(uri, environment)


def hidden(uri: str) -> str:
    """Without its user and password."""
    return re.sub(r"(?<=://)[^/?#]*@", f"{HIDDEN}@", uri)


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """What must not be seen of an environment, passwords and such, also as an address spells them; longest first."""
    found = {value for name, value in environment.items() if SECRET.search(name) and len(value) > 3}
    for name, value in environment.items():
        if name.endswith("_URI") and "@" in value:
            parts = urlsplit(value)
            found |= {one for one in (parts.password,) if one}
    found |= {quote(one, safe="") for one in found} | {unquote(one) for one in found}
    return sorted(found, key=len, reverse=True)
