"""Asks a tracking server, before a run begins, whether it takes what will be sent."""

from __future__ import annotations

import base64
import configparser
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from grpo_fed.runs.tracking.store import Store

PATIENCE = 2.0
"""Seconds that a server may take to answer."""
QUESTION = "/api/2.0/mlflow/experiments/search?max_results=1"
"""What a server answers to users alone, and quickly."""
USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
CREDENTIALS = Path("~/.mlflow/credentials")
"""MLflow's own file with a user and a password."""


def find_trouble(store: Store, patience: float = PATIENCE, environment: Mapping[str, str] = os.environ) -> str | None:
    """Say in a phrase why a server would not take records now; None if it would, or the store is no server."""
    if store.page is None:
        return None
    given = {**environment, **store.environment}
    request = urllib.request.Request(store.page + QUESTION, headers=_authorisation(given))
    try:
        with urllib.request.urlopen(request, timeout=patience, context=_tls(given)):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            return f"refuses the user or the password (HTTP {error.code}); give them in {USER} and {PASSWORD}"
        if error.code == 404:
            return "is no server of MLflow (HTTP 404)"
        return f"answers with an error (HTTP {error.code})"
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return f"does not answer ({text.lower()})"


def _authorisation(given: Mapping[str, str]) -> dict[str, str]:
    """Make the header with the credentials that mlflow would send: a password before a token."""
    user, password = _credentials(given)
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {given[TOKEN]}"} if given.get(TOKEN) else {}


def _credentials(given: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return user and password, of the environment or else of MLflow's file."""
    file = configparser.ConfigParser(interpolation=None)
    try:
        file.read(CREDENTIALS.expanduser(), encoding="utf-8")
        section = dict(file["mlflow"]) if "mlflow" in file else {}
    except (configparser.Error, OSError, UnicodeError, RuntimeError):
        section = {}
    return given.get(USER) or section.get(USER.lower()), given.get(PASSWORD) or section.get(PASSWORD.lower())


def _tls(given: Mapping[str, str]) -> ssl.SSLContext | None:
    """Make the context for TLS that mlflow's variables ask for; None for the default."""
    if given.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return ssl._create_unverified_context()
    if file := given.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        return ssl.create_default_context(cafile=file)
    return None
