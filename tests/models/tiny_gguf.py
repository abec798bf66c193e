"""Writes tiny models of transformers as GGUF files, with the ``gguf`` package and llama.cpp's
conventions: names by its own tensor map, rotary rows interleaved for "llama", Gemma's norms + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
INTERLEAVED = ("llama", "granite", "smollm3")
Extra = Callable[[gguf.GGUFWriter], None]


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order of interleaved rope: i, i + dim / 2, i + 1, ..."""
    per_head = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(per_head.swapaxes(1, 2)).reshape(rows.shape)


def write(
    model: PreTrainedModel,
    architecture: str,
    path: Path,
    extra: Extra = lambda writer: None,
    skip: str = "",
    quantize: bool = False,
) -> Path:
    """``extra`` adds keys and tensors, ``skip`` leaves a tensor out, ``quantize`` uses Q8_0."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        data = tensor.to(torch.float32).numpy().copy()
        if architecture in INTERLEAVED and ".q_proj." in name:
            data = interleaved(data, heads)
        elif architecture in INTERLEAVED and ".k_proj." in name:
            data = interleaved(data, kv_heads)
        elif architecture.startswith("gemma") and "norm" in name:
            data = data + np.float32(1)
        stored = names.get_name(name, (".weight", ".bias"))
        if stored == skip:
            continue
        if quantize and data.ndim == 2 and data.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, data)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
