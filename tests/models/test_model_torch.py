"""Whole models on the torch backend: logits and vectors against transformers, a few of each kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from encoder_runner import embed
from logits_runner import LENGTH, PROMPT, TOKENS, TOLERANCE, WRITTEN, relative_error, run
from tiny_hybrids import HYBRID_CASES
from tiny_models import build, expected_logits, save
from transformers import BertConfig, BertModel

from sartor.formats import open_checkpoint
from sartor.models import load_model

CHUNKS = [9, 1, PROMPT - 10] + [1] * WRITTEN
DENSE = ["llama-yarn", "qwen2-window", "gemma3-linear-softcap"]
EXPERTS = ["qwen3-moe-window", "gpt-oss", "deepseek-v2-lite"]
HYBRIDS = list(HYBRID_CASES)[:2]


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS, *HYBRIDS])
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = build(CASES[name], {})
    model = load_model(open_checkpoint(save(oracle, tmp_path)))
    logits = expected_logits(oracle, TOKENS, [PROMPT] + [1] * WRITTEN)
    for chunks in ([LENGTH], CHUNKS):
        assert relative_error(run(model, "torch", TOKENS, chunks), logits) < TOLERANCE


def test_vectors_equal_transformers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    oracle = BertModel(config).eval()
    oracle.save_pretrained(tmp_path)
    sequences = [[2, 5, 7], [11] * 17, [3], list(range(40)), [1, 2, 3, 4]]
    found = embed(load_model(open_checkpoint(tmp_path)), "torch", sequences)
    with torch.no_grad():
        wanted = [oracle(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in sequences]
    assert relative_error(found, np.stack([row.numpy() for row in wanted])) < TOLERANCE
