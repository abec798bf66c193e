"""The long form of test_hostile_files.py: ten thousand cases of each kind under the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_kinds import KINDS

sys.path.append(str(Path(__file__).parents[1] / "native"))

from replaying import ROOT, build_module

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]  # the kernels take minutes to compile

CASES = 10_000


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a Python whose native core looks at every access."""
    module = build_module("replay-address-undefined", "-DSARTOR_SANITIZE=address,undefined")
    # The runtime must be there before the first allocation, and with it what throws exceptions.
    names = ("libasan.so", "libstdc++.so.6")
    compiler = os.environ.get("CXX", "c++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip(f"{compiler} has no {' and '.join(names)} of its own; use g++")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        # Python leaves memory to the system at its end. What is too large is refused, as without
        # sanitizers.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "RUST_BACKTRACE": "0",
        "SARTOR_SANITIZED_CORE": str(module),
        "SARTOR_HOSTILE_CASES": str(CASES),
        "PYTHONPATH": str(Path(__file__).parent),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_clean(kind: str, environment: dict[str, str]) -> None:
    """What a sanitizer finds ends the process, with a report on standard error."""
    test = f"{Path(__file__).with_name('test_hostile_files.py')}"
    command = [sys.executable, "-m", "pytest", "-p", "sanitized_core", "-s", "-W", "ignore"]
    command += [f"{test}::test_changed_files_are_used_or_refused[{kind}]"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
