"""What runs of models leave on the disk: packed weights and measured kernels, whose they are, and
which of them are of no more use.

Packed files lie in ``packed`` and kernel timings in ``tuned``, beside the store's models. All of
them can be made again, and what a process has open stays readable there when it is removed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from sartor.errors import SartorError
from sartor.formats import open_checkpoint
from sartor.formats.packed import SUFFIX, PackedFacts, abandoned_parts, packed_facts
from sartor.store import ModelStore
from sartor.store.leftovers import Leftover

_ABANDONED_SECONDS = 3600.0


class PackedFolder:
    """The packed files below a store's root."""

    def __init__(self, root: Path) -> None:
        self.path = root / "packed"

    @cached_property
    def files(self) -> list[PackedFacts]:
        """Those whose header can be read."""
        found = []
        for path in self.paths():
            with contextlib.suppress(SartorError):
                found.append(packed_facts(path))
        return found

    def paths(self) -> list[Path]:
        return sorted(self.path.glob(f"*{SUFFIX}"))

    @property
    def nbytes(self) -> int:
        """Of all packed files, readable or not."""
        return sum(map(file_bytes, self.paths()))

    def bytes_of(self, source: Path) -> int:
        """Of the files that were made from the checkpoint at ``source``, or from an equal one that
        has gone."""
        orphans = [f for f in self.files if f.source is not None and not f.source.exists()]
        mine = identity_of(source) if orphans else None
        return sum(
            file.nbytes
            for file in self.files
            if file.source == source or (file in orphans and file.identity == mine)
        )

    def made_from(self, source: Path, keep: Iterable[Path] = ()) -> list[Path]:
        """Files that were made from the checkpoint at ``source``, also before it was changed; but
        none that a checkpoint in ``keep`` uses too, since that is the same file or a copy."""
        mine = identity_of(source)
        others = {identity_of(path) for path in keep} - {None}
        found = [
            file.path
            for file in self.files
            if file.identity not in others
            and (file.source == source or (mine is not None and file.identity == mine))
        ]
        if any(file.identity is None for file in self.files) and mine not in others:
            nameless = {file.path for file in self.files if file.identity is None}
            found += sorted(nameless & self._names_for(source))
        return found

    def _names_for(self, source: Path) -> set[Path]:
        """Where packed files of a checkpoint lie: for those of versions that did not write down
        whose they are."""
        from sartor.backends.cpu.weights import packed_name
        from sartor.engine.head import requantize_head
        from sartor.models import load_model

        names = set()
        with contextlib.suppress(SartorError), contextlib.closing(open_checkpoint(source)) as file:
            model = load_model(file)
            for bits in (0, *range(2, 9)):
                with contextlib.suppress(SartorError):  # a head that does not divide so
                    names.add(self.path / packed_name(*requantize_head(model, bits)))
        return names


def identity_of(path: Path) -> str | None:
    """The identity of the checkpoint at ``path``; None where there is none that can be read."""
    try:
        with contextlib.closing(open_checkpoint(path)) as checkpoint:
            return checkpoint.identity()
    except SartorError:
        return None


def leftovers(store: ModelStore, *, all_packed: bool = False) -> list[Leftover]:
    """Everything below the store's root that is of no more use: see the kinds of Leftover.

    ``all_packed`` adds the packed files that are of use: each is made again at the next start of
    its model.
    """
    packed = PackedFolder(store.root)
    return [
        *store.leftovers(),
        *_packed(store, packed, all_packed),
        *_tuned(store.root / "tuned"),
    ]


def discard(store: ModelStore, leftover: Leftover) -> int:
    """Removes one of :func:`leftovers`, unless it has gone or come into use; the bytes freed."""
    if leftover.kind in ("packed", "tuned"):
        return remove_file(leftover.path)
    return store.discard(leftover)


def remove_file(path: Path) -> int:
    """Removes a file if it is still there and the system lets it go; the bytes freed."""
    nbytes = file_bytes(path)
    try:
        path.unlink()
    except OSError:  # another process was first, or (Windows) is using it
        return 0
    return nbytes


def file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _packed(store: ModelStore, packed: PackedFolder, everything: bool) -> Iterator[Leftover]:
    from sartor.backends.cpu.packing import LAYOUT_VERSION

    for path in abandoned_parts(packed.path):
        yield Leftover("packed", path, file_bytes(path), "never finished")
    readable = {file.path: file for file in packed.files}
    stored = {identity_of(model.path) for model in store.list()} if packed.paths() else set()
    places: dict[Path, str | None] = {}
    for path in packed.paths():
        file = readable.get(path)
        why = ""
        if file is None:
            why = "damaged, or of another version of Sartor"
        elif file.layout is None:  # another backend's, which knows when it is stale
            continue
        elif file.layout != LAYOUT_VERSION:
            why = "of another version of Sartor"
        elif file.identity is None or file.source is None:
            why = "of an earlier version of Sartor, which did not note the model"
        elif file.identity not in stored:
            if file.source not in places:
                places[file.source] = identity_of(file.source)
            if places[file.source] is None:
                why = f"its model has gone: {file.source}"
            elif places[file.source] != file.identity:
                why = f"its model has changed: {file.source}"
        if not why and everything and file is not None:
            why = f"in use, made again at the next start of {file.source}"
        if why:
            yield Leftover("packed", path, file_bytes(path), why)


def _tuned(folder: Path) -> Iterator[Leftover]:
    from sartor.backends.cpu.tuned import TunedDevice

    build = TunedDevice.here("", 0)
    for path in sorted(folder.glob("*.json")):
        try:
            device = json.loads(path.read_bytes())["device"]
            is_ours = (device["module"], device["layout"]) == (build.module, build.layout)
        except (OSError, ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            yield Leftover("tuned", path, file_bytes(path), "measured with another build")
    for path in sorted(folder.glob("*.part")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                yield Leftover("tuned", path, file_bytes(path), "never finished")
