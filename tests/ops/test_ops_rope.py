"""Rotary embeddings against transformers' own tables and rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sartor.errors import UnsupportedError
from sartor.ops.rope import (
    ROPE_KINDS,
    RopeSpec,
    attention_factor,
    cos_sin,
    inverse_frequencies,
    rotate,
)

CONTEXT, THETA, DIM = 64, 5000.0, 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHORT = tuple(1 + 0.1 * i for i in range(DIM // 2))
LONG = tuple(1.5 + i * i for i in range(DIM // 2))
FACTORS: Any = {"short_factors": SHORT, "long_factors": LONG}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": list(SHORT),
    "long_factor": list(LONG),
}
VARIANTS: list[tuple[dict[str, Any], RopeSpec]] = [
    ({"rope_type": "linear", "factor": 3.0}, RopeSpec(DIM, THETA, "linear", 3.0)),
    ({"rope_type": "dynamic", "factor": 3.0}, RopeSpec(DIM, THETA, "dynamic", 3.0, CONTEXT)),
    (YARN, RopeSpec(DIM, THETA, "yarn", 4.0, 32)),
    (
        YARN | {"beta_fast": 4.0, "beta_slow": 2.0, "truncate": False},
        RopeSpec(DIM, THETA, "yarn", 4.0, 32, beta_fast=4.0, beta_slow=2.0, truncate=False),
    ),
    (
        YARN | {"attention_factor": 1.25},
        RopeSpec(DIM, THETA, "yarn", 4.0, 32, attention_factor=1.25),
    ),
    (
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        RopeSpec(DIM, THETA, "yarn", 4.0, 32, mscale=0.7, mscale_all_dim=1.3),
    ),
    (
        YARN | {"beta_fast": 1.0, "beta_slow": 1.0},
        RopeSpec(DIM, THETA, "yarn", 4.0, 32, beta_fast=1.0, beta_slow=1.0),
    ),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        RopeSpec(DIM, THETA, "llama3", 8.0, 128),
    ),
    (LONGROPE, RopeSpec(DIM, THETA, "longrope", 2.0, 32, **FACTORS)),
    (
        LONGROPE | {"factor": 1.0, "attention_factor": 1.19},
        RopeSpec(DIM, THETA, "longrope", 1.0, 32, attention_factor=1.19, **FACTORS),
    ),
    (
        LONGROPE | {"original_max_position_embeddings": 128},
        RopeSpec(DIM, THETA, "longrope", 0.5, 128, **FACTORS),
    ),
]


def _config(parameters: dict[str, Any]) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=2 * DIM,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters=parameters | {"rope_theta": THETA},
    )


@pytest.mark.parametrize(("parameters", "spec"), VARIANTS)
@pytest.mark.parametrize("length", [10, CONTEXT, 3 * CONTEXT])
def test_frequencies(parameters: dict[str, Any], spec: RopeSpec, length: int) -> None:
    config = _config(parameters)
    wanted, factor = ROPE_INIT_FUNCTIONS[spec.kind](config, torch.device("cpu"), seq_len=length)
    np.testing.assert_allclose(inverse_frequencies(spec, length), wanted.numpy(), rtol=2e-6)
    assert attention_factor(spec) == pytest.approx(factor)


def test_every_kind_is_compared() -> None:
    assert {spec.kind for _, spec in VARIANTS} | {"default"} == set(ROPE_KINDS)


@pytest.mark.parametrize(
    ("parameters", "spec"), [({"rope_type": "default"}, RopeSpec(DIM, THETA)), VARIANTS[2]]
)
def test_rotation(parameters: dict[str, Any], spec: RopeSpec) -> None:
    x = np.random.default_rng(0).standard_normal((20, 3, DIM)).astype(np.float32)
    positions = np.arange(20, dtype=np.int32)
    heads = torch.tensor(x).transpose(0, 1)[None]
    c, s = LlamaRotaryEmbedding(_config(parameters))(heads, torch.tensor(positions)[None])
    wanted = apply_rotary_pos_emb(heads, heads, c, s)[0][0].transpose(0, 1).numpy()
    cos, sin = cos_sin(spec, positions, np.full(20, 20, np.int32))
    np.testing.assert_allclose(rotate(x, cos, sin, DIM, False), wanted, atol=5e-6)


def test_interleaved_pairs_are_halves_in_another_order() -> None:
    x = np.random.default_rng(1).standard_normal((6, 2, DIM)).astype(np.float32)
    positions, lengths = np.arange(6, dtype=np.int32), np.zeros(6, np.int32)
    cos, sin = cos_sin(RopeSpec(DIM), positions, lengths)
    order = np.arange(DIM).reshape(2, -1).T.reshape(-1)  # 0, 8, 1, 9, ...
    halves = rotate(x, cos, sin, DIM, False)
    assert np.array_equal(rotate(x[..., order], cos, sin, DIM, True), halves[..., order])


def test_partial_rotation_passes_the_rest_through() -> None:
    x = np.ones((4, 1, DIM), np.float32)
    cos, sin = cos_sin(RopeSpec(8), np.arange(4, dtype=np.int32), np.zeros(4, np.int32))
    out = rotate(x, cos, sin, 8, False)
    assert np.array_equal(out[..., 8:], x[..., 8:])
    assert not np.array_equal(out[..., :8], x[..., :8])


def test_explicit_divisors() -> None:
    divisors = tuple(float(i + 1) for i in range(DIM // 2))
    plain = inverse_frequencies(RopeSpec(DIM))
    divided = inverse_frequencies(RopeSpec(DIM, frequencies=divisors))
    np.testing.assert_allclose(divided * np.array(divisors), plain, rtol=1e-6)


def test_dynamic_lengths_differ_by_sequence() -> None:
    for spec in (
        RopeSpec(DIM, THETA, "dynamic", 2.0, 16),
        RopeSpec(DIM, THETA, "longrope", 2.0, 16, **FACTORS),
    ):
        assert spec.depends_on_length
        positions = np.array([3, 3], np.int32)
        cos, _ = cos_sin(spec, positions, np.array([16, 64], np.int32))
        assert not np.array_equal(cos[0], cos[1])


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="'mrope'"):
        RopeSpec(DIM, kind="mrope")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="8 short and as many long factors, not 8 and 0"):
        RopeSpec(DIM, kind="longrope", short_factors=SHORT)
    with pytest.raises(UnsupportedError, match="7 features"):
        RopeSpec(7)
