from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_files() -> dict[str, Path]:
    """The real checkpoints by name, from the folder in SARTOR_TEST_MODELS."""
    folder = os.environ.get("SARTOR_TEST_MODELS")
    if not folder:
        pytest.skip("SARTOR_TEST_MODELS is not set to a folder with the real checkpoints")
    names = ("smollm2-135m", "gemma3-270m")
    files = {name: Path(folder) / f"{name}.gguf" for name in names}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        pytest.skip(f"SARTOR_TEST_MODELS is set, but there is no {', '.join(missing)}")
    return files
