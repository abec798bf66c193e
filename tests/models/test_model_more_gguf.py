"""GGUF files of further architectures: fused tensors, partial rope, LongRoPE's divisors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from logits_runner import LENGTH, TOKENS, TOLERANCE, relative_error, run
from tiny_gguf import Extra, write
from tiny_hybrids import DENSE_CASES, FACTORS, GEMMA2, LONG, SHORT, longrope
from tiny_models import Case, build, expected_logits, save

from sartor.errors import FormatError, SartorError, UnsupportedError
from sartor.formats import open_checkpoint
from sartor.models import Model, load_model


def _loaded(path: Path) -> Model:
    return load_model(open_checkpoint(path))


def _window(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(7)


def _half(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_count(8)


def _longrope(original: int, factor: float = 0.0) -> Extra:
    """As llama.cpp's converter writes it: the attention factor as a key, the divisors as
    tensors."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_dimension_count(8)
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(original)
        derived = math.sqrt(1 + math.log(64 / original) / math.log(original))
        writer.add_rope_scaling_attn_factors(factor or derived)
        writer.add_tensor("rope_factors_long.weight", np.array(LONG, np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(SHORT, np.float32))

    return add


def _factors(writer: gguf.GGUFWriter) -> None:
    writer.add_embedding_scale(FACTORS["embedding_multiplier"])
    writer.add_attention_scale(FACTORS["attention_multiplier"])
    writer.add_residual_scale(FACTORS["residual_multiplier"])
    writer.add_logit_scale(FACTORS["logits_scaling"])


def _gemma2(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(GEMMA2["sliding_window"])
    writer.add_attn_logit_softcapping(GEMMA2["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(GEMMA2["final_logit_softcapping"])


ROUTES: dict[str, tuple[str, Case, Extra]] = {
    "phi3": ("phi3", DENSE_CASES["phi3"], _window),
    "phi3-longrope-long": ("phi3", DENSE_CASES["phi3-longrope-long"], _longrope(16)),
    "phi3-longrope-short": ("phi3", DENSE_CASES["phi3-longrope-short"], _longrope(48)),
    "phi3-longrope-factor": ("phi3", DENSE_CASES["phi3-longrope-factor"], _longrope(16, 1.25)),
    "phi3-longrope-factor-one": (
        "phi3",
        Case("Phi3", longrope(16, attention_factor=1.0)),
        _longrope(16, 1.0),
    ),
    "glm4": ("glm4", DENSE_CASES["glm4"], _half),
    "glm4-tied-no-bias": (
        "glm4",
        Case("Glm4", {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
        _half,
    ),
    "granite": ("granite", DENSE_CASES["granite"], _factors),
    "granite-biases-tied": ("granite", DENSE_CASES["granite-biases-tied"], _factors),
    "olmo2": ("olmo2", DENSE_CASES["olmo2-tied"], lambda writer: None),
    "gemma2": ("gemma2", DENSE_CASES["gemma2"], _gemma2),
    "smollm3": ("smollm3", Case("SmolLM3", {"num_hidden_layers": 5}), lambda writer: None),
}


@pytest.mark.parametrize("route", ROUTES)
def test_logits_equal_transformers(route: str, backend: str, tmp_path: Path) -> None:
    architecture, case, extra = ROUTES[route]
    oracle = build(case, {})
    model = _loaded(write(oracle, architecture, tmp_path / "tiny.gguf", extra))
    found = run(model, backend, TOKENS, [LENGTH - 1, 1])
    assert relative_error(found, expected_logits(oracle, TOKENS, [LENGTH])) < TOLERANCE


@pytest.mark.parametrize("route", ["phi3", "glm4", "granite", "olmo2", "gemma2", "smollm3"])
def test_configuration_equals_that_of_the_folder(route: str, tmp_path: Path) -> None:
    architecture, case, extra = ROUTES[route]
    oracle = build(case, {})
    ours = _loaded(write(oracle, architecture, tmp_path / "tiny.gguf", extra)).config
    theirs = _loaded(save(oracle, tmp_path / "folder")).config
    for found, wanted in zip(ours.layers, theirs.layers, strict=True):
        assert found.rope == wanted.rope
        assert found.window == wanted.window
    same = {"layers": theirs.layers}
    for name in (
        "norm_eps",
        "norm_offset",
        "attention_scale",
        "residual_scale",
        "logit_scale",
    ):  # stored in fp32, or folded into the weights
        same[name] = getattr(theirs, name)
        assert getattr(ours, name) == pytest.approx(same[name]) or name == "norm_offset"
    assert dataclasses.replace(ours, **same) == theirs


def test_quantised_parts_of_fused_tensors_without_loss(tmp_path: Path) -> None:
    case = Case("Phi3", {"hidden_size": 64})
    path = write(build(case, {}), "phi3", tmp_path / "tiny.gguf", quantize=True)
    model, checkpoint = _loaded(path), open_checkpoint(path)
    stored = checkpoint.weight("blk.1.attn_qkv.weight")
    parts = [model.source.weight(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv"]
    assert all(part.format == stored.format for part in parts)
    assert np.array_equal(np.concatenate([part.data for part in parts]), stored.data)
    up = model.source.weight("model.layers.1.mlp.up_proj.weight")
    assert np.array_equal(up.data, checkpoint.weight("blk.1.ffn_up.weight").data[80:])


def test_a_missing_attention_factor_of_longrope_is_said(tmp_path: Path) -> None:
    def forget(writer: gguf.GGUFWriter) -> None:
        _longrope(16)(writer)
        writer.kv_data[0].pop("phi3.rope.scaling.attn_factor")

    oracle = build(DENSE_CASES["phi3-longrope-long"], {})
    (note,) = _loaded(write(oracle, "phi3", tmp_path / "without.gguf", forget)).notes
    assert note.startswith("the file has no phi3.rope.scaling.attn_factor")
    assert _loaded(write(oracle, "phi3", tmp_path / "with.gguf", _longrope(16))).notes == ()


def test_missing_short_factors_are_named(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        _longrope(16)(writer)
        for tensors in writer.tensors:
            tensors.pop("rope_factors_short.weight")

    path = write(build(Case("Phi3", longrope(16)), {}), "phi3", tmp_path / "tiny.gguf", extra)
    with pytest.raises(FormatError, match=r"rope_factors_short\.weight"):
        _loaded(path)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("rope.dimension_count", 14, UnsupportedError, "phi3.rope.dimension_count = 14"),
        ("rope.dimension_count", 7, UnsupportedError, "phi3.rope.dimension_count = 7"),
        ("rope.scaling.original_context_length", 1, FormatError, "more than one token"),
        ("rope.dimension_count", 6, UnsupportedError, "needs 3 short and as many long"),
        ("attention.something_new", 3, UnsupportedError, "phi3.attention.something_new = 3"),
    ],
)
def test_options_that_do_not_fit(
    key: str, value: int, error: type[SartorError], message: str, tmp_path: Path
) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        _longrope(16)(writer)
        writer.kv_data[0].pop(f"phi3.{key}", None)
        writer.add_uint32(f"phi3.{key}", value)

    path = write(build(Case("Phi3", longrope(16)), {}), "phi3", tmp_path / "tiny.gguf", extra)
    with pytest.raises(error, match=message.replace(".", r"\.")):
        _loaded(path)
