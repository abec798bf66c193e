"""Models to measure with.

    python benchmarks/make_models.py requantize SOURCE.gguf TARGET.gguf
    python benchmarks/make_models.py random qwen2-1.5b|llama3-8b|long|tiny TARGET.gguf
    python benchmarks/make_models.py folder MODEL.gguf FOLDER

``requantize`` writes Q4_0 by llama.cpp, as most people's files are made. ``random`` writes the
shape of a model with random Q4_0 blocks (the head Q6_K, as quantisers write it) and a small
tokenizer: speed does not depend on the values. ``folder`` writes the weights as bf16 for engines
that read no GGUF. The first needs the peer llama_cpp, the last the peer transformers.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from peers import PEERS, default_environments, interpreter

from sartor.errors import SartorError, UsageError

DRIVERS = Path(__file__).parent / "drivers"
STANDARD_DEVIATION = 0.02
BLOCKS = {  # weights and bytes of a block
    GGMLQuantizationType.Q4_0: (32, 18),
    GGMLQuantizationType.Q6_K: (256, 210),
}
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. ``tied``: the embedding is the head too; ``bias``: of q, k and v."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    rope_base: float
    tied: bool
    bias: bool
    context: int = 4096


SHAPES = {
    "qwen2-1.5b": Shape("qwen2", 28, 1536, 12, 2, 8960, 151936, 1e6, tied=True, bias=True),
    "llama3-8b": Shape("llama", 32, 4096, 32, 8, 14336, 128256, 5e5, tied=False, bias=False),
    "long": Shape(
        "llama", 4, 512, 8, 2, 1536, 4096, 1e7, tied=True, bias=False, context=2 * 128 * 1024
    ),
    "tiny": Shape("qwen2", 2, 256, 4, 2, 512, 1024, 1e4, tied=True, bias=True),
}


def write_random(shape: Shape, target: Path, seed: int = 0) -> None:
    """Writes a model tensor by tensor: no more than the largest is in memory at once."""
    writer = GGUFWriter(target, shape.architecture)
    head = shape.hidden // shape.heads
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocab)
    if shape.architecture == "llama":
        writer.add_rope_dimension_count(head)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    _add_tokenizer(writer, shape.vocab)
    made = list(_tensors(shape))
    for name, form, kind in made:
        if kind is None:
            count = math.prod(form)
            writer.add_tensor_info(name, form, np.dtype(np.float32), 4 * count)
        else:
            weights, size = BLOCKS[kind]
            row = form[-1] // weights * size
            byte_shape = [*form[:-1], row]
            writer.add_tensor_info(
                name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for name, form, kind in made:
        if kind is not None:
            writer.write_tensor_data(random_blocks(rng, form, kind))
        elif name.endswith("norm.weight"):
            writer.write_tensor_data(np.ones(form, np.float32))
        else:
            writer.write_tensor_data(rng.normal(0, STANDARD_DEVIATION, form).astype(np.float32))
    writer.close()


def _tensors(
    shape: Shape,
) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType | None]]:
    """Name, shape and format of every tensor; None is fp32."""
    small, large = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield "token_embd.weight", (shape.vocab, hidden), large if shape.tied else small
    yield "output_norm.weight", (hidden,), None
    if not shape.tied:
        yield "output.weight", (shape.vocab, hidden), large
    for layer in range(shape.layers):
        start = f"blk.{layer}."
        yield start + "attn_norm.weight", (hidden,), None
        yield start + "ffn_norm.weight", (hidden,), None
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            yield f"{start}{name}.weight", (rows, hidden), small
            if shape.bias:
                yield f"{start}{name}.bias", (rows,), None
        yield start + "attn_output.weight", (hidden, hidden), small
        yield start + "ffn_gate.weight", (shape.ffn, hidden), small
        yield start + "ffn_up.weight", (shape.ffn, hidden), small
        yield start + "ffn_down.weight", (hidden, shape.ffn), small


def random_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType
) -> Bytes:
    """Blocks of even codes, scaled to a standard deviation of 0.02: uint8 [..., bytes of a row].

    Q4_0 is fp16 d, then 16 bytes of codes 0 to 15, for (code - 8) d. Q6_K is 192 bytes of codes
    0 to 63, 16 int8 sub-scales s, then fp16 d, for (code - 32) s d. Source: the GGUF format's
    block layouts.
    """
    weights, size = BLOCKS[kind]
    count = math.prod(shape) // weights
    # From raw bytes: drawing integers one by one takes ten times as long.
    blocks = np.frombuffer(rng.bytes(count * size), np.uint8).reshape(count, size).copy()
    if kind == GGMLQuantizationType.Q4_0:
        blocks[:, :2] = _half(STANDARD_DEVIATION / math.sqrt((16**2 - 1) / 12))
    else:
        sub_scale = 16
        blocks[:, 192:208] = sub_scale
        blocks[:, 208:] = _half(STANDARD_DEVIATION / math.sqrt((64**2 - 1) / 12) / sub_scale)
    return blocks.reshape(*shape[:-1], -1)


def _half(value: float) -> Bytes:
    return np.array([value], np.float16).view(np.uint8)


def _add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    """Bytes as GPT-2 spells them, one merge, an end, and unused tokens up to ``vocab``."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    tokens = [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]
    tokens += ["he", "<|end|>"]
    tokens += [f"<|unused_{i}|>" for i in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] + [5] * (vocab - 258))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(257)
    writer.add_add_bos_token(False)


def requantize(source: Path, target: Path, environments: Path) -> None:
    """Any GGUF file to Q4_0, by llama.cpp."""
    run_driver("llama_cpp", environments, "requantize.py", source, target)


def write_folder(model: Path, folder: Path, environments: Path) -> None:
    """The bf16 checkpoint folder of a GGUF file, whole or not at all."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_driver("transformers", environments, "write_folder.py", model, part)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run_driver(peer: str, environments: Path, script: str, *arguments: Path) -> None:
    """Runs a script of ``drivers`` in a peer's environment. SartorError with its last line."""
    python = interpreter(environments, PEERS[peer])
    if python is None:
        raise SartorError(
            f"the peer {peer} is not installed in {environments}; run "
            f"python benchmarks/peers.py install {peer}"
        )
    command = [str(python), str(DRIVERS / script), *(str(a.absolute()) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SartorError(f"{script} failed with code {done.returncode}: {last}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("requantize", "random", "folder"))
    parser.add_argument("source", help="a .gguf file, or the name of a shape")
    parser.add_argument("target", type=Path)
    parser.add_argument("--environments", type=Path, default=default_environments())
    options = parser.parse_args()
    try:
        if options.action == "random":
            if options.source not in SHAPES:
                raise UsageError(
                    f"no shape is called {options.source}; choose from {', '.join(SHAPES)}"
                )
            write_random(SHAPES[options.source], options.target)
        elif options.action == "requantize":
            requantize(Path(options.source), options.target, options.environments)
        else:
            write_folder(Path(options.source), options.target, options.environments)
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
