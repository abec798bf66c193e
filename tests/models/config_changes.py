"""Saved checkpoints whose config.json tests change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import CASES
from tiny_models import build, save

from sartor.errors import SartorError
from sartor.formats import open_checkpoint
from sartor.models import Model, load_model

Change = tuple[str, dict[str, Any], str]
"""A name in ``CASES``, what :func:`changed` does to its configuration, what the error says."""

ABSURD: list[Any] = [0, -1, 7, 2**70, 1e308, 0.5, "x", [], ["full_attention"], {}, True, None]


class Folders(dict[str, Path]):
    """The checkpoint of each case, saved below ``root`` when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, name: str) -> Path:
        self[name] = save(build(CASES[name], {}), self.root / name)
        return self[name]


def load(folder: Path) -> Model:
    return load_model(open_checkpoint(folder))


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """The checkpoint with another configuration; None removes a key, ``...`` writes a null."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = None if value is ... else value
    (to / "config.json").write_text(json.dumps(config))
    if not (to / "model.safetensors").exists():
        (to / "model.safetensors").symlink_to(folder / "model.safetensors")
    return to


def absurd_values_refused(folder: Path, nested: str = "") -> int:
    """How often an absurd value of one option is refused, each option in turn; rewrites config.json.

    Anything but a model or an error for users gets through to the test. The options in the
    table ``nested`` take their turn too.
    """
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for table in (config, config[nested]) if nested else (config,):
        for key, before in list(table.items()):
            for value in ABSURD:
                table[key] = value
                (folder / "config.json").write_text(json.dumps(config))
                try:
                    load(folder)
                except SartorError:
                    refused += 1
            table[key] = before
    return refused
