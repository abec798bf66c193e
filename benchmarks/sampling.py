"""What it costs the CPU to choose a token, in milliseconds a row on one core.

Above the times stands a floor: the bytes of the row, read once at the speed at which one core
streams memory. The rows are sampled in turns and together do not fit the core's own cache, so a
row comes from further away, as it does after the step that made it. Where that is a cache that
the cores share, a time may be below the floor.

    python benchmarks/sampling.py [--vocab 49152,151936,262144] [--isa PATH] [--rounds N]

Times are of the thread's own clock, the least of the rounds: what else the machine does is not
in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sartor import SamplingParams
from sartor.backends.cpu import _native
from sartor.backends.registry import load_backend
from sartor.graph.batch import F32, Ragged

ROWS = 8
PROMPT = 0.75
"""Share of a history that is prompt."""


@dataclass(frozen=True)
class Case:
    """``shape``: peaked (a power law: 12 of 262,144 tokens have 95 %) or flat (194,000 have)."""

    name: str
    params: SamplingParams
    shape: str = "peaked"
    history: int = 0


PLAIN = SamplingParams(temperature=1, top_p=1)
PENALTIES = replace(PLAIN, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1)
TOGETHER = SamplingParams(
    temperature=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
)
CASES = (
    Case("all together, history 1,000", TOGETHER, history=1000),
    Case("all together, history 1,000, flat", TOGETHER, "flat", 1000),
    Case("greedy", SamplingParams(temperature=0)),
    Case("temperature 0.8", replace(PLAIN, temperature=0.8)),
    Case("temperature 0.8, flat", replace(PLAIN, temperature=0.8), "flat"),
    Case("top-p 0.95", replace(PLAIN, top_p=0.95)),
    Case("top-p 0.95, flat", replace(PLAIN, top_p=0.95), "flat"),
    Case("top-k 40", replace(PLAIN, top_k=40)),
    Case("top-k 40, flat", replace(PLAIN, top_k=40), "flat"),
    Case("min-p 0.05", replace(PLAIN, min_p=0.05)),
    Case("greedy, logprobs 20", SamplingParams(temperature=0, logprobs=20)),
    Case("penalties, history 1,000", PENALTIES, history=1000),
    Case("penalties, history 100,000", PENALTIES, history=100_000),
)


@dataclass(frozen=True)
class Rows:
    """The arguments of the native sampler for one case."""

    logits: F32
    sampling: bytes = field(repr=False)
    history: Ragged


def make_rows(case: Case, vocab: int, rows: int = ROWS) -> Rows:
    """Random logits ``[rows, vocab]`` and histories of words as frequent as in a text."""
    rng = np.random.default_rng(1)
    law = -2.0 * np.log(np.arange(vocab) + 1.0)
    shapes = (
        [rng.permutation(law) if case.shape == "peaked" else rng.standard_normal(vocab)]
        for _ in range(rows)
    )
    logits = np.concatenate([np.asarray(shape, np.float32) for shape in shapes])
    words = rng.permutation(vocab)
    histories = [
        words[np.minimum(rng.zipf(1.1, case.history) - 1, vocab - 1)].astype(np.int32)
        for _ in range(rows)
    ]
    sampling = np.concatenate(
        [
            case.params.row(seed=r, choice=0, prompt_length=int(case.history * PROMPT))
            for r in range(rows)
        ]
    )
    return Rows(logits, sampling.tobytes(), Ragged.of(list(histories), np.int32))


def milliseconds(rows: Rows, isa: str, rounds: int) -> float:
    """Of one row: the mean of the rows, of each the least of the rounds."""
    sampler = _native.Sampler(isa)
    count = len(rows.logits)
    none, starts = np.zeros(0, np.int32), np.zeros(count + 1, np.int32)
    sampling = np.frombuffer(rows.sampling, np.uint8)
    _, seconds = sampler.run(
        rows.logits,
        sampling,
        rows.history.values,
        rows.history.starts,
        none,
        starts,
        np.zeros(0, np.float32),
        rounds,
    )
    return float(seconds.mean()) * 1000


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--vocab", type=counts, default=[49152, 151936, 262144], help="sizes, by commas"
    )
    parser.add_argument("--isa", choices=_native.usable_paths(), help="instruction-set path")
    parser.add_argument("--rounds", type=count, default=20, help="of each case")
    options = parser.parse_args(arguments)
    vocabularies = options.vocab
    isa = options.isa or _native.usable_paths()[0]
    bandwidth = load_backend("cpu").ceilings("cpu", threads=1, isa=isa).read_bytes_per_s
    print(f"path {isa}; one core reads {bandwidth / 1e9:.1f} GB/s; milliseconds a row")
    print(f"{'':36}" + "".join(f"{size:>10,}" for size in vocabularies))
    floors = [size * 4 / bandwidth * 1000 for size in vocabularies]
    print(f"{'floor: the row read once':36}" + "".join(f"{floor:10.3f}" for floor in floors))
    for case in CASES:
        times = (milliseconds(make_rows(case, size), isa, options.rounds) for size in vocabularies)
        print(f"{case.name:36}" + "".join(f"{time:10.3f}" for time in times), flush=True)


if __name__ == "__main__":
    main()
