"""A whole model whose linear layers are stored in a quantised layout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from logits_runner import TOKENS, relative_error, run
from quantized_writers import LAYOUTS
from safetensors.torch import load_file, save_file
from tiny_models import CASES, build, save

from sartor.formats import open_checkpoint
from sartor.models import load_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
# One of each way of reading; the rest differs in numbers only.
CHOSEN = (
    *("gptq", "gptq-3-bits-act-order-sym", "awq", "pack-zero", "pack-act-order", "int8-zero"),
    *("float-channel", "fp8-block", "mxfp4"),
)


@cache
def plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    save(build(CASES["llama"], SIZES), folder)
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def logits(folder: Path) -> np.ndarray:
    model = load_model(open_checkpoint(folder))
    return run(model, "reference", TOKENS, [len(TOKENS)])


@pytest.mark.parametrize("name", CHOSEN)
def test_logits_equal_those_of_the_plain_weights(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    generator = np.random.default_rng(9)
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    tensors = dict(plain_tensors(plain))
    stored = dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            parts, weights = layout.write(generator, *tensor.shape)
            del stored[key]
            stored |= {key.removesuffix("weight") + part: data for part, data in parts.items()}
            tensors[key] = torch.tensor(weights)
    quantized.mkdir()
    save_file(tensors, plain / "model.safetensors")
    save_file(stored, quantized / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = layout.config
    (quantized / "config.json").write_text(json.dumps(config))
    found, wanted = logits(quantized), logits(plain)
    if layout.ordered:
        np.testing.assert_array_equal(found, wanted)
    else:  # act-order adds up the same products in another order
        assert relative_error(found, wanted) < 1e-5
