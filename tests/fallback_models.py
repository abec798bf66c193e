"""Tiny random models of architectures that the registry does not know, saved as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 260
"""The 256 bytes, ``</s>``, and ids that no text has."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1, "init_std": 0.3},
    "bloom": {"n_layer": 2, "n_head": 2, "max_position_embeddings": None},
    "starcoder2": {"sliding_window": 8},
    "mamba": {"state_size": 4, "time_step_rank": 4, "max_position_embeddings": None},
    "jamba": {
        "mamba_dt_rank": 4,
        "num_experts": 2,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "use_mamba_kernels": False,
        "pad_token_id": 0,
    },
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
}
"""Learned positions; the same with an offset; positions as a bias (ALiBi); a sliding window; a
recurrence; recurrence, attention and experts; and one without a cache."""


def write_tokenizer(folder: Path) -> None:
    """Token i is byte i, as far as text goes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder: Path, kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """Saves a model of :data:`MODELS` with its tokenizer; returns what was saved."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **MODELS[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.do_sample = False
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def greedy(model: transformers.PreTrainedModel, ids: Sequence[int], count: int) -> list[int]:
    """What ``generate`` goes on with."""
    given = torch.tensor([list(ids)])
    with torch.inference_mode():
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),  # else it takes id 0 for padding
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(ids) :]]
