"""Weights that a checkpoint keeps on top of each other in one tensor (q, k and v; gate and up).

The program has them as separate linears, so that each can be sharded, tapped or adapted; the
fusion pass puts neighbours together again where a backend wants that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sartor.models.config import ModelConfig
from sartor.models.registry import TensorPlace

Layout = Mapping[str, Sequence[tuple[str, int]]]
"""For each fused tensor the parts in its rows, from the top: (name, rows)."""


def attention_and_mlp(config: ModelConfig, *, qkv: bool) -> Layout:
    """The usual layout: ``qkv_proj`` where ``qkv`` is set, and ``gate_up_proj``."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layout: dict[str, Sequence[tuple[str, int]]] = {
        "mlp.gate_up_proj": (
            ("mlp.gate_proj", config.ffn_size),
            ("mlp.up_proj", config.ffn_size),
        )
    }
    if qkv:
        layout["self_attn.qkv_proj"] = (
            ("self_attn.q_proj", heads),
            ("self_attn.k_proj", kv_heads),
            ("self_attn.v_proj", kv_heads),
        )
    return layout


def locate_part(name: str, layout: Layout, inputs: int) -> TensorPlace | None:
    """Where a weight or bias lies that is a part of a fused tensor; None for any other.

    ``inputs`` are the columns of the fused tensors.
    """
    stem, _, kind = name.rpartition(".")
    for fused, parts in layout.items():
        total = sum(rows for _, rows in parts)
        start = 0
        for part, rows in parts:
            if stem.endswith(f".{part}"):
                return TensorPlace(
                    f"{stem.removesuffix(part)}{fused}.{kind}",
                    slice(start, start + rows),
                    (total, inputs) if kind == "weight" else (total,),
                )
            start += rows
    return None
