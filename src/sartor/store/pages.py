"""Addresses of a hub's pages, as people paste them from a browser or another program."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from sartor.errors import UsageError

Hub = Literal["hf", "modelscope"]

_HOSTS: dict[str, Hub] = {
    "huggingface.co": "hf",
    "hf.co": "hf",
    "hf-mirror.com": "hf",
    "modelscope.cn": "modelscope",
    "modelscope.ai": "modelscope",
}
_ENDPOINTS: dict[str, Hub] = {
    "HF_ENDPOINT": "hf",
    "MODELSCOPE_ENDPOINT": "modelscope",
    "MODELSCOPE_DOMAIN": "modelscope",
}
_MAIN: dict[Hub, str] = {"hf": "main", "modelscope": "master"}
_OTHER = ("datasets", "spaces", "collections", "papers", "docs", "blog", "studios", "organization")
_FILE_VIEWS = ("blob", "resolve", "raw", "blame", "edit", "tree", "commits", "view")
_SCHEME = re.compile(r"(?i)(https?|hf)://")


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows: a repository, perhaps at a revision, perhaps one of its files or folders;
    ``quant`` is what follows ``:`` behind the repository's name."""

    hub: Hub
    repository: str
    revision: str | None = None
    path: str | None = None
    quant: str | None = None


def read_page(text: str) -> Page | None:
    """The page that ``text`` is the address of, with or without a scheme; None where it is none.

    Raises UsageError for the address of something that is no model.
    """
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "hf":  # as huggingface_hub's file system writes it
        text = f"hf.co/{text[scheme.end() :]}"
        scheme = None
    try:
        address = urlsplit(text if scheme else f"//{text}")
    except ValueError as error:  # brackets of an IPv6 address that is none
        if scheme is None:
            return None
        raise UsageError(f"{text}: no address ({error}); check it") from error
    host = address.netloc.rpartition("@")[2].lower().removeprefix("www.")
    hub = _hosts().get(host)
    if hub is None:
        if scheme is None:
            return None
        raise UsageError(
            f"{text}: not the page of a model on {', '.join(_HOSTS)}; "
            "download the file and give its path"
        )
    steps = [step for step in address.path.split("/") if step]
    if steps[:2] == ["api", "models"]:
        steps = steps[1:]
    if steps and steps[0] == "models":
        steps = steps[1:]
    if steps and steps[0] in _OTHER:
        raise UsageError(f"{text}: shows {steps[0]}, not a model; give the model's own page")
    if len(steps) < 2:
        raise UsageError(f"{text}: names no model; a model's page is {host}/org/name")
    name, _, quant = steps[1].removesuffix(".git").partition(":")
    page = _inside(hub, f"{steps[0]}/{name}", steps[2:], parse_qs(address.query))
    if quant and page.path is None:
        return Page(hub, page.repository, page.revision, None, quant)
    return page


def _hosts() -> dict[str, Hub]:
    """Known hosts, and mirrors that the environment names."""
    hosts = dict(_HOSTS)
    for variable, hub in _ENDPOINTS.items():
        mirror = os.environ.get(variable, "").rpartition("://")[2].strip("/").lower()
        if mirror:
            hosts.setdefault(mirror.partition("/")[0].removeprefix("www."), hub)
    return hosts


def _inside(hub: Hub, repository: str, steps: list[str], query: dict[str, list[str]]) -> Page:
    """What the rest of an address says of the place in its repository."""
    if hub == "modelscope" and steps[:1] == ["file"]:
        steps = steps[1:]  # /file/view/REVISION/PATH
    revision = path = None
    if len(steps) >= 2 and steps[0] in _FILE_VIEWS:
        # A branch of several words is one step, with %2F between them, and stays so.
        revision = None if steps[1] == _MAIN[hub] else steps[1]
        path = unquote("/".join(steps[2:])) or None
    elif len(steps) >= 2 and steps[0] == "commit":
        revision = steps[1]
    # The viewer of a GGUF file is a window on the repository's page.
    for key in ("show_file_info", "fileName", "filePath", "FilePath"):
        if path is None and query.get(key):
            path = query[key][0]
    return Page(hub, repository, revision, path)
