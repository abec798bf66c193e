"""Builds llama-server from the sources that llama-cpp-python brings, for this processor.

    python benchmarks/llama_server.py [--environments DIR] [--jobs 2]

The same version and settings as the peer llama_cpp, without ggml's AMX code (see peers.py), TLS and
web pages; nothing but the Python package is fetched. Needs CMake, Ninja and a compiler, and some
minutes of two cores. The binary is DIR/llama_server/bin/llama-server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from peers import NO_AMX, PEERS, default_environments

from sartor.errors import SartorError

NAME = "llama_server"
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def binary(environments: Path) -> Path | None:
    """llama-server where it is built, else None."""
    path = environments / NAME / "bin" / "llama-server"
    return path if path.exists() else None


def build(environments: Path, jobs: int) -> Path:
    """Fetches and builds, or does nothing where it is there; the binary. SartorError says where
    it failed; what was compiled is kept for the next attempt."""
    if (ready := binary(environments)) is not None:
        return ready
    root = environments / NAME
    source, work = root / "source", root / "build"
    (package,) = PEERS["llama_cpp"].requirements
    llama = _find(source)
    if llama is None:
        source.mkdir(parents=True, exist_ok=True)
        # By name: what pip needs to look into the package, CMake itself, should come as wheels.
        name = package.partition("==")[0]
        pip = [sys.executable, "-m", "pip", "download", "--no-binary", name, "--no-deps"]
        _run([*pip, "--dest", str(source), package])
        (archive,) = source.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(source, filter="data")
        llama = _find(source)
        if llama is None:
            raise SartorError(
                f"{archive} has no vendor/llama.cpp; {package} has changed its layout"
            )
    flags = {"CFLAGS": NO_AMX, "CXXFLAGS": NO_AMX}
    _run(["cmake", "-S", str(llama), "-B", str(work), "-G", "Ninja", *CMAKE], flags)
    _run(["ninja", "-C", str(work), f"-j{jobs}", "llama-server"])
    target = root / "bin" / "llama-server"
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(".part")
    shutil.copy2(work / "bin" / "llama-server", part)
    part.replace(target)
    return target


def _find(source: Path) -> Path | None:
    return next(iter(source.glob("llama_cpp_python-*/vendor/llama.cpp")), None)


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    try:
        code = subprocess.run(command, env={**os.environ, **(environment or {})}).returncode
    except FileNotFoundError:
        raise SartorError(f"{command[0]} is not installed; install it and try again") from None
    if code:
        raise SartorError(f"{command[0]} failed with code {code}: {' '.join(command)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, default=default_environments())
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    try:
        print(build(options.environments, options.jobs))
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
