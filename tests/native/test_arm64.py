"""The core for ARM64: built by a cross compiler, replayed by an emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from replaying import build_runner, replay, right_paths

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {' and no '.join(MISSING)} here; "
        "Debian has them in g++-aarch64-linux-gnu and qemu-user",
    ),
    pytest.mark.timeout(900),  # a build, on a machine that may be busy
]


@pytest.fixture(scope="module")
def runner() -> Path:
    options = (f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    return build_runner("replay-arm64", *options)


@pytest.mark.parametrize(
    ("processor", "paths"),
    [
        ("max", ["i8mm", "neon", "portable"]),
        ("neoverse-n1", ["neon", "portable"]),
        # ARMv8.0: an instruction that came later would end the process.
        ("cortex-a53", ["portable"]),
    ],
)
def test_every_path_is_right_in_every_case(
    runner: Path, recorded: Path, processor: str, paths: list[str]
) -> None:
    assert right_paths(replay(runner, recorded, EMULATOR, "-cpu", processor)) == paths
