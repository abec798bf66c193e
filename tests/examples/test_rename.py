"""The script that copies the example under another name: what it writes builds and is found."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from example_chip import EXAMPLE, environment

COMMAND = ("-c", "from sartor.cli.main import main; main()")


def rename(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE / "rename.py", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def run(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(target),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("options", [(), ("--keep-cpu-kernel",)], ids=["plain", "with the kernel"])
def test_a_copy_can_be_installed_and_is_right(options: tuple[str, ...], tmp_path: Path) -> None:
    folder, target = tmp_path / "copy", tmp_path / "site"
    done = rename("mychip", folder, *options)
    assert (done.returncode, done.stderr) == (0, "")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not any("example" in path.name for path in files)
    for path in files:
        assert "example" not in path.read_text(encoding="utf-8").lower(), path
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    doors = project["project"]["entry-points"]
    assert doors["sartor.backends"] == {"mychip": "sartor_mychip.backend:MychipBackend"}
    assert ("sartor.cpu_kernels" in doors) == bool(options)

    installed = run(
        target,
        *("-m", "pip", "install", "--no-build-isolation", str(folder)),
        *("--no-deps", "--no-cache-dir", "--target", str(target)),
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    checked = run(target, *COMMAND, "conformance", "--backend", "mychip")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "chip fp64 linear" in checked.stdout
    if options:
        probe = "from sartor.backends.cpu.custom import custom_kernels as c; print(c())"
        asked = "import os; os.environ['SARTOR_MYCHIP_KERNELS'] = '1'; "
        assert "'mychip'" in run(target, "-c", asked + probe).stdout


@pytest.mark.parametrize("name", ["cpu", "example", "My-Chip", "my-chip", "", "1st", "../x"])
def test_names_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    done = rename(name, tmp_path / "copy")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "copy").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    done = rename("mychip", tmp_path)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert list(tmp_path.iterdir()) == []
