"""The environment of a server's processes: that of the server, without its secrets.

A worker reads files of models and computes. Tokens of hubs, passwords of mirrors and proxies, and
headers for a collector of traces are of no use to it, and whoever may read its environment should
not find them there.
"""

from __future__ import annotations

import os
import re

_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY|AUTH"
    r"|SECRET_KEY|PRIVATE_KEY|HEADERS)$",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"://(?:[^/?#\s:]*:(?!\d+[/?#])\S*|[^/?#\s]+)@")
"""A user name or a password in an address."""


def child_environment(**more: str) -> dict[str, str]:
    """The variables for a child process, with ``more`` that are set for it."""
    kept = {name: value for name, value in os.environ.items() if not is_secret(name, value)}
    return {**kept, **more}


def is_secret(name: str, value: str) -> bool:
    """Whether a variable holds a secret, as far as its name or an address in it tells."""
    return _NAME.search(name) is not None or _LOGIN.search(value) is not None
