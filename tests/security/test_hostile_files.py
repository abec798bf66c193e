"""Files from strangers, changed in many ways: each is used, or refused by name.

A case is named by its number, and is the same every time:
``SARTOR_HOSTILE_CASES=4711:4712 pytest tests/security/test_hostile_files.py -k gguf``.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_kinds import KINDS, Kind

from sartor.errors import SartorError

SECONDS = 5.0
"""The longest that one file may take."""

SLOW = "it took {:.1f} s"

_ROOM = 2 << 30
"""Bytes of memory that all cases of a kind together may take beyond what is in use."""


def cases() -> range:
    """The numbers of the cases: ``SARTOR_HOSTILE_CASES`` is how many, or the first and the end."""
    first, _, end = os.environ.get("SARTOR_HOSTILE_CASES", "200").rpartition(":")
    return range(int(first or 0), int(end))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Kind]:
    folder = tmp_path / "sound"
    folder.mkdir()
    return request.param, KINDS[request.param](folder)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What a header claims must not be allocated; sanitizers map terabytes for themselves."""
    if os.name != "posix" or "asan" in os.environ.get("LD_PRELOAD", ""):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fault(kind: Kind, folder: Path) -> str | None:
    """What is wrong with how a file was taken; None where it was used, or refused properly."""
    began = time.monotonic()
    try:
        kind.use(folder)
    except SartorError as error:
        text = str(error)
        if "\n" in text or not text or len(text) > 4096:
            return f"an error of {len(text)} characters: {text[:300]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    seconds = time.monotonic() - began
    return None if seconds < SECONDS else SLOW.format(seconds)


def fault_of_case(name: str, kind: Kind, number: int, folder: Path) -> str | None:
    folder.mkdir()
    kind.write(folder, random.Random(f"{name} {number}"))
    found = fault(kind, folder)
    shutil.rmtree(folder)
    return found


@pytest.mark.timeout(3600)
def test_changed_files_are_used_or_refused(kind: tuple[str, Kind], tmp_path: Path) -> None:
    name, what = kind
    folder = tmp_path / "case"
    wrong: list[str] = []
    for number in cases():
        found = fault_of_case(name, what, number, folder)
        if found is not None and found.startswith(SLOW[:8]):
            # A busy machine can stop a process for long: what is slow is slow again.
            found = fault_of_case(name, what, number, folder)
        if found is not None:
            wrong.append(f"case {number}: {found}")
    assert wrong == []


def test_the_sound_files_are_used(kind: tuple[str, Kind], tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    kind[1].write(folder, None)
    kind[1].use(folder)
