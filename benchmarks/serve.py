"""Measures ``sartor serve`` under load, beside other servers: the same requests, in turns.

    python benchmarks/serve.py MODEL.gguf [--parts streams,serial,first,bursts] [--write FILE]

- streams: 16 clients, 128 tokens in, 64 out, against llama-server and vLLM; and the processor
  time of the gateway a token
- serial: 32 clients, against a loop over transformers that takes one request after another
- first: seconds to the first token over HTTP, less those of the engine in a process of its own
- bursts: 200 and 500 requests at once, with the memory that they take

Every round has prompts that no round had before. Peers are made by peers.py and llama_server.py;
one that is missing or fails is named with the reason. Exit code 1 where Sartor gave an error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from engines import DRIVERS, EngineProcess
from load import Target, run_round
from load_report import Objective, Report, Round
from peers import default_environments
from results import OWN, write_section
from rounds import PAUSE, turns
from serve_results import Burst, Findings, FirstToken, Row
from servers import SERVERS, RunningServer, Setting, exit_on_sigterm
from traffic import Lengths, Prompts, Traffic, plan_calls

from sartor.errors import SartorError, UsageError
from sartor.hardware import available_cores

PARTS = ("streams", "serial", "first", "bursts")
INPUT, OUTPUT = 128, 64
STREAMS, SERIAL_STREAMS = 16, 32
FIRST_INPUT, FIRST_OUTPUT = 32, 4
BURSTS = (200, 500)
CONTEXT = 512
SERIAL_REQUESTS = 4
"""Of a server that takes one after another: its rate is the same for 4 as for 400."""


@dataclass(frozen=True)
class Options:
    model: Path
    parts: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    requests: int
    first: int
    bursts: tuple[int, ...]
    threads: int
    seed: int
    own: tuple[str, ...]
    variants: dict[str, list[str]]
    environments: Path
    json: Path | None
    write: Path | None

    def setting(self, sequences: int, options: Sequence[str]) -> Setting:
        return Setting(self.model, self.threads, sequences, CONTEXT, self.environments, options)

    def named(self, peers: Sequence[str]) -> list[str]:
        """Sartor, and each variant of the peers: "llama_server", or "llama_server -fa on"."""
        found = [f"{peer} {text}" for peer in peers for text in self.variants.get(peer, [""])]
        return [OWN, *(name.strip() for name in found)]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def traffic(streams: int, requests: int) -> Traffic:
    lengths = Lengths("fixed", INPUT), Lengths("fixed", OUTPUT)
    return Traffic(requests, *lengths, streams=streams)


def target(server: RunningServer) -> Target:
    return Target(server.url, server.launch.model, "completions", timeout=1800)


@contextlib.contextmanager
def running(
    names: Sequence[str], sequences: int, options: Options, findings: Findings
) -> Iterator[dict[str, RunningServer]]:
    """The servers that could be started, by name with variant; Sartor must be."""
    found: dict[str, RunningServer] = {}
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(names):
            say(f"starting {name} ...")
            server, *more = name.split()
            setting = options.setting(sequences, options.own if name == OWN else more)
            log = options.environments / "logs" / f"serve_{number}_{server}.log"
            try:
                found[name] = stack.enter_context(RunningServer(server, setting, log))
            except SartorError as error:
                if name == OWN:
                    raise
                findings.missing[name] = str(error)
                say(f"{name}: {error}")
                continue
            launch = found[name].launch
            findings.servers[name] = (launch.title, launch.settings)
        yield found


def measure_row(
    row: Row,
    servers: dict[str, RunningServer],
    prompts: Prompts,
    options: Options,
    findings: Findings,
) -> None:
    """All servers in turn, while the others sleep, each round another one first; the round before
    the first is short and does not count. A server that gives no tokens is left out."""
    for number, names in zip(range(options.rounds + 1), turns(list(servers)), strict=False):
        for name in names:
            if name in findings.missing:
                continue
            wanted = row.traffic[name]
            if number == 0:
                wanted = dataclasses.replace(wanted, requests=min(wanted.requests, row.streams))
            calls = plan_calls(wanted, prompts, [options.seed, row.streams, number])
            server = servers[name]
            with contextlib.ExitStack() as others:
                for other in servers.values():
                    if other is not server:
                        others.enter_context(other.asleep())
                time.sleep(PAUSE)
                before = server.processor_seconds()
                found = asyncio.run(run_round(target(server), calls, wanted.streams))
                after = server.processor_seconds()
            if found.tokens == 0:
                reason = f"no answers: {', '.join(Report([found], Objective()).errors())}"
                if name == OWN:
                    raise SartorError(reason)
                findings.missing[name] = reason
                row.drop(name)
                continue
            if number == 0:
                continue
            used = {role: after[role] - before[role] for role in after}
            row.add(name, found, used)
            say(f"{row.title}: round {number}, {name}: {found.tokens_per_s:.1f} tokens a second")


def measure_streams(findings: Findings, prompts: Prompts, options: Options) -> None:
    names = options.named([peer for peer in options.peers if peer != "transformers"])
    with running(names, STREAMS, options, findings) as servers:
        wanted = traffic(STREAMS, STREAMS * options.requests)
        row = Row(f"{STREAMS} streams", STREAMS, dict.fromkeys(servers, wanted))
        findings.rows.append(row)
        measure_row(row, servers, prompts, options, findings)


def measure_serial(findings: Findings, prompts: Prompts, options: Options) -> None:
    names = options.named([peer for peer in options.peers if peer == "transformers"])
    with running(names, SERIAL_STREAMS, options, findings) as servers:
        wanted = traffic(SERIAL_STREAMS, SERIAL_STREAMS * options.requests)
        few = dataclasses.replace(wanted, requests=SERIAL_REQUESTS)
        by_name = {name: wanted if name == OWN else few for name in servers}
        row = Row(f"{SERIAL_STREAMS} streams", SERIAL_STREAMS, by_name)
        findings.rows.append(row)
        measure_row(row, servers, prompts, options, findings)


def measure_first(findings: Findings, prompts: Prompts, options: Options) -> None:
    """One prompt at a time, over HTTP and in the engine's process, alternately."""
    log = options.environments / "logs" / "first_token.log"
    command = [sys.executable, str(DRIVERS / "first_token.py")]
    rng = np.random.default_rng([options.seed, FIRST_INPUT])
    over_http: list[float] = []
    in_process: list[float] = []
    lengths = Lengths("fixed", FIRST_INPUT), Lengths("fixed", FIRST_OUTPUT)
    wanted = Traffic(options.first + 5, *lengths, streams=1)
    calls = plan_calls(wanted, prompts, [options.seed, FIRST_INPUT])
    with (
        running([OWN], 1, options, findings) as servers,
        EngineProcess(command, log, 600.0) as engine,
    ):
        engine.ask(
            "load",
            model=str(options.model.absolute()),
            folder="",
            threads=options.threads,
            sequences=1,
            context=CONTEXT,
        )
        for number, call in enumerate(calls):
            order = rng.permutation(2)
            for way in order:
                time.sleep(PAUSE / 3)
                if way:
                    found = asyncio.run(run_round(target(servers[OWN]), [call], 1))
                    seconds = found.outcomes[0].first
                    if seconds is None:
                        raise SartorError(f"no first token: {found.outcomes[0].error}")
                    times = over_http
                else:
                    ids = list(prompts.encode(str(call.prompt)))
                    answer = engine.ask("single", seed=0, prompt=ids, steps=FIRST_OUTPUT - 1)
                    seconds, times = answer["prompt_seconds"], in_process
                if number >= len(calls) - options.first:
                    times.append(seconds)
    findings.first = FirstToken(FIRST_INPUT, over_http, in_process)


