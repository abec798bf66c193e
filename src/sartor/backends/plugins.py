"""Entry points of other packages, found without importing what reads them unless there are any."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_METADATA = (".dist-info", "egg-info")


def entry_points_of(group: str) -> list[EntryPoint]:
    """The entry points of a group.

    ``importlib.metadata`` takes as long to import and to read every package as a model takes to
    load, and nearly always finds nothing; a look for the group's name in the files is quick.
    """
    if not _may_exist(group):
        return []
    from importlib.metadata import entry_points

    return list(entry_points(group=group))


def _may_exist(group: str) -> bool:
    # Packages that another importer knows, or that lie in an archive, have no files to look into.
    if any(hasattr(f, "find_distributions") and f is not PathFinder for f in sys.meta_path):
        return True
    header = f"[{group}]".encode()
    for folder in sys.path:
        if os.path.isfile(folder):
            return True
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue  # no such folder: Python passes over it, too
        for name in names:
            if name.lower().endswith(_METADATA):
                try:
                    with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                        if header in file.read():
                            return True
                except OSError:
                    continue  # most packages declare nothing
    return False
