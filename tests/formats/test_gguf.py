"""The GGUF header: what it says, and that nothing in it can harm the reader."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import random_blocks, tiny_tensors, write_gguf

from sartor.errors import FormatError, SartorError, UnsupportedError, UsageError
from sartor.formats import open_checkpoint
from sartor.formats.gguf import GgufCheckpoint

FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(pairs: list[bytes], tensors: list[bytes] = [], version: int = 3) -> bytes:  # noqa: B006
    counts = struct.pack("<IQQ", version, len(tensors), len(pairs))
    return b"GGUF" + counts + b"".join(pairs) + b"".join(tensors)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    lengths = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + lengths + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair(b"general.architecture", 8, string(b"llama"))


def write(path: Path, content: bytes, data: int = 0) -> Path:
    content += bytes(-len(content) % 32) + bytes(data)
    path.write_bytes(content)
    return path


def read_everything(path: Path) -> None:
    """What a user of the checkpoint could ask for."""
    checkpoint = open_checkpoint(path)
    for key in checkpoint.metadata:
        str(checkpoint.metadata[key]).encode()
    for name in checkpoint.names():
        weight = checkpoint.weight(name)
        assert weight.data.size == checkpoint.info(name).size
        weight.data.max(initial=0)
    assert checkpoint.bits_per_weight >= 0
    assert len(checkpoint.identity()) == 64


def complaint(path: Path) -> str:
    """The error's message; the path where there is none to make."""
    try:
        read_everything(path)
    except FormatError as error:
        return str(error)
    return str(path)


def test_metadata_and_tensors(tiny_gguf: Path) -> None:
    checkpoint = GgufCheckpoint(tiny_gguf)
    metadata = checkpoint.metadata
    assert checkpoint.kind == "gguf"
    assert checkpoint.architecture == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.tokens"] == ["<s>", "héllo", "", "世界", "a" * 300]
    np.testing.assert_array_equal(metadata["tokenizer.ggml.scores"], [0, -1, -2, -3, -4.5])
    assert "no.such.key" not in metadata
    assert checkpoint.names() == list(tiny_tensors())
    info = checkpoint.info("blk.0.attn_q.weight")
    assert (info.shape, info.stored, info.nbytes) == ((3, 256), "Q4_K", 3 * 144)
    stored = sum(data.nbytes for data, _ in tiny_tensors().values())
    weights = 5 * 64 + 3 * 256 + 64 + 24
    assert checkpoint.bits_per_weight == pytest.approx(8 * stored / weights)


def test_floats_are_views_of_the_file(tiny_gguf: Path) -> None:
    checkpoint = GgufCheckpoint(tiny_gguf)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_up.weight"):
        weight = checkpoint.weight(name)
        np.testing.assert_array_equal(weight.data, tiny_tensors()[name][0])
        assert not weight.data.flags.owndata
        assert not weight.data.flags.writeable


def test_bf16_keeps_its_bits(tmp_path: Path) -> None:
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4) + 0x3F80
    path = write_gguf(tmp_path / "b.gguf", {"w": (bits.view(np.uint8), "BF16")})
    np.testing.assert_array_equal(GgufCheckpoint(path).weight("w").data, bits)


def test_stacked_experts_keep_their_axis(tmp_path: Path) -> None:
    raw = random_blocks("Q4_0", 6, 64)
    path = write_gguf(tmp_path / "e.gguf", {"w": (raw.reshape(2, 3, -1), "Q4_0")})
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.info("w").shape == (2, 3, 64)
    assert checkpoint.weight("w").shape == (2, 3, 64)


def test_own_alignment(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_tensors(), alignment=128)
    checkpoint = GgufCheckpoint(path)
    assert all(checkpoint.info(name).offset % 128 == 0 for name in checkpoint.names())
    read_everything(path)


def test_version_2_reads_like_3(tiny_gguf: Path) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    content[4] = 2
    tiny_gguf.write_bytes(content)
    read_everything(tiny_gguf)


def test_weights_outlive_their_checkpoint(tiny_gguf: Path) -> None:
    with GgufCheckpoint(tiny_gguf) as checkpoint:
        weight = checkpoint.weight("blk.0.attn_norm.weight")
        metadata = checkpoint.metadata
    np.testing.assert_array_equal(weight.data, tiny_tensors()["blk.0.attn_norm.weight"][0])
    assert metadata["tokenizer.ggml.tokens"]
    with pytest.raises(SartorError, match="closed"):
        checkpoint.weight("blk.0.attn_norm.weight")


def test_identity_follows_header_and_time(tiny_gguf: Path) -> None:
    before = GgufCheckpoint(tiny_gguf).identity()
    assert before == GgufCheckpoint(tiny_gguf).identity()
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content.replace(b"tiny", b"tinz"))
    assert before != GgufCheckpoint(tiny_gguf).identity()


