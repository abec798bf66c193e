"""The command line with a model that says what a file holds, a few characters at a time.

``python scripted_model.py FILE ARGUMENTS...``; at each "\\x1a" it waits for a file FILE.go, and
removes it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sartor.cli.main import guarded
from sartor.engine.llm import LLM
from sartor.engine.request import Chunk

PIECE = 3


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    go = Path(f"{sys.argv[1]}.go")

    def stream(self: LLM, prompt: Any, *arguments: Any, **more: Any) -> Iterator[Chunk]:
        count = 0
        for part in text.split("\x1a"):
            while count and not go.exists():
                time.sleep(0.02)
            go.unlink(missing_ok=True)
            for start in range(0, len(part), PIECE):
                count += 1
                piece = part[start : start + PIECE]
                yield Chunk("x", 0, piece, (1,), (), None, None, len(prompt), count, 0)
        yield Chunk("x", 0, "", (2,), (), "stop", None, len(prompt), count + 1, 0)

    LLM.stream = stream  # type: ignore[method-assign]
    sys.exit(guarded(sys.argv[2:]))


if __name__ == "__main__":
    main()
