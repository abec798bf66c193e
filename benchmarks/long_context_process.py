"""One fresh process of ``long_context.py``: reads a prompt, goes on from it, prints figures.

    python long_context_process.py MODEL TOKENS STEPS KV THREADS

The prompt is random tokens. It is given twice: the second time its state is in the cache, and what
is left is to find that, beside one step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import psutil

from sartor.backends.cpu.backend import CpuBackend, CpuExecutable
from sartor.bench.memory import peak_rss_bytes
from sartor.engine.engine import Engine
from sartor.engine.load import load, make_engine
from sartor.engine.request import Request
from sartor.graph import SamplingParams, StepShape
from sartor.plan import ExecutionPlan

ATTENTION = ("attention", "latent_attention")


def run(
    engine: Engine, name: str, prompt: tuple[int, ...], steps: int
) -> tuple[float, list[float]]:
    """Seconds to the first token, and of each step after it."""
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    started = time.perf_counter()
    engine.add(Request(name, prompt, params, seed=0, want_text=False))
    times: list[float] = []
    while engine.has_work:
        if engine.step():
            times.append(time.perf_counter())
    return times[0] - started, np.diff(times).tolist()


def main(path: Path, tokens: int, steps: int, kv: str, threads: int) -> None:
    plan = ExecutionPlan(backend="cpu").replace(
        kv=kv, threads=threads, max_sequences=1, max_context=tokens + steps + 1
    )
    loaded = load(path, plan, path.name, path.parent / "packed")
    engine = make_engine(loaded)
    executable = cast(CpuExecutable, loaded.executable)
    rng = np.random.default_rng(1)
    vocab = executable.program.vocab
    run(engine, "warm", tuple(rng.integers(0, vocab, min(512, tokens)).tolist()), 2)
    rest = psutil.Process().memory_info().rss
    prompt = tuple(rng.integers(0, vocab, tokens).tolist())
    first = len(engine.records)
    executable.profile(True)
    prefill, decodes = run(engine, "long", prompt, steps)
    seconds = executable.seconds()
    executable.profile(False)
    records = list(engine.records)[first:]
    held = [max(of) for of in zip(*(record.blocks_held for record in records), strict=True)]
    kinds = {node.name: node.op for node in executable._fused.nodes}
    shape = StepShape(lengths=(tokens,), contexts=(0,), outputs=1)
    counted = executable.work()
    operations = {True: 0.0, False: 0.0}  # of attention, and of all else
    for node in executable._fused.nodes:
        operations[node.op in ATTENTION] += sum(counted.node(node, shape).operations.values())
    in_attention = sum(taken for name, taken in seconds if kinds[name] in ATTENTION)
    again, _ = run(engine, "again", prompt, 1)
    peak = peak_rss_bytes()
    ceilings = CpuBackend().ceilings(
        "cpu", 0.2, threads=executable.plan.threads, isa=executable.plan.isa
    )
    figures = {
        "tokens": tokens,
        "isa": executable.plan.isa,
        "threads": executable.plan.threads,
        "state_bytes": sum(n * executable.block_bytes(g) for g, n in enumerate(held)),
        "scratch_bytes": executable.memory().scratch,
        "rest_bytes": rest,
        "peak_bytes": peak,
        "prefill_seconds": prefill,
        "decode_seconds": median(decodes),
        "again_seconds": again,
        "attention_seconds": in_attention,
        "core_seconds": sum(taken for _, taken in seconds),
        "host_seconds": sum(record.host_seconds for record in records),
        "attention_operations": operations[True],
        "other_operations": operations[False],
        "int8_peak": ceilings.int8.ops_per_s,
        "bandwidth": ceilings.read_bytes_per_s,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    model, *numbers, kind, count = sys.argv[1:]
    main(Path(model), int(numbers[0]), int(numbers[1]), kind, int(count))
