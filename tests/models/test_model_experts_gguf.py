"""Models with experts as GGUF: logits against transformers on the same weights, strict keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from logits_runner import LENGTH, TOKENS, TOLERANCE, relative_error, run
from tiny_experts import CASES, DEEPSEEK_YARN, GPT_OSS, OLMOE, QWEN2_MOE, V3
from tiny_experts_gguf import write
from tiny_models import Case, build, expected_logits, save

from sartor.errors import FormatError, UnsupportedError
from sartor.formats import open_checkpoint
from sartor.models import Model, load_model

# GGUF cannot say that mscale differs from mscale_all_dim.
_ONE_MSCALE = DEEPSEEK_YARN["rope_parameters"] | {"mscale": 1.2}
TIED = {"tie_word_embeddings": True}
ROUTES: dict[str, tuple[str, Case]] = {
    "mixtral": ("llama", CASES["mixtral"]),
    "qwen3moe": ("qwen3moe", CASES["qwen3-moe"]),
    "qwen2moe": ("qwen2moe", CASES["qwen2-moe"]),
    "olmoe": ("olmoe", CASES["olmoe"]),
    "olmoe-biases-tied": ("olmoe", Case("Olmoe", OLMOE | {"attention_bias": True, **TIED})),
    "gpt-oss": ("gpt-oss", Case("GptOss", GPT_OSS)),
    "deepseek2-lite": ("deepseek2", CASES["deepseek-v2-lite"]),
    "deepseek2-groups": ("deepseek2", CASES["deepseek-v2-groups"]),
    "deepseek2-v3": ("deepseek2", CASES["deepseek-v3"]),
    "deepseek2-yarn": ("deepseek2", Case("DeepseekV3", V3 | {"rope_parameters": _ONE_MSCALE})),
}


def _loaded(path: Path) -> Model:
    return load_model(open_checkpoint(path))


@pytest.mark.parametrize("route", ROUTES)
def test_logits_equal_transformers(route: str, backend: str, tmp_path: Path) -> None:
    architecture, case = ROUTES[route]
    oracle = build(case, {})
    model = _loaded(write(oracle, architecture, tmp_path / "tiny.gguf"))
    found = run(model, backend, TOKENS, [LENGTH - 1, 1])
    assert relative_error(found, expected_logits(oracle, TOKENS, [LENGTH])) < TOLERANCE


@pytest.mark.parametrize(
    "route", ["mixtral", "qwen3moe", "qwen2moe", "olmoe", "gpt-oss", "deepseek2-v3"]
)
def test_configuration_equals_that_of_the_folder(route: str, tmp_path: Path) -> None:
    architecture, case = ROUTES[route]
    oracle = build(case, {})
    ours = _loaded(write(oracle, architecture, tmp_path / "tiny.gguf")).config
    theirs = _loaded(save(oracle, tmp_path / "folder")).config
    assert ours.experts is not None
    assert theirs.experts is not None
    scale = pytest.approx(theirs.experts.scale)
    assert ours.experts.scale == scale
    experts = dataclasses.replace(ours.experts, scale=theirs.experts.scale)
    same = {name: getattr(theirs, name) for name in ("architecture", "norm_eps", "context_length")}
    flat = dataclasses.replace(ours, experts=experts, layers=theirs.layers, **same)
    assert flat == theirs
    assert [part.sparse for part in ours.layers] == [part.sparse for part in theirs.layers]
    assert [part.window for part in ours.layers] == [part.window for part in theirs.layers]
    rope = (ours.layers[0].rope, theirs.layers[0].rope)
    assert rope[0] is not None
    assert rope[1] is not None
    assert rope[0].truncate == rope[1].truncate
    assert rope[0].interleaved == rope[1].interleaved


def test_gpt_oss_says_what_it_assumes_of_yarn(tmp_path: Path) -> None:
    """No converter writes the key, and other engines cut the ramp to integers."""
    architecture, case = ROUTES["gpt-oss"]
    oracle = build(case, {})
    model = _loaded(write(oracle, architecture, tmp_path / "tiny.gguf"))
    key = "gpt-oss.rope.scaling.yarn_truncate"
    assert [f"the file has no {key}: false is assumed" in note for note in model.notes] == [True]
    for truncate in (False, True):
        path = tmp_path / f"{truncate}.gguf"
        write(oracle, architecture, path, lambda w, t=truncate: w.add_bool(key, t))
        model = _loaded(path)
        assert model.notes == ()
        rope = model.config.layers[0].rope
        assert rope is not None
        assert rope.truncate is truncate
    assert _loaded(save(oracle, tmp_path / "folder")).notes == ()  # config.json has the option


@pytest.mark.parametrize("family", ["olmoe", "qwen2moe"])
def test_normalised_weights_of_experts(family: str, backend: str, tmp_path: Path) -> None:
    """Where nothing is said they are not normalised; a file may say that they are."""
    architecture, case = ROUTES[family]
    oracle = build(case, {"norm_topk_prob": True})
    path = tmp_path / "tiny.gguf"
    write(oracle, architecture, path, lambda writer: writer.add_expert_weights_norm(True))
    found = run(_loaded(path), backend, TOKENS, [LENGTH])
    assert relative_error(found, expected_logits(oracle, TOKENS, [LENGTH])) < TOLERANCE


def test_gate_of_the_shared_expert_as_a_vector(tmp_path: Path) -> None:
    """Files that llama.cpp's tools have quantised hold the one row without its axis."""

    def flatten(writer: gguf.GGUFWriter) -> None:
        for name, info in writer.tensors[0].items():
            if name.endswith("ffn_gate_inp_shexp.weight"):
                info.shape = info.shape[1:]

    oracle = build(ROUTES["qwen2moe"][1], {})
    row = _loaded(write(oracle, "qwen2moe", tmp_path / "row.gguf")).source
    path = write(oracle, "qwen2moe", tmp_path / "vector.gguf", flatten)
    assert open_checkpoint(path).info("blk.1.ffn_gate_inp_shexp.weight").shape == (48,)
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    weights = [source.weight(name) for source in (row, _loaded(path).source)]
    assert weights[0].shape == weights[1].shape == (1, 48)
    assert np.array_equal(weights[0].dequantize(), weights[1].dequantize())


