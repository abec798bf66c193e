"""A compiler that cannot build the core is one line that says what to install, from make and CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HINT = "apt-get install g++"


@pytest.fixture(params=["missing", "old"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """``CXX`` and what is said of it."""
    if request.param == "missing":
        return str(tmp_path / "none"), "there is no C++ compiler"
    real = shutil.which("c++") or shutil.which("g++")
    if real is None:
        pytest.skip("no C++ compiler")
    old = tmp_path / "old++"
    old.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do case "$a" in -std=*20 | -std=*2a) echo no >&2; exit 1 ;; esac; done\n'
        f'exec "{real}" "$@"\n'
    )
    old.chmod(0o755)
    return str(old), "does not know C++20"


def test_make(compiler: tuple[str, str]) -> None:
    cxx, said = compiler
    if shutil.which("make") is None:
        pytest.skip("no make")
    command = ["make", "-C", str(ROOT), "--silent", "compiler"]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        command, env={**environment, "CXX": cxx}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("error: ")
    assert said in line
    assert cxx in line
    assert HINT in line


def test_cmake_and_a_second_attempt(compiler: tuple[str, str], tmp_path: Path) -> None:
    cxx, said = compiler
    scripts = str(Path(sys.executable).parent)  # make puts no environment into the path
    places = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=places), shutil.which("ninja", path=places)
    if cmake is None or ninja is None:
        pytest.skip("no CMake or no ninja")
    command = [
        *(cmake, "-G", "Ninja", "-S", str(ROOT / "src" / "sartor" / "native")),
        *("-B", str(tmp_path / "build"), "-DSARTOR_PYTHON=OFF", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "CXX": cxx}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert done.stderr.count("CMake Error") == 1
    message = " ".join(done.stderr.split())
    assert f"Sartor: {said}" in message or said in message
    assert HINT in message
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
