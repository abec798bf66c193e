"""API keys: who may ask, with what share of the machine, and how much.

A keys file is TOML, one ``[[key]]`` table a key, and holds no key itself but its SHA-256. A plain
fast hash is right here: a key is 256 random bits, so there is nothing that guessing could find,
and slow password hashes would only make each request slow.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from filelock import FileLock

from sartor.errors import SartorError, UsageError

logger = logging.getLogger(__name__)
_PREFIX = "sk-sartor-"  # lets scanners for leaked secrets recognise one
_HEADER = "# API keys of `sartor serve --keys`; written by `sartor keys`, may be edited by hand.\n"

_END = "\n# end of keys\n"  # the last line of a file that is whole
_QUIET_SECONDS = 0.25
_SETTLED_SECONDS = 2.0  # the coarsest times that file systems keep

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0)]


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a key may do. 0, like an empty list, sets no limit.

    name      also the tenant whose requests share the machine fairly with those of others
    sha256    of the key, in hexadecimal digits
    share     weight of that: twice the share, twice the tokens
    priority  higher runs first
    max_streams          answers under way at once; each of ``n`` choices of each prompt is one
    requests_per_minute, tokens_per_minute   prompts and answers together
    intake_seconds_per_minute   of reading requests, those that were refused included
    models    names that the key may ask for: models, aliases, adapters
    group     keys of one group find each other's prompts in the prefix cache, others never do
    admin     may load and unload adapters, and see what ``metrics`` lets it see
    metrics   sees all lines of /metrics, and in /health why a model cannot answer; without it a key
              sees the lines of its own requests
    """

    name: Name
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    share: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] = 0
    max_streams: Count = 0
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    intake_seconds_per_minute: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    models: tuple[str, ...] = ()
    group: Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?\Z")] = ""
    admin: bool = False
    metrics: bool = False

    @property
    def sees_all(self) -> bool:
        """Whether the figures and the problems of the whole server are for this key."""
        return self.admin or self.metrics

    @property
    def salt(self) -> str:
        """Who shares cached prefixes: how long an answer takes to begin would tell a key what
        others asked before."""
        if self.group:
            return f"group {self.group}"
        return f"key {self.name}" if self.name else ""


ANYONE = ApiKey(name="", sha256="", admin=True)
"""In the name of whom requests come where there are no keys."""

GUEST = ApiKey(name="", sha256="")
"""Who may see the names of models, and nothing of how the server fares."""

STRANGER = ApiKey(name="", sha256="", models=("",))
"""Who may see nothing: no model has an empty name."""


