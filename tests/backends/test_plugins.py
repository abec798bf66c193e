"""Entry points of other packages, and that looking for them is quick where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sartor
from sartor.backends.plugins import entry_points_of

GROUP = "sartor.a_group_for_tests"
DECLARED = f"[other]\nx = y:z\n\n[{GROUP}]\nmine = json:dumps\n"


def package(folder: Path, name: str = "a_package-1.0.dist-info") -> Path:
    metadata = folder / name
    metadata.mkdir()
    facts = "METADATA" if name.endswith("dist-info") else "PKG-INFO"
    (metadata / facts).write_text("Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(DECLARED)
    return folder


def found() -> list[str]:
    return [entry.value for entry in entry_points_of(GROUP)]


@pytest.mark.parametrize("name", ["a_package-1.0.dist-info", "a_package.egg-info"])
def test_a_package_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert found() == []
    monkeypatch.syspath_prepend(str(package(tmp_path, name)))
    assert found() == ["json:dumps"]
    assert [entry.load() for entry in entry_points_of(GROUP)] == [__import__("json").dumps]


def test_an_egg_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    egg = tmp_path / "a_package-1.0-py3.11.egg"
    egg.mkdir()
    monkeypatch.syspath_prepend(str(package(egg, "EGG-INFO")))
    assert found() == ["json:dumps"]


def test_a_package_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(package(tmp_path))
    monkeypatch.syspath_prepend("")
    assert found() == ["json:dumps"]


def test_a_package_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "packages.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a_package-1.0.dist-info/METADATA", "Name: a-package\nVersion: 1.0\n")
        file.writestr("a_package-1.0.dist-info/entry_points.txt", DECLARED)
    monkeypatch.syspath_prepend(str(archive))
    assert found() == ["json:dumps"]


def test_a_package_that_another_importer_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import DistributionFinder, PathDistribution

    class Finder(DistributionFinder):
        def find_spec(self, *arguments: object) -> None:
            return None

        def find_distributions(self, context: object = None) -> list[PathDistribution]:  # type: ignore[override]
            return [PathDistribution(tmp_path / "a_package-1.0.dist-info")]

    package(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    assert found() == ["json:dumps"]


def test_nothing_is_imported_for_nothing() -> None:
    code = (
        "import sys; from sartor.backends.plugins import entry_points_of; "
        f"assert entry_points_of({GROUP!r}) == []; print('importlib.metadata' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # what the site imports is not ours
        env={**os.environ, "PYTHONPATH": str(Path(sartor.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