class Memory(threading.Thread):
    """Resident bytes of Sartor's gateway and worker, looked at twice a second."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        (self._worker,) = server.workers()
        self._gateway = server.root
        self._ended = threading.Event()
        self.idle_worker = self._worker.memory_info().rss
        self.gateway = self.worker = 0
        self._look()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            self._look()

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._look()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.gateway = max(self.gateway, self._gateway.memory_info().rss)
            self.worker = max(self.worker, self._worker.memory_info().rss)


def measure_bursts(findings: Findings, prompts: Prompts, options: Options) -> None:
    with running([OWN], 64, options, findings) as servers:
        server = servers[OWN]
        warm = plan_calls(traffic(4, 16), prompts, [options.seed, 0])
        asyncio.run(run_round(target(server), warm, 4))
        for size in options.bursts:
            lengths = Lengths("fixed", INPUT), Lengths("fixed", OUTPUT)
            calls = plan_calls(Traffic(size, *lengths, burst=size), prompts, [options.seed, size])
            before, memory = server.processor_seconds(), Memory(server)
            memory.start()
            found: Round = asyncio.run(run_round(target(server), calls, 0))
            memory.end()
            gateway = server.processor_seconds()["front"] - before["front"]
            findings.bursts.append(
                Burst(size, found, gateway, memory.idle_worker, memory.gateway, memory.worker)
            )
            say(f"{size} at once: {found.tokens_per_s:.1f} tokens a second")


MEASURES = {
    "streams": measure_streams,
    "serial": measure_serial,
    "first": measure_first,
    "bursts": measure_bursts,
}


def measure(options: Options) -> Findings:
    prompts = Prompts.of_model(options.model, "completions")
    findings = Findings(options.model.stem, options.threads, INPUT, OUTPUT)
    for part in options.parts:
        MEASURES[part](findings, prompts, options)
    return findings


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line; UsageError for values that mean nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    peers = tuple(name for name in SERVERS if name != OWN)
    add("model", type=Path, help="a .gguf file")
    add("--parts", default=",".join(PARTS))
    add("--peers", default=",".join(peers), help="or none")
    add("--rounds", type=int, default=5)
    add("--requests", type=int, default=4, help="of each stream in a round")
    add("--first", type=int, default=50, help="prompts of the part first")
    add("--bursts", default=",".join(map(str, BURSTS)))
    add("--threads", type=int, default=min(2, available_cores()))
    add("--seed", type=int, default=0)
    add("--own", default="", metavar="OPTIONS", help='of sartor serve: --own="--kv fp16"')
    add(
        "--option",
        action="append",
        default=[],
        metavar="PEER=OPTIONS",
        help='of a peer: --option "llama_server=-fa on"; each one given is measured',
    )
    add("--environments", type=Path, default=default_environments())
    add("--json", type=Path, metavar="FILE")
    add("--write", type=Path, metavar="FILE", help="a section of this document")
    given = parser.parse_args(arguments)
    parts = _names(given.parts, PARTS, "--parts")
    chosen = () if given.peers == "none" else _names(given.peers, peers, "--peers")
    variants: dict[str, list[str]] = {}
    for text in given.option:
        name, _, value = text.partition("=")
        (peer,) = _names(name, peers, "--option")
        variants.setdefault(peer, []).append(value)
    try:
        bursts = tuple(int(size) for size in given.bursts.split(","))
    except ValueError:
        raise UsageError(f"--bursts {given.bursts} is no list of numbers, as 200,500") from None
    if min(given.rounds, given.requests, given.first, given.threads, *bursts) < 1:
        raise UsageError("rounds, requests, first, threads and bursts must be at least 1")
    if not given.model.is_file():
        raise UsageError(f"{given.model} is no file; name a .gguf file")
    return Options(
        given.model,
        parts,
        chosen,
        given.rounds,
        given.requests,
        given.first,
        bursts,
        given.threads,
        given.seed,
        tuple(given.own.split()),
        variants,
        given.environments,
        given.json,
        given.write,
    )


def _names(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in known] or not names:
        raise UsageError(f"{option}: unknown {unknown}; choose from {', '.join(known)}")
    return names


def main() -> int:
    exit_on_sigterm()
    try:
        options = parse()
        findings = measure(options)
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    section = findings.to_markdown()
    print(section, end="")
    if options.json is not None:
        text = json.dumps(findings.to_json_dict(), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.write is not None:
        write_section(options.write, section)
    return 1 if findings.own_errors() else 0


if __name__ == "__main__":
    sys.exit(main())
