from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from example_chip import EXAMPLE, ROOT, Python, environment

sys.path.append(str(ROOT / "tests" / "serving"))
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed into a folder of its own by the command that its README
    gives."""
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--no-build-isolation", str(EXAMPLE)),
            *("--no-deps", "--no-cache-dir", "--target", str(target)),
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="session")
def python(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs Python with the example installed; ``more`` are variables of its environment. What
    ran before is not run again."""
    home = tmp_path_factory.mktemp("home")
    paths = environment(installed, ROOT / "tests" / "engine")

    @functools.cache
    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**paths, "SARTOR_HOME": str(home), **more},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
