"""The thread pool by itself, also under the thread sanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from replaying import ROOT

CORE = ROOT / "src" / "sartor" / "native" / "core"


@pytest.mark.parametrize(
    "options", [["-O2"], ["-O1", "-g", "-fsanitize=thread"]], ids=["plain", "sanitized"]
)
def test_tasks_that_throw_and_threads_that_are_refused(options: list[str], tmp_path: Path) -> None:
    program = tmp_path / "check"
    source = Path(__file__).with_name("thread_pool_check.cpp")
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-pthread", f"-I{CORE}", *options]
    built = subprocess.run(
        [*command, source, CORE / "thread_pool.cpp", "-o", program], capture_output=True, text=True
    )
    if "-fsanitize=thread" in options and "cannot find" in built.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"line {done.returncode} of {source.name}: {done.stderr}"
