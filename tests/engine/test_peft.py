"""Adapters in the layout of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from sartor.engine.peft import read_peft
from sartor.errors import FormatError, SartorError, UnsupportedError, UsageError
from sartor.graph import Builder
from sartor.graph.batch import F32
from sartor.models import Model
from sartor.models.registry import TensorPlace

LAYER = "model.layers.0.self_attn"
Q, K, OUT, UP = (f"{LAYER}.{part}_proj" for part in ("q", "k", "o", "up"))
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj"],
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
}


def model(**places: TensorPlace) -> Model:
    """Linears q [4, 6], k [2, 6], o [6, 4] and up [6, 6]; ``places`` by the last part but one."""
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embed", 16, 6)
    with builder.scope(LAYER):
        q, k = builder.linear(x, "q_proj", 4), builder.linear(x, "k_proj", 2)
        v = builder.linear(x, "up_proj", 6)
        x = builder.linear(q, "o_proj", 6)
    builder.add(x, v)
    assert k.shape[1] == 2
    x = builder.gather_rows(x, builder.output_rows)
    program = builder.finish(builder.linear(x, "lm_head", 16))

    def place(name: str) -> TensorPlace:
        return places.get(name.split(".")[-2], TensorPlace(name))

    source = SimpleNamespace(hf_place=place)
    config = SimpleNamespace(tied_head=False)
    return cast(Model, SimpleNamespace(program=program, source=source, config=config))


def matrices(module: str, rows: int, columns: int, rank: int = 2) -> dict[str, F32]:
    rng = np.random.default_rng(sum(module.encode()))
    shapes = {"A": (rank, columns), "B": (rows, rank)}
    return {
        f"base_model.model.{module}.lora_{half}.weight": rng.standard_normal(shape).astype("f4")
        for half, shape in shapes.items()
    }


def save(folder: Path, tensors: dict[str, F32], **config: object) -> Path:
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def halves(tensors: dict[str, F32], module: str) -> tuple[F32, F32]:
    name = f"base_model.model.{module}.lora_"
    return tensors[f"{name}A.weight"], tensors[f"{name}B.weight"]


def test_names_and_scale(tmp_path: Path) -> None:
    tensors = matrices(Q, 4, 6) | matrices(OUT, 6, 4)
    layers = read_peft(save(tmp_path, tensors), model())
    assert layers.keys() == {f"{Q}.weight", f"{OUT}.weight"}
    down, up = halves(tensors, Q)
    assert np.array_equal(layers[f"{Q}.weight"].down, down)
    assert np.array_equal(layers[f"{Q}.weight"].up, up * 4)
    layers = read_peft(save(tmp_path, tensors, use_rslora=True), model())
    np.testing.assert_allclose(layers[f"{Q}.weight"].up, up * 8 / 2**0.5, rtol=1e-6)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    tensors = {name: array.astype(np.float16) for name, array in matrices(Q, 4, 6).items()}
    layers = read_peft(save(tmp_path, cast(Any, tensors)), model())
    down, _ = halves(cast(Any, tensors), Q)
    assert layers[f"{Q}.weight"].down.dtype == np.float32
    assert np.array_equal(layers[f"{Q}.weight"].down, down.astype(np.float32))


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    tensors = matrices(Q, 4, 6, rank=4) | matrices(K, 2, 6) | matrices(OUT, 6, 4)
    patterns = {
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {r"model\.layers\.\d+\.self_attn\.q_proj": 2, "k_proj": 6},
    }
    layers = read_peft(save(tmp_path, tensors, **patterns), model())
    for module, scale in ((Q, 0.5), (K, 3), (OUT, 4)):
        assert np.array_equal(layers[f"{module}.weight"].up, halves(tensors, module)[1] * scale)


def test_a_fused_module_becomes_one_layer_for_each_of_its_parts(tmp_path: Path) -> None:
    fused = f"{LAYER}.qk_proj"
    tensors = matrices(fused, 6, 6) | matrices(UP, 6, 6)
    rows = {"q_proj": np.arange(4)[::-1].copy(), "k_proj": np.array([4, 5])}
    places = {part: TensorPlace(f"{fused}.weight", r, (6, 6)) for part, r in rows.items()}
    layers = read_peft(save(tmp_path, tensors), model(**places))
    down, up = halves(tensors, fused)
    assert layers.keys() == {f"{Q}.weight", f"{K}.weight", f"{UP}.weight"}
    for module, part in ((Q, "q_proj"), (K, "k_proj")):
        assert np.array_equal(layers[f"{module}.weight"].down, down)
        assert np.array_equal(layers[f"{module}.weight"].up, up[rows[part]] * 4)


def test_a_gguf_orders_its_rows_itself(tmp_path: Path) -> None:
    place = TensorPlace("blk.0.attn_q.weight", np.array([0, 2, 1, 3]))
    tensors = matrices(Q, 4, 6)
    layers = read_peft(save(tmp_path, tensors), model(q_proj=place))
    assert np.array_equal(layers[f"{Q}.weight"].up, halves(tensors, Q)[1] * 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"some_new_option": "x"}, "some_new_option = 'x'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_peft(save(tmp_path, matrices(Q, 4, 6), **config), model())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.embed.lora_embedding_A": np.zeros((2, 16), "f4")}, "lora_embedding_A"),
        (matrices(f"{LAYER}.gate_proj", 4, 6), "gate_proj cannot be adapted"),
        (matrices("embed", 16, 6), "embed cannot be adapted"),
        ({f"base_model.model.{Q}.lora_A.weight": np.zeros((2, 6, 1), "f4")}, "only linear layers"),
        ({f"base_model.model.{Q}.lora_A.weight": np.zeros((2, 6), "i4")}, "I32"),
    ],
)
def test_what_cannot_be_adapted_is_named(
    tmp_path: Path, tensors: dict[str, F32], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_peft(save(tmp_path, tensors), model())


def test_converted_weights_are_no_plain_linear(tmp_path: Path) -> None:
    place = TensorPlace("h.0.c_attn.weight", convert=lambda weight: weight)
    for module in ("h.0.c_attn", Q):
        with pytest.raises(UnsupportedError, match="cannot be adapted"):
            read_peft(save(tmp_path, matrices(module, 4, 6)), model(q_proj=place))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (matrices(Q, 4, 6, rank=3), {}, r"lora_A \[3, 6\] and lora_B \[4, 3\] are not of rank 2"),
        (dict(list(matrices(Q, 4, 6).items())[:1]), {}, "has no lora_B"),
        (matrices(Q, 4, 6), {"lora_alpha": "8"}, "lora_alpha of .*q_proj is '8'"),
        (matrices(Q, 4, 6), {"r": 0}, "r of .* is 0"),
        (matrices(Q, 4, 6), {"rank_pattern": {"(": 2}}, "rank_pattern: '\\('"),
    ],
)
def test_damaged_adapters(
    tmp_path: Path, tensors: dict[str, F32], config: dict[str, object], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_peft(save(tmp_path, tensors, **config), model())


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_config.json: no such file"):
        read_peft(tmp_path, model())
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UsageError, match="holds no adapter_model"):
        read_peft(tmp_path, model())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(SartorError, match=r"pickled adapter_model.bin is not read"):
        read_peft(tmp_path, model())
