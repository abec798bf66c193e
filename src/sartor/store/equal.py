"""Equal files are kept once: models of the store share them as hard links.

Nothing writes into a file of a model, so a link is as good as a copy; a shared file goes when the
last model that has it does. Where the file system refuses links, every model has its own copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from sartor.store.manifest import FILES, MANIFEST

_SMALL = 1 << 16  # bytes: below it, a link saves less than it costs


class EqualFiles:
    """The files of models that are in the store, by digest."""

    def __init__(self, models: Iterable[Path]) -> None:
        """``models``: folders of whole models, read when the first file is looked for."""
        self._models = models

    @cached_property
    def _known(self) -> dict[str, list[tuple[int, Path]]]:
        known: dict[str, list[tuple[int, Path]]] = {}
        for folder in self._models:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                for file in json.loads((folder / MANIFEST).read_bytes())["files"]:
                    place = folder / FILES / file["path"]
                    known.setdefault(file["sha256"], []).append((file["size"], place))
        return known

    def find(self, sha256: str, size: int, other_than: Path | None = None) -> Path | None:
        """A file of the store with these contents: they are hashed again, as a manifest tells what
        they were when it was written."""
        if size < _SMALL:
            return None
        for stated, path in self._known.get(sha256.lower(), ()):
            with contextlib.suppress(OSError):
                if other_than is not None and other_than.exists() and path.samefile(other_than):
                    continue
                if stated == size == path.stat().st_size and _digest(path) == sha256.lower():
                    return path
        return None

    def copies(self) -> list[tuple[Path, str, int]]:
        """Files that are stated to be equal to one before them, and lie on the disk once more, each
        with its digest and size: of models that came before files were shared."""
        found = []
        for sha256, places in self._known.items():
            inodes: set[tuple[int, int]] = set()
            for size, path in places:
                with contextlib.suppress(OSError):
                    status = path.stat()
                    inode = status.st_dev, status.st_ino
                    if size < _SMALL or status.st_size != size:
                        continue
                    if inodes and inode not in inodes:
                        found.append((path, sha256, size))
                    inodes.add(inode)
        return found

    def share(self, path: Path, sha256: str, size: int) -> bool:
        """Puts a link to an equal file in the place of ``path``, which may not be there yet;
        whether there was one and the file system allows it."""
        equal = self.find(sha256, size, other_than=path)
        if equal is None:
            return False
        part = path.with_name(f"{path.name}.{os.getpid()}.link")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            os.link(equal, part)
            os.replace(part, path)
            part.unlink(missing_ok=True)  # renaming one link onto another of the same file: no-op
        except OSError:  # no links here, too many of them, or another disk
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            return False
        return True


def shared_bytes(path: Path) -> int:
    """Bytes of a model's file or folder that others have too."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    found = [file.stat() for file in files if file.is_file()]
    return sum(status.st_size for status in found if status.st_nlink > 1)


def bytes_on_disk(folder: Path) -> int:
    """What deleting ``folder`` frees: files that other models share do not count, and those that it
    has twice count once."""
    freed = 0
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if not path.is_file():
                continue
            key = status.st_dev, status.st_ino
            seen[key] = seen.get(key, 0) + 1
            if seen[key] == max(status.st_nlink, 1):
                freed += status.st_size
    return freed


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
