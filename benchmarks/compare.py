"""Measures Sartor beside other engines: the same weights, prompts and threads, in turns.

    python benchmarks/compare.py MODEL.gguf [--install] [--write docs/performance.md]

The peers are those of peers.py; --install installs what is missing first. A peer that is not
installed, or fails, is reported with the reason. Exit code 1 where nothing could be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from engines import DRIVERS, Engine, EngineError, EngineProcess
from make_models import write_folder
from peers import Peer, choose_peers, default_environments, install, interpreter
from results import OWN, Comparison, Limits, where_and_when, write_section
from rounds import Prompts, Workload, run_rounds

from sartor.bench import phases
from sartor.bench.ceiling import PhaseWork
from sartor.engine.load import load_text
from sartor.errors import SartorError, UsageError
from sartor.evaluation import run_evaluation
from sartor.formats import open_checkpoint
from sartor.hardware import Ceilings, Peak, available_cores
from sartor.models import load_model
from sartor.plan import ExecutionPlan
from sartor.store import sartor_home

CEILING_SECONDS = 0.5
"""Of each loop that looks for a ceiling."""

FIXED = ("threads", "prefix_cache", "max_sequences", "max_batch_tokens", "max_context")
"""Fields of the plan that drivers/run_sartor.py sets."""


@dataclass(frozen=True)
class Options:
    """``peers`` by name, none for all; ``title`` of the model in the table; ``plan``: fields of
    Sartor's execution plan that are not as usual."""

    model: Path
    title: str
    plan: Mapping[str, object]
    peers: tuple[str, ...]
    rounds: int
    batches: tuple[int, ...]
    threads: int
    timeout: float
    environments: Path
    install: bool
    json: Path | None
    write: Path | None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_prompts(model: Path) -> Prompts:
    """The prompts of ``sartor bench`` for this model."""
    checkpoint = open_checkpoint(model)
    tokenizer, _ = load_text(checkpoint)
    special = tokenizer.special_ids | tokenizer.eos_ids
    vocab = min(load_model(checkpoint).program.vocab, tokenizer.vocab_size)

    @functools.lru_cache(maxsize=256)
    def prompt(seed: int, length: int) -> Sequence[int]:
        return phases.synthetic_prompt(seed, length, vocab, special)

    return prompt


def folder_of(model: Path, environments: Path) -> Path:
    """The bf16 folder of the same weights, made at its first use."""
    status = model.stat()
    name = f"{model.stem}-{status.st_size}-{status.st_mtime_ns}"
    folder = environments / "folders" / name
    if not folder.exists():
        say(f"writing {model.name} as a bf16 folder ...")
        write_folder(model, folder, environments)
    return folder


def start_peer(peer: Peer, options: Options) -> EngineProcess:
    """The process of a peer; SartorError where it cannot be started."""
    python = interpreter(options.environments, peer)
    if python is None and options.install:
        say(f"installing {peer.name} ...")
        python = install(peer, options.environments)
    if python is None:
        raise SartorError(f"not installed; run python benchmarks/peers.py install {peer.name}")
    return start_driver(peer.name, python, options)


def start_driver(name: str, python: Path, options: Options) -> EngineProcess:
    log = options.environments / "logs" / f"{name}.log"
    command = [str(python), str(DRIVERS / f"run_{name}.py")]
    # Libraries that take every core they see would not be measured on the same threads.
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    return EngineProcess(command, log, options.timeout, threads)


def load(engine: EngineProcess, folder: str, options: Options, **fields: object) -> dict[str, Any]:
    return engine.ask(
        "load",
        model=str(options.model.absolute()),
        folder=folder,
        threads=options.threads,
        sequences=max(options.batches, default=1),
        context=phases.CONTEXT,
        **fields,
    )


def compare(options: Options) -> Comparison:
    """Starts the engines, measures in turns, and ends them."""
    prompts = make_prompts(options.model)
    engines: dict[str, EngineProcess] = {}
    facts: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        say("loading sartor ...")
        own = stack.enter_context(start_driver(OWN, Path(sys.executable), options))
        engines[OWN] = own
        facts[OWN] = {"title": "Sartor", **load(own, "", options, plan=options.plan)}
        for peer in choose_peers(options.peers):
            say(f"loading {peer.name} ...")
            try:
                engine = stack.enter_context(start_peer(peer, options))
                folder = str(folder_of(options.model, options.environments)) if peer.folder else ""
                facts[peer.name] = {"title": peer.title, **load(engine, folder, options)}
                engines[peer.name] = engine
            except SartorError as error:
                missing[peer.name] = str(error)
                say(f"{peer.name}: {error}")
        before = ceilings(own)
        samples = run_rounds(
            engines,
            [Workload(size) for size in (0, *options.batches)],
            options.rounds,
            prompts,
            tell=say,
        )
        limits = find_limits(own, options.batches, [before, ceilings(own)])
    told = describe(options, facts[OWN]) | quality(options)
    return Comparison(options.title, told, facts, missing, samples, limits)


