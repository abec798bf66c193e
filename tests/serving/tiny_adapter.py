"""A LoRA adapter for the tiny model, in the layout of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tiny_model import HIDDEN


def write_tiny_adapter(folder: Path, seed: int = 0, width: int = HIDDEN) -> Path:
    """Adapts two projections so strongly that answers change; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in ("q_proj", "v_proj"):
        module = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"] = rng.normal(0, 1, (4, width)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(0, 1, (width, 4)).astype(np.float32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
