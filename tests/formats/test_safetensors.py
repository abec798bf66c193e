"""Safetensors folders: values, shards, and damaged or hostile headers."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import write_config

from sartor.errors import FormatError, UnsupportedError, UsageError
from sartor.formats import open_checkpoint
from sartor.formats.safetensors import INDEX_NAME, SafetensorsCheckpoint

FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def write_raw(folder: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(dtype: str, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.weight(name).dequantize()
    assert len(checkpoint.identity()) == 64


def complaint(folder: Path, target: str) -> str:
    """The error's message; the target's name where there is none to make."""
    try:
        read_everything(folder)
    except FormatError as error:
        return str(error)
    return target


def test_values_and_config(tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(tiny_folder)
    oracle = load_file(tiny_folder / "model.safetensors")
    assert checkpoint.kind == "safetensors"
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.metadata["hidden_size"] == 8
    assert sorted(checkpoint.names()) == sorted(oracle)
    for name, values in oracle.items():
        weight = checkpoint.weight(name)
        np.testing.assert_array_equal(weight.data, values)
        assert weight.data.dtype == values.dtype
        assert not weight.data.flags.owndata
        assert not weight.data.flags.writeable
    assert checkpoint.info("b.weight").stored == "fp16"
    assert checkpoint.bits_per_weight == pytest.approx((40 * 32 + 32 * 16) / 72)


def test_bf16_is_given_as_bits(tiny_folder: Path) -> None:
    bits = np.array([[0x3F80, 0xC000], [0x7FC0, 0x0001]], np.uint16)
    write_raw(tiny_folder, {"w": entry("BF16", [2, 2], 0, 8)}, bits.tobytes())
    weight = open_checkpoint(tiny_folder).weight("w")
    np.testing.assert_array_equal(weight.data, bits)
    assert weight.dequantize()[0].tolist() == [1.0, -2.0]


def test_misaligned_data_is_copied_into_line(tiny_folder: Path) -> None:
    raw = json.dumps({"w": entry("F32", [2], 0, 8)}).encode()
    raw += b" " * (1 - len(raw) % 4)
    content = struct.pack("<Q", len(raw)) + raw + np.array([1.5, -2], np.float32).tobytes()
    (tiny_folder / "model.safetensors").write_bytes(content)
    weight = open_checkpoint(tiny_folder).weight("w")
    assert weight.data.flags.aligned
    assert weight.data.tolist() == [1.5, -2.0]


def test_scalars_and_empty_tensors(tiny_folder: Path) -> None:
    header = {"e": entry("F32", [0, 3], 0, 0), "s": entry("F32", [], 0, 4)}
    write_raw(tiny_folder, header, bytes(4))
    checkpoint = open_checkpoint(tiny_folder)
    assert checkpoint.weight("e").shape == (0, 3)
    assert checkpoint.weight("s").shape == ()


def shard(folder: Path) -> None:
    """Splits the folder's file into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(tensors)):
        file = f"model-0000{number % 2 + 1}-of-00002.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_read_as_one(tiny_folder: Path) -> None:
    whole = open_checkpoint(tiny_folder)
    expected = {name: np.array(whole.weight(name).data) for name in whole.names()}
    shard(tiny_folder)
    checkpoint = open_checkpoint(tiny_folder)
    assert set(checkpoint.names()) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.weight(name).data, values)


STALE_INDEXES: dict[str, bytes] = {
    "empty": b"",
    "an empty object": b"{}",
    "no JSON": b"<html>",
    "a list": b"[]",
    "an empty map": b'{"weight_map": {}}',
    "shards that are gone": b'{"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}',
    "a tensor that is not there": b'{"weight_map": {"zzz": "model.safetensors"}}',
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("case", STALE_INDEXES)
def test_a_whole_file_counts_more_than_an_index(tiny_folder: Path, case: str) -> None:
    """As in transformers, which looks for model.safetensors first."""
    before = open_checkpoint(tiny_folder)
    (tiny_folder / INDEX_NAME).write_bytes(STALE_INDEXES[case])
    checkpoint = open_checkpoint(tiny_folder)
    assert checkpoint.names() == before.names()
    assert checkpoint.identity() == before.identity()


def test_a_whole_file_counts_more_than_shards_beside_it(tiny_folder: Path) -> None:
    whole = (tiny_folder / "model.safetensors").read_bytes()
    shard(tiny_folder)
    (tiny_folder / "model.safetensors").write_bytes(whole)
    checkpoint = open_checkpoint(tiny_folder)
    assert {checkpoint.info(name).file.name for name in checkpoint.names()} == {"model.safetensors"}


@pytest.mark.parametrize("case", STALE_INDEXES)
def test_without_a_whole_file_an_index_must_be_sound(tiny_folder: Path, case: str) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "other.safetensors")
    (tiny_folder / INDEX_NAME).write_bytes(STALE_INDEXES[case])
    with pytest.raises(FormatError):
        open_checkpoint(tiny_folder)


