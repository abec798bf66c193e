"""One file over HTTP: resumed after a cut, checked against its digest, visible only when whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sartor.store.progress import Progress, showing
from sartor.store.source import FileRecord, SourceError

T = TypeVar("T")

REACH_SECONDS = 4.5  # a source that keeps silent so long before its first byte is given up
STALL_SECONDS = 20.0  # a transfer under way may pause so long
ATTEMPTS = 4  # attempts in a row that bring no new byte
_CHUNK = 1 << 20
_RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)


class NoAnswerError(SourceError):
    """A source kept silent for too long."""


class Patience:
    """The time that one source may keep us waiting, over all its requests, until bytes flow."""

    def __init__(self) -> None:
        self._left = REACH_SECONDS

    def renew(self) -> None:
        """Bytes flow: the source was reached."""
        self._left = REACH_SECONDS

    def wait(self, call: Callable[[], T], where: str, *, keep: float = 0.0) -> T:
        """``call()``, given up when the time is over, less ``keep`` seconds for what follows.

        It runs in a thread of its own, since a name look-up heeds no time-out.
        """
        box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put((call(), None))
            except BaseException as error:
                box.put((None, error))

        start = time.monotonic()
        threading.Thread(target=work, name="sartor-reach", daemon=True).start()
        try:
            result, error = box.get(timeout=max(0.1, self._left - keep))
        except queue.Empty:
            raise NoAnswerError(
                f"{where} gave no answer within {time.monotonic() - start:.1f} s"
            ) from None
        finally:
            self._left -= time.monotonic() - start
        if isinstance(error, ConnectionError):  # an OSError, but not one of the disk's
            raise SourceError(f"{where}: {error}") from error
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a source. ``git_sha1`` is git's blob id, known for files outside of LFS."""

    path: str
    url: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def identity(self) -> str:
        """Tells apart the versions of a file, so that a resumed part is of the same one."""
        known = self.sha256 or self.git_sha1 or f"{self.url} {self.size}"
        return hashlib.sha256(known.encode()).hexdigest()[:12]


def session() -> Any:
    """The HTTP client that huggingface_hub is configured with (proxies, certificates)."""
    from huggingface_hub import get_session

    return get_session()


