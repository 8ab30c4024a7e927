"""A client's own token: from the environment or a file that its owner alone may read."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from cryofleet.errors import FailedPrecondition
from cryofleet.settings import Settings

TokenSource = Callable[[], str]
"""Gives the token for one call."""


def token_source(settings: Settings) -> TokenSource | None:
    """Where the settings' token comes from; None where there is none.

    A file is read for each call, since what renews short-lived tokens writes them there. Raises FailedPrecondition
    where it can't be read, or others may read it.
    """
    if settings.token:
        token = settings.token
        return lambda: token
    if settings.token_file is not None:
        path = settings.token_file
        read_token(path)
        return lambda: read_token(path)
    return None


def read_token(path: Path) -> str:
    """The token in a file. Raises FailedPrecondition."""
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FailedPrecondition(f"cannot read the token {path}: {reason}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise FailedPrecondition(f"others may read the token {path}; run: chmod 600 {path}")
    token = text.strip()
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise FailedPrecondition(f"{path} must hold one token and nothing else")
    return token