def test_sizes_of_experts_that_are_not_stated(tmp_path: Path) -> None:
    """Those chosen share the feed-forward part's features; the shared one has all of them."""
    sizes = {"moe_intermediate_size": 80 // 3, "shared_expert_intermediate_size": 80}

    def extra(writer: gguf.GGUFWriter) -> None:
        for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
            writer.kv_data[0].pop(f"qwen2moe.{key}")

    oracle = build(Case("Qwen2Moe", QWEN2_MOE | sizes), {})
    experts = _loaded(write(oracle, "qwen2moe", tmp_path / "tiny.gguf", extra)).config.experts
    assert experts is not None
    assert (experts.size, experts.shared_size) == (26, 80)


def test_kv_projection_in_one_matrix(tmp_path: Path) -> None:
    """Older files hold kv_b whole and describe attention in its plain form."""
    oracle = build(CASES["deepseek-v3"], {})
    whole = _loaded(write(oracle, "deepseek2", tmp_path / "whole.gguf", split=False))
    split = _loaded(write(oracle, "deepseek2", tmp_path / "split.gguf"))
    assert whole.config == split.config
    for part in ("k_b_proj", "v_b_proj"):
        name = f"model.layers.2.self_attn.{part}.weight"
        stored = [model.source.weight(name).dequantize() for model in (whole, split)]
        assert np.array_equal(*stored)


def test_quantised_kv_projection_and_experts(tmp_path: Path) -> None:
    """What is not transposed keeps its codes; keys' part of kv_b is widened without rounding."""
    case = Case("DeepseekV3", V3 | {"kv_lora_rank": 32, "moe_intermediate_size": 32})
    oracle = build(case, {})
    path = write(oracle, "deepseek2", tmp_path / "tiny.gguf", split=False, quantize=True)
    source = _loaded(path).source
    whole = open_checkpoint(path).weight("blk.1.attn_kv_b.weight")
    values = source.weight("model.layers.1.self_attn.v_b_proj.weight")
    keys = source.weight("model.layers.1.self_attn.k_b_proj.weight")
    assert values.format == whole.format
    assert (values.shape, keys.shape) == ((4, 10, 32), (4, 32, 12))
    per_head = whole.dequantize().reshape(4, 22, 32)
    assert np.array_equal(values.dequantize(), per_head[:, 12:])
    assert np.array_equal(keys.dequantize(), per_head[:, :12].swapaxes(1, 2))
    down = source.weight("model.layers.1.mlp.experts.down_proj.weight")
    assert (down.format, down.shape) == (whole.format, (8, 48, 32))


@pytest.mark.parametrize(
    ("route", "key", "value", "message"),
    [
        ("qwen3moe", "expert_gating_func", 2, "expert_gating_func = 2"),
        ("qwen3moe", "expert_weights_norm", False, "expert_weights_norm = False"),
        ("qwen3moe", "expert_weights_scale", 2.5, "expert_weights_scale = 2.5"),
        ("qwen3moe", "expert_group_count", 4, "expert_group_count = 4"),
        ("qwen3moe", "expert_shared_count", 1, "expert_shared_count = 1"),
        ("qwen2moe", "expert_gating_func", 2, "expert_gating_func = 2"),
        ("qwen2moe", "expert_weights_scale", 2.5, "expert_weights_scale = 2.5"),
        ("qwen2moe", "expert_group_count", 4, "expert_group_count = 4"),
        ("qwen2moe", "attention.sliding_window", 6, "sliding_window = 6"),
        ("olmoe", "expert_gating_func", 2, "expert_gating_func = 2"),
        ("olmoe", "expert_weights_scale", 2.5, "expert_weights_scale = 2.5"),
        ("olmoe", "expert_shared_count", 1, "expert_shared_count = 1"),
        ("olmoe", "attention.clamp_kqv", 8.0, "clamp_kqv = 8.0"),
        ("mixtral", "expert_gating_func", 2, "expert_gating_func = 2"),
        ("gpt-oss", "expert_gating_func", 1, "expert_gating_func = 1"),
        ("deepseek2-v3", "expert_gating_func", 3, "expert_gating_func = 3"),
        ("deepseek2-v3", "attention.temperature_scale", 0.5, "temperature_scale = 0.5"),
        ("deepseek2-v3", "attention.key_length", 20, "key_length = 20"),
        ("deepseek2-v3", "attention.key_length_mla", 8, "key_length_mla = 8"),
        ("deepseek2-v3", "rope.scaling.factor", 4.0, "rope.scaling.type = 'linear'"),
        ("deepseek2-yarn", "rope.scaling.attn_factor", 1.5, "attn_factor = 1.5"),
        ("deepseek2-v3", "expert_group_used_count", 9, "from 9 of 4 groups"),
    ],
)
def test_options_not_implemented_are_refused_by_name(
    route: str, key: str, value: object, message: str, tmp_path: Path
) -> None:
    architecture, case = ROUTES[route]

    def extra(writer: gguf.GGUFWriter) -> None:
        whole = f"{architecture}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32}
        writer.kv_data[0].pop(whole, None)
        (writer.add_bool if isinstance(value, bool) else add[type(value)])(whole, value)

    path = write(build(case, {}), architecture, tmp_path / "tiny.gguf", extra)
    with pytest.raises(UnsupportedError, match=message.replace(".", r"\.")):
        _loaded(path)


@pytest.mark.parametrize(
    ("route", "key"),
    [
        ("deepseek2-v3", "expert_gating_func"),
        ("deepseek2-yarn", "rope.scaling.yarn_log_multiplier"),
        ("gpt-oss", "attention.sliding_window"),
        ("qwen3moe", "expert_used_count"),
        ("qwen2moe", "expert_used_count"),
        ("olmoe", "expert_count"),
    ],
)
def test_missing_options_are_named(route: str, key: str, tmp_path: Path) -> None:
    architecture, case = ROUTES[route]

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(f"{architecture}.{key}")

    path = write(build(case, {}), architecture, tmp_path / "tiny.gguf", extra)
    with pytest.raises(FormatError, match=f"{key} is missing"):
        _loaded(path)
