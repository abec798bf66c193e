"""How fast a model starts, what it needs in memory, and how much of a step is host work.

Everything is measured in fresh processes on a packed model whose files are in the page cache, and
medians are shown; the first start, which packs, is shown apart. Packages have their byte code, as
after an installation.

    python benchmarks/startup.py MODEL.gguf [--runs 7] [--prompt TEXT] [--json FILE]

- load: from ``LLM(model)`` to an engine that takes requests; what it imports was imported before
- ready: from the start of the process to the same
- first token: ``sartor run MODEL PROMPT`` from the start of the process to the first byte of the
  answer on standard output
- peak memory: the largest resident set after a short answer, and what of it is neither packed
  weights nor state that was written. Weights are mapped from their file and count as resident
  where they were read; anonymous and file-backed pages are those at the end
- host work: a decode step of one sequence, less the time inside the native core
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

_PROCESS = Path(__file__).with_name("startup_process.py")


@dataclass(frozen=True)
class Startup:
    """Seconds and bytes; see the module's description. None where the system does not say."""

    model: str
    first_start_seconds: float
    first_start_peak_bytes: int
    load_seconds: float
    ready_seconds: float
    first_token_seconds: float
    weights_bytes: int
    state_bytes: int
    peak_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None
    step_seconds: float
    host_seconds: float

    @property
    def overhead_bytes(self) -> int:
        """Peak memory that is neither packed weights nor written state."""
        return self.peak_bytes - self.weights_bytes - self.state_bytes

    def lines(self) -> list[str]:
        """What is shown to people."""
        mega = 1e-6
        pages = ""
        if self.anonymous_bytes is not None and self.file_bytes is not None:
            pages = (
                f"; at the end {self.anonymous_bytes * mega:.0f} MB anonymous, "
                f"{self.file_bytes * mega:.0f} MB of files"
            )
        first_overhead = self.first_start_peak_bytes - self.weights_bytes - self.state_bytes
        return [
            f"model        {self.model}",
            f"load         {self.load_seconds * 1e3:.0f} ms",
            f"ready        {self.ready_seconds * 1e3:.0f} ms from the start of the process",
            f"first token  {self.first_token_seconds * 1e3:.0f} ms from the start of the process",
            f"peak memory  {self.peak_bytes * mega:.0f} MB = {self.weights_bytes * mega:.0f} MB "
            f"weights + {self.state_bytes * mega:.0f} MB state + "
            f"{self.overhead_bytes * mega:.0f} MB{pages}",
            f"host work    {self.host_seconds * 1e6:.0f} us of a step of "
            f"{self.step_seconds * 1e3:.2f} ms: {self.host_seconds / self.step_seconds:.1%}",
            f"first start  load {self.first_start_seconds * 1e3:.0f} ms, peak memory "
            f"{self.first_start_peak_bytes * mega:.0f} MB: {first_overhead * mega:.0f} MB over "
            "weights and state",
        ]


def measure(model: Path, runs: int, prompt: str) -> Startup:
    """Measures in a store of its own; subprocess.CalledProcessError where a process failed."""
    with tempfile.TemporaryDirectory() as home:
        # Byte code is written once, and read from then on: an installed program has it.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["SARTOR_HOME"] = home
        path = str(model.resolve())
        seconds, figures = _run(environment, path, "answer", prompt)
        first_start, packed = float(seconds), json.loads(figures)
        modules = _run(environment, path, "modules")[1].split()
        _first_byte(environment, *_cli(path, prompt))
        loads, readies, tokens, answers = [], [], [], []
        for _ in range(runs):
            loads.append(float(_run(environment, path, "after", *modules)[0]))
            readies.append(_first_byte(environment, str(_PROCESS), path))
            tokens.append(_first_byte(environment, *_cli(path, prompt)))
            answers.append(json.loads(_run(environment, path, "answer", prompt)[1]))
    middle = {key: median(answer[key] for answer in answers) for key in ("peak", "step", "host")}
    last = answers[-1]
    return Startup(
        model=model.name,
        first_start_seconds=first_start,
        first_start_peak_bytes=packed["peak"],
        load_seconds=median(loads),
        ready_seconds=median(readies),
        first_token_seconds=median(tokens),
        weights_bytes=last["weights"],
        state_bytes=last["state"],
        peak_bytes=int(middle["peak"]),
        anonymous_bytes=last["anonymous"],
        file_bytes=last["file"],
        step_seconds=middle["step"],
        host_seconds=middle["host"],
    )


def _run(environment: Mapping[str, str], *arguments: str) -> list[str]:
    """The lines that a process of ``startup_process.py`` prints."""
    command = [sys.executable, str(_PROCESS), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def _cli(model: str, prompt: str) -> list[str]:
    options = ["--max-tokens", "4", "--temperature", "0"]
    return ["-m", "sartor.cli.main", "run", model, prompt, *options]


def _first_byte(environment: Mapping[str, str], *arguments: str) -> float:
    """Seconds from the start of a Python process to the first byte that it writes."""
    command = [sys.executable, *arguments]
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not byte:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--runs", type=int, default=7, help="fresh processes of each kind")
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    found = measure(options.model, options.runs, options.prompt)
    print("\n".join(found.lines()))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