def test_a_missing_shard_is_named(tiny_folder: Path) -> None:
    shard(tiny_folder)
    (tiny_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00002.*missing"):
        open_checkpoint(tiny_folder)


def test_a_tensor_that_its_shard_lacks_is_named(tiny_folder: Path) -> None:
    shard(tiny_folder)
    index = json.loads((tiny_folder / INDEX_NAME).read_text())
    index["weight_map"]["a.weight"] = "model-00002-of-00002.safetensors"
    (tiny_folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"'a\.weight'"):
        open_checkpoint(tiny_folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "..", "", 3, "a\0b", "x" * 999]
)
def test_the_index_stays_in_its_folder(tiny_folder: Path, name: object) -> None:
    (tiny_folder / "model.safetensors").unlink()  # where it is there, no index counts
    (tiny_folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(FormatError):
        open_checkpoint(tiny_folder)


def test_identity_follows_files(tiny_folder: Path) -> None:
    before = open_checkpoint(tiny_folder).identity()
    assert before == open_checkpoint(tiny_folder).identity()
    write_config(tiny_folder, rope_theta=5.0)
    assert before != open_checkpoint(tiny_folder).identity()


def test_other_quantised_layouts_are_refused_by_name(tiny_folder: Path) -> None:
    write_config(tiny_folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UnsupportedError, match=r"config\.json.*'bitsandbytes'.*GPTQ"):
        open_checkpoint(tiny_folder)


def test_other_dtypes_are_refused_by_name(tiny_folder: Path) -> None:
    write_raw(tiny_folder, {"w": entry("I64", [1], 0, 8)}, bytes(8))
    checkpoint = open_checkpoint(tiny_folder)
    assert checkpoint.info("w").stored == "I64"
    with pytest.raises(UnsupportedError, match=r"'w'.*I64"):
        checkpoint.weight("w")


BAD_HEADERS: dict[str, tuple[object, bytes]] = {
    "no JSON": (b"{", b""),
    "a list": ([1], b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "deep": (b"[" * 200_000, b""),
    "a number of many digits": (b'{"w": ' + b"9" * 10_000 + b"}", b""),
    "twice": (b'{"w": {}, "w": {}}', b""),
    "no object": ({"w": 3}, b""),
    "no offsets": ({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "dtype": ({"w": entry("F31", [1], 0, 4)}, bytes(4)),
    "negative": ({"w": entry("F32", [-1], 0, 4)}, bytes(4)),
    "a float": ({"w": entry("F32", [1.0], 0, 4)}, bytes(4)),
    "a bool": ({"w": entry("F32", [True], 0, 4)}, bytes(4)),
    "many dimensions": ({"w": entry("F32", [1 << 50] * 5000, 0, 4)}, bytes(4)),
    "overflow": ({"w": entry("F32", [0, 1 << 40, 1 << 40], 0, 0)}, b""),
    "size": ({"w": entry("F32", [2], 0, 4)}, bytes(4)),
    "outside": ({"w": entry("F32", [2], 0, 8)}, bytes(4)),
    "backwards": ({"w": entry("F32", [1], 4, 0)}, bytes(4)),
    "hole": ({"w": entry("F32", [1], 4, 8)}, bytes(8)),
    "rest": ({"w": entry("F32", [1], 0, 4)}, bytes(8)),
    "overlap": ({"v": entry("F32", [2], 0, 8), "w": entry("F32", [1], 4, 8)}, bytes(8)),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_damage_is_named(tiny_folder: Path, case: str) -> None:
    write_raw(tiny_folder, *BAD_HEADERS[case])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        open_checkpoint(tiny_folder)


@pytest.mark.parametrize("length", [0, 1 << 40, 2**64 - 1])
def test_a_wrong_header_length_is_named(tiny_folder: Path, length: int) -> None:
    (tiny_folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        open_checkpoint(tiny_folder)


@pytest.mark.parametrize(
    "config", ["", "[]", "{}", '{"architectures": []}', '{"architectures": 1}']
)
def test_a_damaged_config_is_named(tiny_folder: Path, config: str) -> None:
    (tiny_folder / "config.json").write_text(config)
    with pytest.raises(FormatError, match=r"config\.json"):
        open_checkpoint(tiny_folder)


def test_no_config_is_named(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json"):
        open_checkpoint(tiny_folder)
    with pytest.raises(UsageError, match=r"config\.json"):
        SafetensorsCheckpoint(tiny_folder)


@FUZZ
@given(data=st.data())
def test_damage_loads_or_is_named_fuzzed(tiny_folder: Path, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    bad = tiny_folder.with_name("bad")
    shutil.copytree(tiny_folder, bad, dirs_exist_ok=True)
    content = bytearray((tiny_folder / target).read_bytes())
    end = len(content)
    if target == "model.safetensors":
        end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (bad / target).write_bytes(content)
    assert target in complaint(bad, target)