def test_a_split_set_reads_as_one(tmp_path: Path) -> None:
    tensors = list(tiny_tensors().items())
    for number, part in enumerate((tensors[:2], tensors[2:])):

        def split(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", len(tensors))

        name = f"m-0000{number + 1}-of-00002.gguf"
        write_gguf(tmp_path / name, dict(part), extra=split)
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.names() == [name for name, _ in tensors]
        assert checkpoint.info("blk.0.ffn_up.weight").file.name == "m-00002-of-00002.gguf"
        read_everything(path)
    with pytest.raises(UsageError, match="m-00001-of-00002"):
        open_checkpoint(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00002.*missing"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def write_split(folder: Path, count: int, suffix: str = "gguf") -> list[Path]:
    """A split set as llama-gguf-split writes it: only the first file has metadata of the model."""
    tensors = list(tiny_tensors().items())
    files = []
    for number in range(count):
        path = folder / f"m-{number + 1:05}-of-{count:05}.{suffix}"
        writer = gguf.GGUFWriter(path, "llama")
        if number:
            writer.kv_data[0].clear()
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for name, (data, kind) in tensors[number::count]:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(path)
    return files


@pytest.mark.parametrize("suffix", ["gguf", "GGUF"])
def test_a_later_file_of_a_split_set_names_the_first(tmp_path: Path, suffix: str) -> None:
    files = write_split(tmp_path, 3, suffix)
    assert len(open_checkpoint(files[0]).names()) == len(tiny_tensors())
    for number in (2, 3):
        with pytest.raises(UsageError, match=f"file {number} of 3 .* give file 1: {files[0]}"):
            open_checkpoint(files[number - 1])
        with pytest.raises(UsageError, match=f"file {number} of 3 .* give file 1: {files[0]}"):
            GgufCheckpoint(files[number - 1])
    renamed = files[1].rename(tmp_path / "other.gguf")
    with pytest.raises(UnsupportedError, match="file 2 of 3 of a split model, but is not named"):
        open_checkpoint(renamed)


def test_all_missing_files_of_a_split_set_are_named(tmp_path: Path) -> None:
    files = write_split(tmp_path, 4)
    files[1].unlink()
    files[3].unlink()
    with pytest.raises(
        FormatError, match=r"m-00002-of-00004\.gguf and m-00004-of-00004\.gguf: miss"
    ):
        open_checkpoint(files[0])
    files[0].unlink()
    with pytest.raises(FormatError, match=r"m-00001-of-00004\.gguf: this first file .* is missing"):
        open_checkpoint(files[2])


def test_a_renamed_split_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "one.gguf", tiny_tensors(), extra=lambda w: w.add_uint16("split.count", 2)
    )
    with pytest.raises(UnsupportedError, match="split"):
        open_checkpoint(path)


HUGE = 1 << 60
BAD: dict[str, tuple[bytes, str]] = {
    "other magic": (b"GGML" + bytes(60), "no GGUF"),
    "only magic": (b"GGUF", "header"),
    "version 1": (header([], version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "tensors"),
    "many pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "pairs"),
    "long key": (header([struct.pack("<Q", HUGE)]), "key 1"),
    "key of no text": (header([pair(b"\xff\xfe", 4, bytes(4))]), "UTF-8"),
    "empty key": (header([pair(b"", 4, bytes(4))]), "empty key"),
    "key twice": (header([ARCHITECTURE, ARCHITECTURE]), "general.architecture.*twice"),
    "value type": (header([pair(b"k", 77, bytes(8))]), "'k'.*77"),
    "bool of 2": (header([pair(b"k", 7, b"\x02")]), "bool"),
    "bools of 2": (header([pair(b"k", 9, struct.pack("<IQ", 7, 1) + b"\x02")]), "bools"),
    "long string": (header([pair(b"k", 8, struct.pack("<Q", HUGE))]), "'k'"),
    "many strings": (header([pair(b"k", 9, struct.pack("<IQ", 8, HUGE))]), "strings"),
    "many numbers": (header([pair(b"k", 9, struct.pack("<IQ", 12, HUGE))]), "numbers"),
    "strings past the end": (
        header([pair(b"k", 9, struct.pack("<IQQ", 8, 2, 2**64 - 1) + bytes(64))]),
        "'k'",
    ),
    "nested array": (header([pair(b"k", 9, struct.pack("<IQIQ", 9, 1, 9, 1))]), "array of arrays"),
    "array type": (header([pair(b"k", 9, struct.pack("<IQ", 13, 1))]), "13"),
    "no architecture": (header([pair(b"k", 4, bytes(4))]), "general.architecture"),
    "number as architecture": (
        header([pair(b"general.architecture", 4, bytes(4))]),
        "general.architecture",
    ),
    "alignment of 24": (
        header([ARCHITECTURE, pair(b"general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment.*24",
    ),
    "alignment of 0": (
        header([ARCHITECTURE, pair(b"general.alignment", 4, bytes(4))]),
        "general.alignment",
    ),
    "text as alignment": (
        header([ARCHITECTURE, pair(b"general.alignment", 8, string(b"32"))]),
        "general.alignment",
    ),
    "array as split count": (
        header([ARCHITECTURE, pair(b"split.count", 9, struct.pack("<IQ", 4, 2) + bytes(8))]),
        "split.count",
    ),
    "dimensions": (header([ARCHITECTURE], [tensor(b"w", [2] * 5, 0, 0)]), "'w'.*5 dim"),
    "no dimensions": (header([ARCHITECTURE], [tensor(b"w", [], 0, 0) + bytes(8)]), "'w'.*0 dim"),
    "empty tensor": (header([ARCHITECTURE], [tensor(b"w", [0], 0, 0)]), "'w'"),
    "overflowing shape": (
        header([ARCHITECTURE], [tensor(b"w", [1 << 32, 1 << 32, 4], 0, 0)]),
        "'w'",
    ),
    "unknown type": (header([ARCHITECTURE], [tensor(b"w", [32], 99, 0)]), "'w'.*99"),
    "removed type": (header([ARCHITECTURE], [tensor(b"w", [32], 31, 0)]), "'w'.*Q4_0_4_4"),
    "row of no blocks": (header([ARCHITECTURE], [tensor(b"w", [48], 2, 0)]), "'w'.*48.*Q4_0"),
    "offset outside": (header([ARCHITECTURE], [tensor(b"w", [8], 0, HUGE)]), "'w'.*outside"),
    "misaligned": (header([ARCHITECTURE], [tensor(b"w", [2], 0, 8)]), "'w'.*multiple"),
    "overlap": (
        header([ARCHITECTURE], [tensor(b"v", [16], 0, 0), tensor(b"w", [8], 0, 32)]),
        "'w'.*overlaps.*'v'",
    ),
    "tensor twice": (
        header([ARCHITECTURE], [tensor(b"w", [8], 0, 0), tensor(b"w", [8], 0, 32)]),
        "'w'.*twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = write(tmp_path / "bad.gguf", content, data=64)
    with pytest.raises(FormatError, match=message) as caught:
        read_everything(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    with pytest.raises(FormatError, match=r"empty\.gguf"):
        open_checkpoint(path)


def test_invalid_text_in_a_value_is_data(tmp_path: Path) -> None:
    tokens = struct.pack("<IQ", 8, 2) + string(b"\xff") + string(b"ok")
    path = write(tmp_path / "t.gguf", header([ARCHITECTURE, pair(b"tokens", 9, tokens)]))
    assert GgufCheckpoint(path).metadata["tokens"] == ["�", "ok"]


def test_an_undecoded_type_is_named_when_read(tmp_path: Path) -> None:
    content = header([ARCHITECTURE], [tensor(b"w", [256], 16, 0), tensor(b"v", [8], 0, 96)])
    checkpoint = GgufCheckpoint(write(tmp_path / "iq.gguf", content, data=128))
    assert checkpoint.info("w").stored == "IQ2_XXS"
    checkpoint.weight("v")
    with pytest.raises(UnsupportedError, match=r"'w'.*IQ2_XXS"):
        checkpoint.weight("w")


def test_a_missing_tensor_is_named(tiny_gguf: Path) -> None:
    with pytest.raises(FormatError, match="'nope'"):
        GgufCheckpoint(tiny_gguf).weight("nope")


@FUZZ
@given(data=st.data())
def test_truncation_is_found(tiny_gguf: Path, data: st.DataObject) -> None:
    content = tiny_gguf.read_bytes()
    last = GgufCheckpoint(tiny_gguf).info("blk.0.ffn_up.weight")
    length = data.draw(st.integers(0, last.offset + last.nbytes - 1))
    bad = tiny_gguf.with_name("cut.gguf")
    bad.write_bytes(content[:length])
    with pytest.raises(FormatError, match=r"cut\.gguf"):
        read_everything(bad)


@FUZZ
@given(data=st.data())
def test_damage_loads_or_is_named(tiny_gguf: Path, data: st.DataObject) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    end = GgufCheckpoint(tiny_gguf).info("token_embd.weight").offset
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(4, end - 8))
        content[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    bad = tiny_gguf.with_name("bad.gguf")
    bad.write_bytes(content)
    started = time.monotonic()
    assert "bad.gguf" in complaint(bad)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("model", "limit"), [("smollm2-135m", 0.05), ("gemma3-270m", 0.4)])
def test_real_files_open_fast(model_files: dict[str, Path], model: str, limit: float) -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        open_checkpoint(model_files[model]).close()
        times.append(time.perf_counter() - started)
    assert min(times) < limit


def test_real_metadata(model_files: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(model_files["smollm2-135m"])
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == checkpoint.metadata["llama.vocab_size"] == 49152
    assert tokens[:2] == ["<|endoftext|>", "<|im_start|>"]


def test_source_pages_can_be_let_go(tmp_path: Path) -> None:
    from sartor.formats.files import MappedFile

    path = tmp_path / "source"
    path.write_bytes(bytes(range(256)) * 100)
    file = MappedFile.open(path)
    view = file.view(0, file.size)
    before = bytes(view)
    file.forget()
    assert bytes(view) == before == path.read_bytes()
