"""Small checkpoints for the tests of the formats, written by the formats' own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random stored bytes of a tensor: every bit pattern, so infinite and NaN scales, too."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (rows, columns // block * nbytes), dtype=np.uint8)


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    *,
    alignment: int | None = None,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_add_bos_token(True)
    writer.add_token_list(["<s>", "héllo", "", "世界", "a" * 300])
    writer.add_token_scores([0.0, -1.0, -2.0, -3.0, -4.5])
    writer.add_token_types([3, 1, 1, 1, 1])
    if extra is not None:
        extra(writer)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_tensors() -> dict[str, tuple[np.ndarray, str]]:
    generator = np.random.default_rng(7)
    return {
        "token_embd.weight": (random_blocks("Q8_0", 5, 64), "Q8_0"),
        "blk.0.attn_q.weight": (random_blocks("Q4_K", 3, 256), "Q4_K"),
        "blk.0.attn_norm.weight": (generator.standard_normal(64).astype(np.float32), "F32"),
        "blk.0.ffn_up.weight": (generator.standard_normal((4, 6)).astype(np.float16), "F16"),
    }


def write_config(folder: Path, **more: object) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, **more}
    (folder / "config.json").write_text(json.dumps(config))
