"""A complete GGUF file of a few kilobytes: random weights, a byte-level tokenizer, a template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

HIDDEN, FFN, HEADS = 32, 64, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokens() -> list[str]:
    """The 256 bytes as GPT-2 spells them: printable ones as they are, others from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


def write_tiny_model(
    path: Path,
    *,
    context: int = 2048,
    template: str | None = TEMPLATE,
    quantize: bool = False,
    sampling: Mapping[str, float] | None = None,
) -> Path:
    """Writes a llama of one layer with 259 tokens to ``path`` and returns it.

    Everything is float32; ``quantize`` stores the embedding, which is the head too, as Q8_0.
    ``sampling`` are keys behind ``general.sampling.``.
    """
    rng = np.random.default_rng(0)
    tokens = [*byte_tokens(), "<|im_start|>", "<|im_end|>", "he"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    for name, value in (sampling or {}).items():
        add_value = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add_value(f"general.sampling.{name}", value)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.2, shape).astype(np.float32))

    if quantize:
        table = rng.normal(0, 0.2, (len(tokens), HIDDEN)).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor("token_embd.weight", quants.quantize(table, kind), raw_dtype=kind)
    else:
        add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", HIDDEN, HIDDEN)
    add("blk.0.attn_norm.weight", HIDDEN)
    add("blk.0.ffn_norm.weight", HIDDEN)
    add("blk.0.ffn_gate.weight", FFN, HIDDEN)
    add("blk.0.ffn_up.weight", FFN, HIDDEN)
    add("blk.0.ffn_down.weight", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