def ceilings(own: Engine) -> Ceilings | None:
    try:
        return msgspec.convert(own.ask("ceilings", seconds=CEILING_SECONDS), Ceilings)
    except EngineError as error:
        say(f"no ceilings: {error}")
        return None


def find_limits(
    own: Engine, batches: Sequence[int], measured: Sequence[Ceilings | None]
) -> Limits | None:
    """The better of several measurements; None where there are none."""
    usable = [found for found in measured if found is not None]
    if not usable:
        return None
    work = msgspec.convert(own.ask("work", batches=list(batches)), dict[str, PhaseWork])
    best = dataclasses.replace(
        usable[0],
        read_bytes_per_s=max(found.read_bytes_per_s for found in usable),
        int8=max((found.int8 for found in usable), key=_speed),
        fp32=max((found.fp32 for found in usable), key=_speed),
        bf16=max((found.bf16 for found in usable if found.bf16), key=_speed, default=None),
    )
    return Limits(best, work)


def _speed(peak: Peak) -> float:
    return peak.ops_per_s


def describe(options: Options, own: Mapping[str, Any]) -> dict[str, Any]:
    size = options.model.stat().st_size
    return {
        **where_and_when(),
        "python": platform.python_version(),
        "file": f"{options.model.name}, {size / 1e6:.1f} MB",
        "bits_per_weight": round(own["bits_per_weight"], 3),
        "threads": options.threads,
        "rounds": options.rounds,
    }


def quality(options: Options) -> dict[str, Any]:
    """How far Sartor's answers are from float32 on the same file, where the plan may move them."""
    if not options.plan:
        return {}
    say("measuring the quality of Sartor's answers ...")
    model, usual = options.model, ExecutionPlan(threads=options.threads)
    found: dict[str, Any] = {}
    for name, plan in (("mean_kl", usual.replace(**options.plan)), ("usual_mean_kl", usual)):
        try:
            report = run_evaluation(
                model, options.title, plan, reference=model, cache=sartor_home() / "packed"
            )
        except SartorError as error:
            say(f"no quality: {error}")
            return {}
        found[name] = float(f"{report.mean_kl:.3g}")
    return found


def save(comparison: Comparison, options: Options) -> None:
    """Writes what was asked for; the table goes to standard output in any case."""
    section = comparison.to_markdown()
    if options.json is not None:
        text = json.dumps(comparison.to_json_dict(), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.write is not None:
        write_section(options.write, section)
    print(section, end="")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line; UsageError for values that mean nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--title", help="of the model in the table; else the file's name")
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of Sartor's execution plan, as head_bits=4 (may be repeated)",
    )
    parser.add_argument("--peers", default="", help="names with commas between; else all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="4,16,32", help="sequences that decode at once")
    parser.add_argument("--threads", type=int, default=min(2, available_cores()))
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one answer")
    parser.add_argument("--environments", type=Path, default=default_environments())
    parser.add_argument("--install", action="store_true", help="install missing peers first")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a section of this document")
    found = parser.parse_args(arguments)
    names = tuple(name.strip() for name in found.peers.split(",") if name.strip())
    choose_peers(names)
    try:
        batches = tuple(sorted({int(size) for size in found.batches.split(",") if size.strip()}))
    except ValueError:
        raise UsageError(f"--batches {found.batches} is no list of numbers, as 4,16") from None
    if found.rounds < 1 or found.threads < 1 or any(size < 1 for size in batches):
        raise UsageError("rounds, threads and batches must be at least 1")
    if not found.model.is_file():
        raise UsageError(f"{found.model} is no file; name a .gguf file")
    plan = plan_fields(found.plan)
    return Options(
        found.model,
        found.title or ", ".join([found.model.stem, *found.plan]),
        plan,
        names,
        found.rounds,
        batches,
        found.threads,
        found.timeout,
        found.environments,
        found.install,
        found.json,
        found.write,
    )


def plan_fields(given: Sequence[str]) -> dict[str, object]:
    """Fields of the plan from FIELD=VALUE; UsageError for what it or this comparison forbids."""
    fields: dict[str, object] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name in FIXED:
            raise UsageError(f"--plan {text}: the comparison sets {name}, the same for all engines")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    ExecutionPlan().replace(**fields)
    return fields


def main() -> int:
    try:
        options = parse()
        save(compare(options), options)
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
