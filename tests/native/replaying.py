"""Builds and starts sartor_replay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sartor.backends import conformance

ROOT = Path(__file__).parents[2]


def build_runner(folder: str, *options: str) -> Path:
    """sartor_replay, built in ``build/folder``; what is there already is not built again."""
    source, build = ROOT / "src" / "sartor" / "native", ROOT / "build" / folder
    _run("cmake", "-G", "Ninja", "-S", source, "-B", build, "-DSARTOR_PYTHON=OFF", *options)
    return _build(build)


def build_module(folder: str, *options: str) -> Path:
    """The Python module, built in ``build/folder``, which it may share with sartor_replay."""
    source, build = ROOT / "src" / "sartor" / "native", ROOT / "build" / folder
    _run("cmake", "-G", "Ninja", "-S", source, "-B", build, "-DSARTOR_PYTHON=ON", *options)
    _build(build, "_native")
    return next(build.glob("_native.*.so"))


def build_beside_module() -> Path:
    """sartor_replay of the objects that the Python module was linked from, where they are left."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-*"
    builds = sorted((ROOT / "build").glob(f"{tag}/build.ninja"))
    return _build(builds[0].parent) if builds else build_runner("replay")


def _build(build: Path, target: str = "sartor_replay") -> Path:
    _run("cmake", "--build", build, "-j2", "--target", target)
    return build / target


def _run(*command: str | Path) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def replay(
    runner: Path, cases: Path, *before: str, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs it; ``before`` is what starts it where this machine cannot."""
    command = (*before, str(runner), str(cases))
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def right_paths(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The paths on which the whole suite was run; fails where anything of it was wrong."""
    lines = done.stdout.splitlines()
    assert [line for line in lines if "WRONG" in line] == []
    assert done.returncode == 0, done.stderr
    count = sum(1 for _ in conformance.cases())
    end = f": {count} of {count} right"
    return [line.removesuffix(end) for line in lines if line.endswith(end)]