def download(
    remote: RemoteFile,
    folder: Path,
    headers: Mapping[str, str],
    progress: Progress,
    patience: Patience,
) -> FileRecord:
    """Fetch ``remote`` to ``folder / remote.path``; a part left by an earlier try is continued.

    Raises SourceError where the source fails for good or the digest is wrong, OSError where the
    disk does.
    """
    target = folder / remote.path
    part = target.with_name(f"{target.name}.{remote.identity}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.exists() and part.stat().st_size > 0
    if target.exists() and target.stat().st_nlink > 1:
        target.unlink()  # another model's file too: nothing may write into it
    if target.exists():
        # Whole already, from an earlier interrupted pull; checked again like any part.
        os.replace(target, part)
        resumed = True
    try:
        record = _transfer(remote, part, headers, progress, patience)
    except _WrongContentError:
        if not resumed:
            raise
        # The old part may be the one at fault: once more from the start.
        record = _transfer(remote, part, headers, progress, patience)
    os.replace(part, target)
    return record


class _WrongContentError(SourceError):
    pass


def _transfer(
    remote: RemoteFile,
    part: Path,
    headers: Mapping[str, str],
    progress: Progress,
    patience: Patience,
) -> FileRecord:
    part.touch()
    with open(part, "r+b") as out, showing(progress, remote.path, remote.size):
        sha256 = hashlib.sha256()
        while block := out.read(_CHUNK):
            sha256.update(block)
        progress.advance(out.tell())
        failures = 0
        reached = False  # bytes have come in this run
        whole = out.tell() == remote.size
        while not whole:
            before = out.tell()
            try:
                with _stream(remote, headers, before, patience) as (start, blocks):
                    if start != before:  # the server does not resume, or not this part
                        out.seek(start)
                        out.truncate()
                        sha256 = hashlib.sha256()
                        progress.advance(start - before)
                    for block in blocks:
                        out.write(block)
                        sha256.update(block)
                        progress.advance(len(block))
                        if remote.size is not None and out.tell() > remote.size:
                            break
                whole = remote.size is None or out.tell() >= remote.size
                if not whole:
                    raise PassingError(f"only {out.tell()} of {remote.size} bytes arrived")
            except Exception as error:
                progressed = out.tell() > before
                reached = reached or progressed
                # The disk's fault, a refusal, a source never reached: no new attempt helps. What
                # else there is, is what the HTTP client calls a lost connection.
                lost = reached and isinstance(error, NoAnswerError)
                if isinstance(error, (OSError, SourceError)) and not lost:
                    raise
                failures = 1 if progressed else failures + 1
                if failures >= ATTEMPTS:
                    raise SourceError(f"{remote.path}: {_reason(error)}") from error
                if reached:
                    patience.renew()
                # A broken line needs some time to come back; an unreached source gets little.
                time.sleep(0.2 * 3**failures if reached else 0.1 * 2**failures)
        size = out.tell()
        out.flush()
        os.fsync(out.fileno())
    try:
        verified = _check(remote, part, size, sha256.hexdigest())
    except _WrongContentError:
        part.unlink()
        raise
    return FileRecord(remote.path, size, sha256.hexdigest(), verified)


@contextlib.contextmanager
def _stream(
    remote: RemoteFile, headers: Mapping[str, str], offset: int, patience: Patience
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Open ``remote`` at ``offset``; yields where the body starts and the body's blocks."""
    wanted = {**headers, "Accept-Encoding": "identity"}
    if offset:
        wanted["Range"] = f"bytes={offset}-"
    client = session()

    def connect() -> tuple[Any, Any, Iterator[bytes], bytes]:
        context = client.stream(
            "GET", remote.url, headers=wanted, follow_redirects=True, timeout=STALL_SECONDS
        )
        response = context.__enter__()
        # Blocks as they arrive: larger ones would be lost half full when the connection breaks.
        blocks = response.iter_bytes() if response.status_code < 400 else iter(())
        return context, response, blocks, next(blocks, b"")

    context, response, blocks, first = patience.wait(connect, remote.path)
    try:
        status = response.status_code
        if status in _RETRY_STATUS:
            raise PassingError(f"the source answered {status}")
        if status >= 400 and status != 416:
            raise SourceError(f"{remote.path}: {explain_status(status)}")
        patience.renew()
        if status == 416:  # the part does not fit the file: start over
            yield 0, iter(())
        else:
            yield offset if status == 206 else 0, _chain(first, blocks)
    finally:
        context.__exit__(None, None, None)


class PassingError(Exception):
    """A failure that may pass: worth another attempt."""


def explain_status(status: int) -> str:
    """What an HTTP status of a hub means for the user."""
    if status in (401, 403):
        return (
            f"access refused ({status}): the repository is private or gated, or does not exist; "
            "accept its terms on its page and set an access token"
        )
    return f"not found ({status})" if status == 404 else f"the source answered {status}"


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _check(remote: RemoteFile, part: Path, size: int, sha256: str) -> bool:
    """Compare with what the source stated; True where it stated a digest."""
    if remote.size is not None and size != remote.size:
        raise _WrongContentError(
            f"{remote.path}: {size} bytes arrived where {remote.size} were announced"
        )
    if remote.sha256 is not None:
        if sha256 != remote.sha256.lower():
            raise _WrongContentError(
                f"{remote.path}: wrong SHA-256 {sha256[:12]}..., the source states "
                f"{remote.sha256[:12]}...; the download is damaged and was discarded"
            )
        return True
    if remote.git_sha1 is not None:
        blob = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        blob.update(part.read_bytes())
        if blob.hexdigest() != remote.git_sha1:
            raise _WrongContentError(f"{remote.path}: wrong git blob id; the file was discarded")
        return True
    return False
