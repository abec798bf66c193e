"""How near attention on the CPU comes to the machine: decoding by context, prefill at 8k tokens.

A program of attention layers in a model's shape, with random weights and a narrow residual stream,
so that little else is in a step:

- decode: the time that a context adds to the attention and state writes of one token (median of
  alternating steps, over that of a context of 32), beside the time to read the context's keys and
  values once at the machine's bandwidth, which is measured in the same rounds;
- prefill: operations of causal attention a second (4 * head_dim a query head and position seen)
  as a share of the float32 peak and of half the int8 peak, which is what bf16 has by design.

    python benchmarks/attention.py [--shape qwen2-1.5b] [--contexts 4096,16384] [--prompt 8192]
                                   [--isa avx512] [--kv bf16,int8] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sartor.backends.cpu import _native
from sartor.backends.cpu.backend import CpuBackend, CpuExecutable
from sartor.graph import SAMPLING_ROW, Batch, Builder, Program, Ragged
from sartor.ops.kv import vector_bytes
from sartor.ops.weights import Weight, dense
from sartor.plan import ExecutionPlan

WIDTH, VOCAB, CHUNK = 64, 64, 1024
STATE = ("attention", "kv_write")


@dataclass(frozen=True)
class Shape:
    """Attention of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int


SHAPES = {
    "qwen2-1.5b": Shape(12, 2, 128, 28),
    "llama3-8b": Shape(32, 8, 128, 32),
    "smollm2-135m": Shape(9, 3, 64, 30),
}


@dataclass(frozen=True)
class Decode:
    """One token behind ``context`` others: seconds that they add, and seconds to read them."""

    context: int
    kv_bytes: int
    added: float
    read: float

    @property
    def over(self) -> float:
        """What the added time exceeds the read by, as a share of the read."""
        return self.added / self.read - 1


@dataclass(frozen=True)
class Prefill:
    """A prompt's attention: operations, seconds, and the peaks of the same run."""

    prompt: int
    layers: int
    operations: float
    seconds: float
    fp32_peak: float
    bf16_peak: float


class _RandomWeights:
    def weight(self, name: str) -> Weight:
        return dense(name, self._values[name])

    def __init__(self, program: Program) -> None:
        rng = np.random.default_rng(0)
        self._values = {
            spec.name: rng.standard_normal(spec.shape).astype(np.float32) / WIDTH**0.5
            for spec in program.weights
        }

    def identity(self) -> str:
        return "attention-benchmark"


def layers(shape: Shape, count: int) -> Program:
    """``count`` layers of nothing but attention."""
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, WIDTH)
    for n in range(count):
        q = b.linear(x, f"q{n}", shape.heads * shape.head_dim)
        k = b.linear(x, f"k{n}", shape.kv_heads * shape.head_dim)
        v = b.linear(x, f"v{n}", shape.kv_heads * shape.head_dim)
        y = b.attention(
            q,
            k,
            v,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            name=f"attention{n}",
        )
        x = b.rms_norm(b.add(x, b.linear(y, f"o{n}", WIDTH), f"sum{n}"), f"norm{n}", eps=1e-5)
    return b.finish(b.linear(b.gather_rows(x, b.output_rows), "head", VOCAB))


