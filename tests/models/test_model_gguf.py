"""The GGUF way: names, rotary rows, keys; logits against transformers on the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from logits_runner import LENGTH, TOKENS, TOLERANCE, relative_error, run
from tiny_gguf import Extra, write
from tiny_models import CASES, GEMMA, Case, build, expected_logits, rope, save

from sartor.errors import FormatError, UnsupportedError
from sartor.formats import open_checkpoint
from sartor.models import Model, load_model
from sartor.models.gguf import halves_from_interleaved


def _loaded(path: Path) -> Model:
    return load_model(open_checkpoint(path))


def _window(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(7)


def _gemma(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(5)


def _gemma_scaled(writer: gguf.GGUFWriter) -> None:
    _gemma(writer)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    writer.add_final_logit_softcapping(3.0)


def _yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def _linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def _llama3_divisors(options: dict[str, Any]) -> Extra:
    """The tensor that stands for Llama 3.1's rope: plain frequencies over the scaled ones."""

    def add(writer: gguf.GGUFWriter) -> None:
        scaled = build(Case("Llama", options), {}).model.rotary_emb.inv_freq
        plain = 1.0 / 1000.0 ** (torch.arange(0, 12, 2) / 12)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())

    return add


_GEMMA = GEMMA | {"query_pre_attn_scalar": 16}  # GGUF scales by the width of a head
_QWEN3_YARN = {"head_dim": 16} | rope("yarn", factor=4.0, original_max_position_embeddings=16)
ROUTES: dict[str, tuple[str, Case, Extra]] = {
    "llama": ("llama", CASES["llama"], lambda writer: None),
    "llama-biases-tied": (
        "llama",
        Case("Llama", CASES["llama-biases-tied"].options | {"hidden_act": "silu"}),
        lambda writer: None,
    ),
    "llama-linear": ("llama", CASES["llama-linear"], _linear),
    "llama3": (
        "llama",
        CASES["llama-llama3"],
        _llama3_divisors(CASES["llama-llama3"].options),
    ),
    "mistral-window": ("llama", CASES["mistral-window"], _window),
    "qwen2": ("qwen2", CASES["qwen2-tied"], lambda writer: None),
    "qwen3-yarn": ("qwen3", Case("Qwen3", _QWEN3_YARN), _yarn),
    "gemma3": ("gemma3", Case("Gemma3", _GEMMA), _gemma),
    "gemma3-scaled": (
        "gemma3",
        Case("Gemma3", CASES["gemma3-linear-softcap"].options | _GEMMA),
        _gemma_scaled,
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_logits_equal_transformers(route: str, backend: str, tmp_path: Path) -> None:
    architecture, case, extra = ROUTES[route]
    oracle = build(case, {})
    model = _loaded(write(oracle, architecture, tmp_path / "tiny.gguf", extra))
    found = run(model, backend, TOKENS, [LENGTH - 1, 1])
    assert relative_error(found, expected_logits(oracle, TOKENS, [LENGTH])) < TOLERANCE


@pytest.mark.parametrize("route", ["llama", "qwen2", "qwen3-yarn", "gemma3"])
def test_configuration_equals_that_of_the_folder(route: str, tmp_path: Path) -> None:
    architecture, case, extra = ROUTES[route]
    oracle = build(case, {})
    ours = _loaded(write(oracle, architecture, tmp_path / "tiny.gguf", extra)).config
    theirs = _loaded(save(oracle, tmp_path / "folder")).config
    for name in ("norm_eps", "norm_offset", "context_length"):  # fp32; folded in; as stated
        ours = dataclasses.replace(ours, **{name: getattr(theirs, name)})
    flat = [dataclasses.replace(c, layers=c.layers[:1]) for c in (ours, theirs)]
    assert flat[0].layers[0].rope.kind == flat[1].layers[0].rope.kind
    assert dataclasses.replace(flat[0], layers=flat[1].layers) == flat[1]
    assert [part.window for part in ours.layers] == [part.window for part in theirs.layers]


def test_quantised_rows_are_put_in_order_without_loss(tmp_path: Path) -> None:
    case = Case("Llama", {"hidden_size": 64})
    oracle = build(case, {})
    path = write(oracle, "llama", tmp_path / "tiny.gguf", quantize=True)
    model = _loaded(path)
    weight = model.source.weight("model.layers.1.self_attn.k_proj.weight")
    stored = open_checkpoint(path).weight("blk.1.attn_k.weight")
    order = halves_from_interleaved(2, 16)
    assert np.array_equal(np.sort(order), np.arange(32))
    assert weight.format == stored.format
    assert np.array_equal(weight.data, stored.data[order])
    original = oracle.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    step = np.abs(original).reshape(32, -1, 32).max(axis=2).repeat(32, axis=1) / 127
    # Half a step, and the largest code times the rounding of the scale to fp16.
    assert np.all(np.abs(weight.dequantize() - original) <= (0.5 + 127 * 2**-11) * step)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_shared_count", 8, "llama.expert_shared_count = 8"),
        ("rope.dimension_count", 6, "llama.rope.dimension_count = 6"),
        ("attention.value_length", 6, "llama.attention.value_length = 6"),
        ("attention.something_new", 3, "llama.attention.something_new = 3"),
        ("attn_logit_softcapping", 30.0, "llama.attn_logit_softcapping = 30.0"),
        ("rope.scaling.type", "longrope", "llama.rope.scaling.type = 'longrope'"),
        ("rope.scaling.yarn_ext_factor", 0.5, "llama.rope.scaling.yarn_ext_factor = 0.5"),
        ("attention.causal", False, "llama.attention.causal = False"),
    ],
)
def test_options_not_implemented_are_refused_by_name(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        if "yarn" in key:
            _yarn(writer)
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        writer.kv_data[0].pop(f"llama.{key}", None)
        (writer.add_bool if isinstance(value, bool) else add[type(value)])(f"llama.{key}", value)

    path = write(build(CASES["llama"], {}), "llama", tmp_path / "tiny.gguf", extra)
    with pytest.raises(UnsupportedError, match=message.replace(".", r"\.")):
        _loaded(path)


def test_neutral_options_and_notes_are_accepted(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("llama.expert_count", 0)
        writer.add_string("llama.tensor_data_layout", "Meta AI original pth")
        writer.add_uint32("llama.rope.dimension_count", 12)

    path = write(build(CASES["llama"], {}), "llama", tmp_path / "tiny.gguf", extra)
    assert _loaded(path).config.head_dim == 12


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    oracle = build(CASES["llama"], {})
    path = write(oracle, "llama", tmp_path / "tiny.gguf", skip="blk.1.ffn_up.weight")
    with pytest.raises(FormatError, match=r"missing: blk\.1\.ffn_up\.weight"):
        _loaded(path)


def test_left_over_tensors_are_named(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_sinks", np.zeros(4, np.float32))

    path = write(build(CASES["llama"], {}), "llama", tmp_path / "tiny.gguf", extra)
    with pytest.raises(FormatError, match=r"no place for: blk\.0\.attn_sinks"):
        _loaded(path)


def test_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"'mamba'.*llama, qwen2, qwen3, gemma3"):
        _loaded(path)


def test_gemma3_pattern_as_flags(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        _gemma(writer)
        writer.add_sliding_window_pattern([True, False, True, True, False, True, False])

    path = write(build(Case("Gemma3", _GEMMA), {}), "gemma3", tmp_path / "tiny.gguf", extra)
    assert [part.window for part in _loaded(path).config.layers] == [5, 0, 5, 5, 0, 5, 0]


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_checkpoints_load(name: str, model_files: dict[str, Path]) -> None:
    model = _loaded(model_files[name])
    assert model.name == model_files[name].stem
    assert model.config.tied_head
    groups = len(model.program.groups())
    assert (model.context_length, groups) == ((8192, 1) if "smol" in name else (32768, 2))
