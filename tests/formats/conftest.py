from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import tiny_tensors, write_config, write_gguf

# Whole models, and how to run them, are at home there.
sys.path.append(str(Path(__file__).parents[1] / "models"))


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_tensors())


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A safetensors folder with one tensor in each supported dtype."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    generator = np.random.default_rng(3)
    values = generator.standard_normal((4, 8)).astype(np.float32)
    save_file(
        {"a.weight": values, "b.weight": values.astype(np.float16), "c.bias": values[0].copy()},
        folder / "model.safetensors",
    )
    write_config(folder)
    return folder
