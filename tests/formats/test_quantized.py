"""Quantised layouts of safetensors checkpoints: exact weights, and errors that name the tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_writers import LAYOUTS, Layout, Tensors, e4m3, gptq, mxfp4_of, scales_of
from safetensors.torch import save_file
from tiny_checkpoints import write_config

from sartor.errors import FormatError, UnsupportedError
from sartor.formats import Checkpoint, open_checkpoint
from sartor.ops.weights import AffineFormat, Fp8Format, LookupFormat

ROWS, COLUMNS = 32, 96
MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"
NORM = "model.norm.weight"


def write(
    folder: Path, layout: Layout, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[Tensors, np.ndarray]:
    """A checkpoint of one quantised module and one plain tensor; and the module's weights."""
    folder.mkdir(exist_ok=True)
    parts, weights = layout.write(np.random.default_rng(5), rows, columns)
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    tensors[NORM] = torch.arange(8, dtype=torch.float32)
    store(folder, tensors, layout.config)
    return tensors, weights


def store(folder: Path, tensors: Tensors, config: object) -> None:
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, quantization_config=config)


def read_everything(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        with np.errstate(all="ignore"):
            weight = checkpoint.weight(name)
            assert weight.dequantize().shape == checkpoint.info(name).shape
    return checkpoint


def complaint(folder: Path) -> str:
    """The error's message; the folder's path where there is none to make."""
    try:
        read_everything(folder)
    except (FormatError, UnsupportedError) as error:
        return str(error)
    return str(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_exact(tmp_path: Path, name: str) -> None:
    tensors, weights = write(tmp_path, LAYOUTS[name])
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.names()) == [WEIGHT, NORM]
    info = checkpoint.info(WEIGHT)
    assert (info.shape, info.stored) == ((ROWS, COLUMNS), LAYOUTS[name].stored)
    parts = [tensor for part, tensor in tensors.items() if part != NORM]
    assert info.nbytes == sum(part.nbytes for part in parts)
    weight = checkpoint.weight(WEIGHT)
    assert weight.name == WEIGHT
    np.testing.assert_array_equal(weight.dequantize(), weights)
    assert (weight.permutation is None) == LAYOUTS[name].ordered
    np.testing.assert_array_equal(checkpoint.weight(NORM).data, np.arange(8))
    checkpoint.close()
    np.testing.assert_array_equal(weight.dequantize(), weights)


def test_formats_keep_the_stored_bits(tmp_path: Path) -> None:
    wanted = {
        "gptq-sym": AffineFormat(4, 32, 8),
        "gptq-3-bits": AffineFormat(3, 32, offset=True),
        "gptq-8-bits-channel": AffineFormat(8, COLUMNS, offset=True),
        "awq": AffineFormat(4, 32, offset=True),
        "pack": AffineFormat(4, 32, 8),
        "int8-channel": AffineFormat(8, COLUMNS, 128),
        "float-channel": Fp8Format(COLUMNS),
        "fp8-block": Fp8Format(32),
        "mxfp4": LookupFormat((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), 32),
    }
    for name, format in wanted.items():
        write(tmp_path, LAYOUTS[name])
        assert open_checkpoint(tmp_path).weight(WEIGHT).format == format, name


def test_blocks_that_a_row_cuts(tmp_path: Path) -> None:
    """Rows of 80 in blocks of 32: equal groups of 16, each with its block's scale."""
    for name in ("fp8-block", "float-block"):
        _, weights = write(tmp_path, LAYOUTS[name], rows=72, columns=80)
        weight = open_checkpoint(tmp_path).weight(WEIGHT)
        assert weight.format == Fp8Format(16)
        np.testing.assert_array_equal(weight.dequantize(), weights)


def test_experts_keep_their_axis(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts, weights = mxfp4_of(generator, (3, 8, 64))
    tensors = {f"{name}_{part}": tensor for part, tensor in parts.items()}
    tensors[f"{name}_bias"] = torch.zeros(3, 8)
    store(tmp_path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == {name, f"{name}_bias"}
    assert checkpoint.info(name).shape == (3, 8, 64)
    np.testing.assert_array_equal(checkpoint.weight(name).dequantize(), weights)
    np.testing.assert_array_equal(checkpoint.weight(name).rows(1).dequantize(), weights[1])

    codes = e4m3(generator, (3, 40, 64))
    scale = scales_of(generator, (3, 2, 2), 64, 100)
    tensors = {name: codes, f"{name}_scale_inv": scale}
    store(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    wide = np.repeat(np.repeat(scale.float().numpy(), 32, 1)[:, :40], 32, 2)
    found = open_checkpoint(tmp_path).weight(name).dequantize()
    np.testing.assert_array_equal(found, codes.float().numpy() * wide)


def test_the_smallest_and_largest_exponents_of_mxfp4(tmp_path: Path) -> None:
    blocks = torch.full((2, 1, 16), 0x21, dtype=torch.uint8)  # codes 1 and 2: 0.5 and 1
    scales = torch.tensor([[0], [254]], dtype=torch.uint8)
    store(tmp_path, {"w_blocks": blocks, "w_scales": scales}, {"quant_method": "mxfp4"})
    found = open_checkpoint(tmp_path).weight("w").dequantize()
    assert found[0, :2].tolist() == [2.0**-128, 2.0**-127]
    assert found[1, :2].tolist() == [2.0**126, 2.0**127]


def test_modules_may_differ_where_the_configuration_says_so(tmp_path: Path) -> None:
    config = LAYOUTS["gptq"].config | {"dynamic": {"+:.*down_proj": {"bits": 8, "group_size": -1}}}
    tensors, wanted = {}, {}
    for name, layout in (("up_proj", LAYOUTS["gptq"]), ("down_proj", gptq(8, -1))):
        parts, wanted[name] = layout.write(np.random.default_rng(1), ROWS, COLUMNS)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    store(tmp_path, tensors, config)
    checkpoint = open_checkpoint(tmp_path)
    for name, weights in wanted.items():
        found = checkpoint.weight(f"{name}.weight")
        np.testing.assert_array_equal(found.dequantize(), weights)


def test_a_bias_of_zeros_that_gptq_added_is_left_out(tmp_path: Path) -> None:
    tensors, _ = write(tmp_path, LAYOUTS["gptq"])
    for value, names in ((0.0, {WEIGHT, NORM}), (0.5, {WEIGHT, NORM, f"{MODULE}.bias"})):
        tensors[f"{MODULE}.bias"] = torch.full((ROWS,), value, dtype=torch.float16)
        store(tmp_path, tensors, LAYOUTS["gptq"].config)
        assert set(open_checkpoint(tmp_path).names()) == names


def test_a_multimodal_checkpoint_may_say_it_of_its_text(tmp_path: Path) -> None:
    _, weights = write(tmp_path, LAYOUTS["awq"])
    write_config(tmp_path, text_config={"quantization_config": LAYOUTS["awq"].config})
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weight(WEIGHT).dequantize(), weights)


def without(part: str) -> Callable[[Tensors, Any], None]:
    def change(tensors: Tensors, _: Any) -> None:
        del tensors[f"{MODULE}.{part}"]

    return change


def replaced(part: str, tensor: torch.Tensor) -> Callable[[Tensors, Any], None]:
    return lambda tensors, _: tensors.update({f"{MODULE}.{part}": tensor})


def configured(*path: str, value: object) -> Callable[[Tensors, Any], None]:
    def change(_: Tensors, config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


WEIGHTS = ("config_groups", "group_0", "weights")
STATIC = {"dynamic": False, "num_bits": 8}
INT = torch.int32
BAD: dict[str, tuple[str, Callable[[Tensors, Any], None], str]] = {
    "gptq scales": ("gptq", without("scales"), "scales' is missing beside .*qweight"),
    "gptq zeros": ("gptq", without("qzeros"), "qzeros' is missing"),
    "gptq dtype": ("gptq", replaced("qweight", torch.zeros(12, 32)), "qweight.*fp32.*I32"),
    "gptq rank": ("gptq", replaced("qweight", torch.zeros(12, dtype=INT)), "qweight.*axes"),
    "gptq empty": ("gptq", replaced("qweight", torch.zeros(0, 32, dtype=INT)), "qweight.*empty"),
    "gptq rows": ("gptq", replaced("scales", torch.zeros(3, 31)), r"scales.*\[3, 32\] is needed"),
    "gptq number": ("gptq", replaced("scales", torch.tensor(1.0)), "scales' has shape"),
    "gptq groups": ("gptq", replaced("qzeros", torch.zeros(2, 4, dtype=INT)), r"qzeros.*\[3, 4\]"),
    "gptq width": (
        "gptq",
        replaced("qzeros", torch.zeros(3, 5, dtype=INT)),
        "qweight.*5 words; codes of 2, 3, 4, 8 bits",
    ),
    "gptq bits": ("gptq", configured("bits", value=8), "qweight.*4 bits.*config.json.*says 8"),
    "gptq group": ("gptq", configured("group_size", value=64), "groups of 32.*says.*64"),
    "gptq text": ("gptq", configured("bits", value="four"), "config.json.*bits is 'four'"),
    "gptq 5 bits": ("gptq", configured("bits", value=5), "bits = 5 is not implemented"),
    "gptq format": ("gptq", configured("checkpoint_format", value="marlin"), "'marlin'"),
    "gptq 3 bits of GPTQModel": (
        "gptq-3-bits",
        configured("meta", value={"quantizer": ["gptqmodel:2.0"]}),
        "3 bits.*gptqmodel",
    ),
    "gptq small groups": (
        "gptq",
        lambda tensors, _: tensors.update(
            {
                f"{MODULE}.scales": torch.ones(12, 32),
                f"{MODULE}.qzeros": torch.zeros(12, 4, dtype=INT),
            }
        ),
        "qweight.*96 weights in 12 groups",
    ),
    "gptq no group": (
        "gptq",
        lambda tensors, _: tensors.update(
            {
                f"{MODULE}.scales": torch.ones(0, 32),
                f"{MODULE}.qzeros": torch.zeros(0, 4, dtype=INT),
            }
        ),
        "qweight.*in 0 groups",
    ),
    "gptq g_idx length": ("gptq", replaced("g_idx", torch.zeros(95, dtype=INT)), r"g_idx.*\[96\]"),
    "gptq g_idx": ("gptq", replaced("g_idx", torch.zeros(96, dtype=INT)), "g_idx.*equal groups"),
    "gptq g_idx range": (
        "gptq",
        replaced("g_idx", torch.arange(96, dtype=INT) // 32 - 1),
        "g_idx.*equal groups",
    ),
    "gptq twice": ("gptq", replaced("weight", torch.zeros(32, 96)), "weight' is stored twice"),
    "gptq nothing": ("gptq", without("qweight"), "says gptq, but no tensor"),
    "awq scales": ("awq", without("scales"), "scales' is missing"),
    "awq zeros": ("awq", replaced("qzeros", torch.zeros(3, 3, dtype=INT)), "qzeros.*shape"),
    "awq without zeros": (
        "awq",
        lambda tensors, config: (
            tensors.pop(f"{MODULE}.qzeros"),
            config.update(zero_point=False),
        ),
        "zero_point = False is not implemented",
    ),
    "awq version": ("awq", configured("version", value="gemv"), "'gemv'"),
    "awq bits": ("awq", configured("bits", value=8), "bits = 8"),
    "awq group": ("awq", configured("group_size", value=96), "groups of 32.*says 96"),
    "pack scale": ("pack", without("weight_scale"), "weight_scale' is missing"),
    "pack shape": ("pack", without("weight_shape"), "weight_shape' is missing"),
    "pack lying shape": (
        "pack",
        replaced("weight_shape", torch.tensor([32, 1 << 60])),
        r"weight_packed.*\[32, 1152921504606846976\]",
    ),
    "pack negative shape": (
        "pack",
        replaced("weight_shape", torch.tensor([-1, -1])),
        "weight_packed",
    ),
    "pack groups": (
        "pack",
        replaced("weight_scale", torch.ones(32, 4)),
        r"weight_scale.*\[32, 3\] is needed",
    ),
    "pack zero": (
        "pack-zero",
        replaced("weight_zero_point", torch.zeros(5, 3, dtype=INT)),
        r"weight_zero_point.*\[4, 3\] is needed",
    ),
    "pack bits": ("pack", configured(*WEIGHTS, "num_bits", value=8), "weight_packed"),
    "pack 1 bit": (
        "pack",
        configured(*WEIGHTS, "num_bits", value=1),
        "config.json.*group_0: weights: num_bits = 1 of type 'int' is not implemented",
    ),
    "pack 9 bits": (
        "pack",
        configured(*WEIGHTS, "num_bits", value=9),
        "num_bits = 9 of type 'int'",
    ),
    "pack 3 bits in words for 4": (
        "pack",
        configured(*WEIGHTS, "num_bits", value=3),
        r"\[32, 12\] does not hold weights of shape \[32, 96\].*config_groups \(3\)",
    ),
    "pack tensor groups": (
        "pack",
        configured(*WEIGHTS, "strategy", value="tensor_group"),
        "strategy = 'tensor_group'",
    ),
    **{
        f"format {name}": ("pack", configured("format", value=name), f"format = '{name}' is not")
        for name in (
            "nvfp4-pack-quantized",
            "mxfp4-pack-quantized",
            "mxfp6-pack-quantized",
            "mxfp8-quantized",
            "sparse-bitmask",
        )
    },
    "float 4 bits": (
        "float-tensor",
        configured(*WEIGHTS, "num_bits", value=4),
        "num_bits = 4 of type 'float' is not implemented",
    ),
    "pack kind": ("pack", configured(*WEIGHTS, "type", value="float"), "weight_packed.*describes"),
    "pack type": ("pack", configured(*WEIGHTS, "type", value="int4"), "type = 'int4'"),
    "pack strategy": ("pack", configured(*WEIGHTS, "strategy", value="attn_head"), "'attn_head'"),
    "pack size": ("pack", configured(*WEIGHTS, "group_size", value=None), "group_size is 0"),
    "pack groups absent": ("pack", configured("config_groups", value=None), "weight_packed"),
    "pack format": ("pack", configured("format", value="marlin-24"), "'marlin-24'"),
    "pack sparse": (
        "pack",
        configured("sparsity_config", value={"format": "sparse-24-bitmask"}),
        "sparse-24-bitmask",
    ),
    "pack cache": ("pack", configured("kv_cache_scheme", value=STATIC), "kv_cache_scheme"),
    "pack transform": ("pack", configured("transform_config", value={"a": 1}), "transform_config"),
    "pack inputs": (
        "pack",
        configured("config_groups", "group_0", "input_activations", value=STATIC),
        "group_0.*static scale",
    ),
    "pack outputs": (
        "pack",
        configured("config_groups", "group_0", "output_activations", value=STATIC),
        "output_activations",
    ),
    "int8 plain": ("int8-channel", replaced("weight", torch.zeros(32, 96)), "weight'.*fp32"),
    "int8 gone": ("int8-channel", without("weight"), "weight' is missing beside"),
    "int8 scale": (
        "int8-channel",
        replaced("weight_scale", torch.ones(32, 2)),
        r"weight_scale.*\[32, 1\] or \[32\]",
    ),
    "float block": (
        "float-block",
        configured(*WEIGHTS, "block_structure", value=[128]),
        "block_structure",
    ),
    "fp8 scale": ("fp8-block", without("weight_scale_inv"), "weight_scale_inv' is missing"),
    "fp8 tiles": (
        "fp8-block",
        configured("weight_block_size", value=[16, 32]),
        r"weight_scale_inv.*\[2, 3\] is needed",
    ),
    "fp8 block": ("fp8-block", configured("weight_block_size", value=[0, 32]), "weight_block_size"),
    "fp8 static": ("fp8-tensor", configured("activation_scheme", value="static"), "'static'"),
    "fp8 5 exponent bits": ("fp8-tensor", configured("fmt", value="e5m2"), "'e5m2'"),
    "mxfp4 scales": ("mxfp4", without("weight_scales"), "weight_scales' is missing"),
    "mxfp4 blocks": (
        "mxfp4",
        replaced("weight_blocks", torch.zeros(32, 3, 8, dtype=torch.uint8)),
        "weight_blocks.*16",
    ),
    **{
        f"method {name}": (
            "gptq",
            configured("quant_method", value=name),
            f"quant_method = '{name}'",
        )
        for name in ("bitsandbytes", "fbgemm_fp8", "modelopt", "aqlm", "quanto", "torchao")
    },
    "another method": ("gptq", configured("quant_method", value="hqq"), "'hqq'.*GGUF"),
    "no method": ("gptq", configured("quant_method", value=None), "quant_method"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    layout, change, message = BAD[case]
    tensors, _ = write(tmp_path, LAYOUTS[layout])
    config = json.loads(json.dumps(LAYOUTS[layout].config))
    change(tensors, config)
    store(tmp_path, tensors, config)
    with pytest.raises((FormatError, UnsupportedError), match=message) as caught:
        read_everything(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [3, "gptq", [], True])
def test_a_quantization_config_that_is_none(tmp_path: Path, config: object) -> None:
    tensors, _ = write(tmp_path, LAYOUTS["gptq"])
    store(tmp_path, tensors, config)
    with pytest.raises(FormatError, match=r"config\.json: quantization_config is no object"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["gptq-act-order", "awq", "pack-zero", "pack-act-order", "int8-zero", "fp8-block", "mxfp4"],
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_loads_or_is_named_fuzzed(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Any bit of header, configuration or tensors."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    if not good.exists():
        write(good, LAYOUTS[name], rows=16, columns=32)
        (good / "config.json").write_text(
            json.dumps(json.loads((good / "config.json").read_text()), separators=(",", ":"))
        )
    shutil.copytree(good, bad, dirs_exist_ok=True)
    target = data.draw(st.sampled_from(["model.safetensors", "header", "config.json"]))
    path = bad / target.replace("header", "model.safetensors")
    content = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0] if target == "header" else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert str(bad) in complaint(bad)
