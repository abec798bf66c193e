"""Messages about addresses without what gives access to them."""

from __future__ import annotations

import os
import re

_LOGIN = re.compile(
    # A password may hold what ends the name of a host; the number of a port does not begin one.
    r"(?<=://)(?:[^/?#\s'\":]*:(?!\d+[/?#])[^\s'\"]*|[^/?#\s'\"]+)@"
)
_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>)]+")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # as Hugging Face writes them
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
"""Variables of the environment that hold tokens of hubs."""

_SHORTEST = 6  # what is shorter stands in many words by chance


def redacted(text: str) -> str:
    """The text without user names and passwords in addresses, without their queries (which may be
    signed), and without the tokens of hubs."""
    for name in HUB_TOKENS:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST:
            text = text.replace(token, "***")
    text = _QUERY.sub(r"\1?***", _LOGIN.sub("***@", text))
    return _HUB_TOKEN.sub("***", _BEARER.sub(r"\1 ***", text))
