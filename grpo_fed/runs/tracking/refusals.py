"""Tells what a store will never take from what it may take later."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

REFUSED = {400, 404, 413, 422}
"""HTTP codes of a server that will never take a record; after others it may take it later."""


@contextmanager
def log_if_refused(what: str) -> Iterator[None]:
    """Log what the store will never take; raise all other errors, so that the writer sends again."""
    try:
        yield
    except MlflowException as error:
        code: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        if code not in REFUSED:
            raise
        log_left_out(what, error)


def log_left_out(what: str, error: Exception) -> None:
    """Write a line to the writer's log."""
    print(f"left out: {what}: {type(error).__name__}: {error}", file=sys.stderr)
