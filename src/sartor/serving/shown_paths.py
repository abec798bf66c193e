"""What clients see of paths: names of files, and none of the server's folders."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

_END = r"\s/\\:;,'\"()<>"
_FOLDERS = re.compile(
    # Of POSIX and of Windows, up to the last part; in an address of the web nothing is one.
    rf"(?<![\w.~/\\])(?:/(?:[^{_END}]+/+)+|[A-Za-z]:[\\/]+(?:[^{_END}]+[\\/]+)*)(?=[^{_END}])"
)
_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def served_names_of(paths: Sequence[Path], taken: Iterable[Collection[str]]) -> list[str]:
    """A name for each model that is given by its path: the name of its file or folder, with as many
    of the folders around it as it takes to tell it from the others.

    A snapshot in the cache of Hugging Face is named after its repository. ``taken`` are names that
    each one cannot have.
    """
    parts = [[*_parts(path)] for path in paths]
    names: list[str] = []
    for own, others in zip(parts, taken, strict=True):
        rest = [each for each in parts if each is not own]
        for count in range(1, len(own) + 1):
            name = "/".join(own[-count:])
            if name not in others and all(each[-count:] != own[-count:] for each in rest):
                break
        else:
            name = f"{own[-1]}-{len(names) + 1}"
        names.append(name)
    return names


def _parts(path: Path) -> tuple[str, ...]:
    parts = path.parts[1:] if path.is_absolute() else path.parts
    if len(parts) > 2 and parts[-2] == "snapshots" and (hub := _SNAPSHOT.fullmatch(parts[-3])):
        return (*parts[:-3], parts[-1], f"{hub['owner']}/{hub['name']}")
    return parts


def without_folders(text: str, known: Iterable[str] = ()) -> str:
    """A text with every absolute path cut down to its last part.

    ``known`` paths are found whatever characters they have, others as far as they have no spaces.
    """
    for path in sorted({os.path.normpath(path) for path in known if path}, key=len, reverse=True):
        if (name := os.path.basename(path)) and os.path.isabs(path):
            text = text.replace(path, name)
    return _FOLDERS.sub("", text)
