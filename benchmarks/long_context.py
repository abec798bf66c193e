"""Memory and time of long prompts, beside what they have to take.

A small decoder with random weights (4 layers, 8 query heads on 2 kv heads of 64) reads prompts of
random tokens, each length in a fresh process, and decodes behind them.

    python benchmarks/long_context.py [--lengths 1k,2k,4k,8k,16k,32k,64k,128k] [--steps 16]
                                      [--kv int8] [--threads 2] [--json FILE]

- state: the blocks that the sequence held, and what its keys and values alone take
- peak: the largest resident set, less that after a short prompt, over those keys and values: what
  grows with the length beside the state
- scratch: buffers of the native core, whatever they hold
- prefill: seconds to the first token, and where they went: attention, the rest of the core, the
  host's own work (decode steps included in the last two, which are few)
- least: attention's operations at half the int8 peak (each code is multiplied by 16 bits), all else
  at the int8 peak, which is measured in the same process
- decode: one step behind the prompt, and reading the state at the measured bandwidth
- again: the same prompt once more, whose state is in the cache
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from make_models import SHAPES, Shape, write_random

from sartor.ops.kv import vector_bytes

_PROCESS = Path(__file__).with_name("long_context_process.py")
SHAPE = "long"
COLUMNS = (
    "tokens",
    "state MB (keys and values)",
    "peak over rest MB (share)",
    "scratch MB",
    "prefill s = attention + rest + host",
    "least s",
    "tokens/s",
    "decode ms (reading)",
    "again ms",
)


@dataclass(frozen=True)
class Figures:
    """What one process has measured: bytes, seconds, operations and operations a second."""

    tokens: int
    isa: str
    threads: int
    state_bytes: int
    scratch_bytes: int
    rest_bytes: int
    peak_bytes: int
    prefill_seconds: float
    decode_seconds: float
    again_seconds: float
    attention_seconds: float
    core_seconds: float
    host_seconds: float
    attention_operations: float
    other_operations: float
    int8_peak: float
    bandwidth: float

    @property
    def least_seconds(self) -> float:
        """Of the prompt, at the measured peak."""
        return (2 * self.attention_operations + self.other_operations) / self.int8_peak

    def cells(self, kv_bytes: int) -> list[str]:
        """A row of the table, given the bytes of the prompt's keys and values."""
        mega = 1e-6
        over = self.peak_bytes - self.rest_bytes
        rest = self.core_seconds - self.attention_seconds
        return [
            f"{self.tokens:,}",
            f"{self.state_bytes * mega:.1f} ({kv_bytes * mega:.1f})",
            f"{over * mega:.1f} ({over / kv_bytes:.2f})",
            f"{self.scratch_bytes * mega:.1f}",
            f"{self.prefill_seconds:.2f} = {self.attention_seconds:.2f} + {rest:.2f} + "
            f"{self.host_seconds:.2f}",
            f"{self.least_seconds:.2f}",
            f"{self.tokens / self.prefill_seconds:,.0f}",
            f"{self.decode_seconds * 1e3:.2f} ({kv_bytes / self.bandwidth * 1e3:.2f})",
            f"{self.again_seconds * 1e3:.1f}",
        ]


def kv_bytes(shape: Shape, kv: str, tokens: int) -> int:
    """Of all keys and values of a prompt."""
    head = shape.hidden // shape.heads
    return tokens * shape.layers * 2 * shape.kv_heads * vector_bytes(kv, head)


def measure(
    model: Path, lengths: Sequence[int], steps: int, kv: str, threads: int
) -> Iterator[Figures]:
    """Each length in a process of its own; subprocess.CalledProcessError where one failed."""
    for tokens in lengths:
        command = [sys.executable, _PROCESS, model, str(tokens), str(steps), kv, str(threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield Figures(**json.loads(done.stdout.splitlines()[-1]))


def _length(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", default="1k,2k,4k,8k,16k,32k,64k,128k", help="of prompts")
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode behind each")
    parser.add_argument("--kv", default="int8", help="storage of keys and values")
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    shape = SHAPES[SHAPE]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"{SHAPE}.gguf"
        write_random(shape, model)
        lengths = [_length(text) for text in options.lengths.split(",")]
        for row in measure(model, lengths, options.steps, options.kv, options.threads):
            if not found:
                peak, read = row.int8_peak * 1e-12, row.bandwidth * 1e-9
                print(
                    f"{shape.layers} layers, {shape.heads} heads on {shape.kv_heads}, "
                    f"{options.kv} state, {row.isa}, {row.threads} threads, "
                    f"{peak:.2f} int8 TOPS, {read:.1f} GB/s\n"
                )
                print("| " + " | ".join(COLUMNS) + " |")
                print("|" + " --- |" * len(COLUMNS))
            found.append(row)
            cells = row.cells(kv_bytes(shape, options.kv, row.tokens))
            print("| " + " | ".join(cells) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