class Bench:
    """A program compiled for one path, with room for ``context`` tokens of one sequence."""

    def __init__(self, shape: Shape, count: int, context: int, plan: ExecutionPlan) -> None:
        self.backend, self.plan = CpuBackend(), plan
        program = layers(shape, count)
        weights = self.backend.pack(program, _RandomWeights(program), plan, None)
        self.executable: CpuExecutable = self.backend.compile(program, weights, plan, "cpu")
        self.blocks = -(-context // plan.block_size)
        self.executable.allocate_state([self.blocks])

    def step(
        self, tokens: int, starts: Sequence[int], contexts: Sequence[int], table: object
    ) -> float:
        """Runs a step; seconds of attention and state writes."""
        sequences = len(contexts)
        lengths = np.diff(starts)
        nothing = Ragged(np.zeros(0, np.int32), np.zeros(2, np.int32))
        batch = Batch(
            tokens=np.arange(tokens, dtype=np.int32) * 7 % VOCAB,
            positions=np.concatenate(
                [
                    np.arange(c, c + n, dtype=np.int32)
                    for c, n in zip(contexts, lengths, strict=True)
                ]
            ),
            starts=np.asarray(starts, np.int32),
            contexts=np.asarray(contexts, np.int32),
            block_tables=(np.asarray(table, np.int32).reshape(sequences, -1),),
            rope_lengths=np.zeros(sequences, np.int32),
            output_rows=np.array([tokens - 1], np.int32),
            sampling=np.zeros(1, SAMPLING_ROW),
            history=nothing,
            bias_tokens=nothing,
            bias_values=Ragged(np.zeros(0, np.float32), nothing.starts),
        )
        self.executable.profile(True)
        self.executable.collect(self.executable.submit(batch))
        times = self.executable.seconds()
        return sum(seconds for name, seconds in times if name.startswith(STATE))

    def fill(self) -> None:
        """Writes every block: as many sequences of one block, which is cheap."""
        size = self.plan.block_size
        for first in range(0, self.blocks, CHUNK // size):
            blocks = np.arange(first, min(self.blocks, first + CHUNK // size), dtype=np.int32)
            starts = np.arange(len(blocks) + 1) * size
            self.step(len(blocks) * size, starts.tolist(), [0] * len(blocks), blocks)

    def decode(self, context: int) -> float:
        return self.step(1, [0, 1], [context], np.arange(self.blocks))

    def prefill(self, prompt: int) -> float:
        return sum(
            self.step(n, [0, n], [c], np.arange(self.blocks))
            for c, n in ((c, min(CHUNK, prompt - c)) for c in range(0, prompt, CHUNK))
        )

    def ceilings(self) -> tuple[float, float, float]:
        """Bytes, int8 operations and float32 operations a second."""
        used = self.executable.plan
        found = self.backend.ceilings("cpu", 0.05, threads=used.threads, isa=used.isa)
        return found.read_bytes_per_s, found.int8.ops_per_s, found.fp32.ops_per_s


def measure_decode(
    shape: Shape, contexts: Sequence[int], plans: Sequence[ExecutionPlan], rounds: int
) -> list[list[Decode]]:
    """Of each plan by context; the plans take turns."""
    benches = [Bench(shape, shape.layers, max(contexts) + 1, plan) for plan in plans]
    times: list[dict[int, list[float]]] = [{c: [] for c in (32, *contexts)} for _ in plans]
    reads = []
    for bench in benches:
        bench.fill()
    for _ in range(rounds):
        reads.append(benches[0].ceilings()[0])
        for context in (32, *contexts):
            for bench, taken in zip(benches, times, strict=True):
                taken[context].append(bench.decode(context))
    bandwidth = statistics.median(reads)
    found = []
    for plan, taken in zip(plans, times, strict=True):
        token_bytes = 2 * shape.layers * shape.kv_heads * vector_bytes(plan.kv, shape.head_dim)
        start = statistics.median(taken[32])
        found.append(
            [
                Decode(
                    context,
                    token_bytes * context,
                    statistics.median(taken[context]) - start,
                    token_bytes * context / bandwidth,
                )
                for context in contexts
            ]
        )
    return found


def measure_prefill(
    shape: Shape, prompt: int, count: int, plans: Sequence[ExecutionPlan], rounds: int
) -> list[Prefill]:
    """Of each plan; the plans take turns."""
    benches = [Bench(shape, count, prompt, plan) for plan in plans]
    peaks, times = [], []
    for _ in range(rounds):
        peaks.append(benches[0].ceilings())
        times.append([bench.prefill(prompt) for bench in benches])
    operations = 4 * shape.head_dim * shape.heads * count * prompt * (prompt + 1) / 2
    _, int8, fp32 = (statistics.median(of) for of in zip(*peaks, strict=True))
    return [
        Prefill(prompt, count, operations, statistics.median(own), fp32, int8 / 2)
        for own in zip(*times, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-1.5b")
    parser.add_argument("--contexts", default="4096,16384", help="tokens before the one decoded")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens; 0 for no prefill")
    parser.add_argument("--prefill-layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--kv", default="bf16,int8", help="storage of the state; some take turns")
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    kinds = options.kv.split(",")
    plans = [
        ExecutionPlan(backend="cpu", device="cpu", activation="fp32").replace(
            isa=options.isa, kv=kv, threads=options.threads
        )
        for kv in kinds
    ]
    isa = _native.usable_paths()[0] if options.isa == "auto" else options.isa
    print(f"{options.shape}, {isa}, {options.threads or 'all'} threads")
    contexts = [int(c) for c in options.contexts.split(",") if c]
    decoded = measure_decode(shape, contexts, plans, options.rounds) if contexts else []
    for kv, of_contexts in zip(kinds, decoded, strict=bool(contexts)):
        for d in of_contexts:
            print(
                f"{kv}, decode at {d.context}: {shape.layers} layers, {d.kv_bytes / 1e6:.0f} MB of "
                f"state; adds {d.added * 1e3:.2f} ms, reading takes {d.read * 1e3:.2f} ms at "
                f"{d.kv_bytes / d.read / 1e9:.1f} GB/s: {d.over:+.0%}"
            )
    prefilled = []
    if options.prompt:
        rounds = max(2, options.rounds // 3)
        prefilled = measure_prefill(shape, options.prompt, options.prefill_layers, plans, rounds)
    for kv, p in zip(kinds, prefilled, strict=bool(prefilled)):
        rate = p.operations / p.seconds
        print(
            f"{kv}, prefill of {p.prompt}: {p.layers} layers, {rate / 1e9:.0f} GFLOP/s; "
            f"{rate / p.fp32_peak:.0%} of the float32 peak ({p.fp32_peak / 1e9:.0f}), "
            f"{rate / p.bf16_peak:.0%} of half the int8 peak ({p.bf16_peak / 1e9:.0f})"
        )
    if options.json:
        found = {"shape": options.shape, "isa": isa, "kv": kinds}
        found |= {"decode": [[asdict(d) for d in of] for of in decoded]}
        found |= {"prefill": [asdict(p) for p in prefilled]}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