class _Entries(msgspec.Struct, forbid_unknown_fields=True):
    key: tuple[ApiKey, ...] = ()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. SartorError where it cannot be read, UsageError where it is wrong."""
    return _parse_keys(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SartorError(f"the keys file {path} cannot be read: {error.strerror}") from None


def _parse_keys(path: Path, content: bytes) -> tuple[ApiKey, ...]:
    try:
        # parse_float=float is the default; the text is decoded as UTF-8, as TOML demands.
        keys = msgspec.convert(tomllib.loads(content.decode("utf-8")), _Entries).key
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise UsageError(f"the keys file {path} is wrong: {error}") from None
    for what, values in (
        ("name", [key.name for key in keys]),
        ("sha256", [key.sha256 for key in keys]),
    ):
        if twice := {value for value in values if values.count(value) > 1}:
            raise UsageError(f"the keys file {path}: two keys have the {what} {sorted(twice)[0]}")
    return keys


class _Stamp(NamedTuple):
    """What tells one state of the file from another without reading it."""

    changed_ns: int
    modified_ns: int
    size: int
    inode: int
    device: int
    mode: int


class KeyFile:
    """The keys of a file as it is now: a change counts from the next request on.

    ``sartor keys`` replaces the file as a whole. What an editor writes in place is believed once it
    has been left alone for a moment: half of a file may be a sound one that lacks the limits of its
    last key. A file that has become wrong or unreadable changes nothing, and the log says so; one
    without keys lets nobody in. Raises like :func:`read_keys` when opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._settled = False  # no further change could have the times that were seen
        self._young: tuple[_Stamp | None, float] = (None, 0.0)
        self._seen = self._look()
        self._content = _read(path)
        self._keys = _parse_keys(path, self._content)
        self._check_mode()

    def __len__(self) -> int:
        return len(self._current())

    def find(self, token: str) -> ApiKey | None:
        """The entry of a key, or None. Takes the same time whichever entry it is, if any."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for key in self._current():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _current(self) -> tuple[ApiKey, ...]:
        stamp = self._look()
        if stamp == self._seen and self._settled:
            return self._keys
        try:
            content = _read(self._path)
            if content != self._content:
                if not self._is_whole(content, stamp):
                    return self._keys
                self._content = content
                self._keys = _parse_keys(self._path, content)
        except SartorError as error:
            # A wrong content is parsed once; a file that is gone is looked for at each request.
            if isinstance(error, UsageError) or stamp != self._seen:
                logger.error("%s; the keys from before stay in force", error)
        moded = stamp is not None and (self._seen is None or stamp.mode != self._seen.mode)
        self._seen = stamp
        self._settled = stamp is not None and _age(stamp) > _SETTLED_SECONDS
        if moded:
            self._check_mode()
        return self._keys

    def _is_whole(self, content: bytes, stamp: _Stamp | None) -> bool:
        """Whether nobody is writing to the file any more."""
        if stamp is None or content.endswith(_END.encode()):
            return True
        if _age(stamp) > _QUIET_SECONDS:
            return True
        # Where the clock that wrote the times is ahead of this one, their age says nothing.
        before, since = self._young
        if stamp == before:
            return time.monotonic() - since > _QUIET_SECONDS
        self._young = (stamp, time.monotonic())
        return False

    def _check_mode(self) -> None:
        if self._seen is None or sys.platform == "win32":
            return
        folder = self._path.resolve().parent
        with contextlib.suppress(OSError):
            mode = folder.stat().st_mode
            # In a sticky folder, like /tmp, nobody can replace the files of others.
            if mode & 0o022 and not mode & stat.S_ISVTX:
                logger.warning(
                    "the folder %s of the keys file may be written by other users (mode %04o), who "
                    "could replace the file and let anybody in; take that right away: chmod go-w",
                    folder,
                    mode & 0o7777,
                )
        if self._seen.mode & 0o022:
            logger.warning(
                "the keys file %s may be written by other users (mode %04o), who could let anybody "
                "in; take that right away: chmod 600",
                self._path,
                self._seen.mode & 0o777,
            )

    def _look(self) -> _Stamp | None:
        try:
            now = self._path.stat()
        except OSError:
            return None
        times = now.st_ctime_ns, now.st_mtime_ns
        return _Stamp(*times, now.st_size, now.st_ino, now.st_dev, now.st_mode)


def _age(stamp: _Stamp) -> float:
    """Seconds since the last change, by the clock that wrote the file's times."""
    return (time.time_ns() - max(stamp.changed_ns, stamp.modified_ns)) / 1e9


def add_key(path: Path, make: Callable[[str], ApiKey]) -> str:
    """Adds the entry that ``make`` gives for a hash; returns the key, which is kept nowhere.

    A file that is not there is made. UsageError where the name is taken.
    """
    path = path.resolve()  # a link stays one
    token = _PREFIX + secrets.token_urlsafe(32)
    entry = make(hashlib.sha256(token.encode()).hexdigest())
    with _locked(path):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == entry.name for key in keys):
            raise UsageError(f"{path} has a key {entry.name}; revoke it first, or choose a name")
        _write(path, (*keys, entry))
    return token


def revoke_key(path: Path, name: str) -> None:
    """Removes the entry of that name. UsageError where there is none."""
    path = path.resolve()
    with _locked(path):
        keys = read_keys(path)
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise UsageError(f"{path} has no key {name}; it has {known}")
        _write(path, left)


def _locked(path: Path) -> FileLock:
    return FileLock(path.with_name(path.name + ".lock"), mode=0o600)


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    """As a whole or not at all, and for the owner's eyes only."""
    text = _HEADER + "".join(_table(key) for key in keys) + _END
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise SartorError(f"the keys file {path} cannot be written: {error.strerror}") from None


def _table(key: ApiKey) -> str:
    lines = ["", "[[key]]"]
    for name, value in msgspec.structs.asdict(key).items():
        if value or name in ("name", "sha256"):
            # JSON's strings, numbers, booleans and flat lists are TOML's too, but for DEL.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"
