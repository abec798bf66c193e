"""Fields of messages that nobody here knows: left out, and told once."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection

logger = logging.getLogger(__name__)
_MOST = 100
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class IgnoredFields:
    """Says once of each name that it is ignored, for up to 100 names: clients choose them. One
    that is no plain word could hold anything, and is not written."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, names: Collection[str]) -> None:
        for name in sorted(names):
            shown = name if _PLAIN.fullmatch(name) else "(odd name)"
            if shown in self._told or len(self._told) >= _MOST:
                continue
            self._told.add(shown)
            last = "; further names will not be told" if len(self._told) == _MOST else ""
            logger.warning("the field %s of messages is unknown and ignored%s", shown, last)
