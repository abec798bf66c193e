"""What requests do to each other in one server: a long prompt beside answers, shared prefixes.

    python benchmarks/interference.py MODEL.gguf [--server llama_server] [--write FILE]

- long: answers are streamed to 16 clients; after 5 seconds a new prompt of 6000 tokens comes. How
  much longer its readers wait for each token, until the prompt has its first token; and, in
  turns, the same without such a prompt: answers get slower by themselves as they get longer, and
  the machine is not always the same. Then how long the prompt takes by itself.
- repeat: the first token of a new prompt of 2000 tokens, and of one that begins with the same
  2000 tokens and ends in other ones
- together: 64 requests at once that share 2000 tokens, and how many of these were computed

Peers are made by peers.py and llama_server.py. Exit code 1 where a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from http_stream import Client
from load import Target, send
from load_report import Outcome
from peers import default_environments
from results import OWN, where_and_when, write_section
from servers import SERVERS, RunningServer, Setting, exit_on_sigterm
from traffic import Call, Prompts

from sartor.errors import SartorError, UsageError
from sartor.hardware import available_cores

PARTS = ("long", "repeat", "together")
STREAMS, STREAM_OUTPUT = 16, 1900
WARM_SECONDS, BEFORE_SECONDS = 1.0, 5.0
PREFIX, SUFFIX, TOGETHER = 2000, 32, 64
REPEATS = 9


@dataclass(frozen=True)
class Options:
    model: Path
    server: str
    more: tuple[str, ...]
    parts: tuple[str, ...]
    trials: int
    tokens: int
    answered: int
    threads: int
    seed: int
    environments: Path
    json: Path | None
    write: Path | None


@dataclass(frozen=True)
class Trial:
    """Gaps between tokens, in seconds: the median of those before, and of those during the wait
    for the long prompt's first token, which took ``seconds``, or a wait for as long."""

    before: float
    middle: float
    p99: float
    seconds: float

    @property
    def ratio(self) -> float:
        return self.p99 / self.before


@dataclass
class Findings:
    """Seconds, and tokens. ``alone``: of the long prompt by itself; ``answered``: tokens of each
    prompt of the answers beside it."""

    model: str
    title: str
    settings: str
    threads: int
    tokens: int
    answered: int
    beside: list[Trial] = field(default_factory=list)
    control: list[Trial] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    together_last: float = 0.0
    together_computed: int = 0

    def to_markdown(self) -> str:
        lines = [f"## {self.model}: requests beside each other", ""]
        lines += [f"{self.title}, {self.threads} threads, {self.settings}. Medians, extremes.", ""]
        if self.beside:
            lines += [
                f"{STREAMS} answers to prompts of {self.answered} tokens, and a prompt of "
                f"{self.tokens} that comes amid them:",
                "",
                "| | with the prompt | without |",
                "| --- | --- | --- |",
                *(
                    f"| {name} | {_spread([read(t) for t in self.beside], form)} "
                    f"| {_spread([read(t) for t in self.control], form)} |"
                    for name, read, form in _ROWS
                ),
                "",
                f"The prompt's first token came after {_spread([t.seconds for t in self.beside])} "
                f"s; by itself, after {_spread(self.alone)} s.",
                "",
            ]
        if self.first:
            share = [again / first for again, first in zip(self.again, self.first, strict=True)]
            lines += [
                f"A prompt of {PREFIX + SUFFIX} tokens had its first token after "
                f"{_spread(self.first, '{:.3f}')} s; with the first {PREFIX} as before, after "
                f"{_spread(self.again, '{:.3f}')} s, {_spread(share, '{:.1%}')} of that.",
                "",
            ]
        if self.together_computed:
            lines += [
                f"{TOGETHER} of them at once that share these {PREFIX}: "
                f"{self.together_computed:,} tokens of prompts were computed "
                f"(the least is {PREFIX + TOGETHER * SUFFIX:,}, each by itself "
                f"{TOGETHER * (PREFIX + SUFFIX):,}), and the last had its first token after "
                f"{self.together_last:.2f} s.",
                "",
            ]
        lines += [f"- {name}: {value}" for name, value in where_and_when().items()] + [""]
        return "\n".join(lines)


_ROWS: list[tuple[str, Any, str]] = [
    ("median gap in the 5 s before, ms", lambda t: t.before * 1e3, "{:.1f}"),
    ("median gap during, ms", lambda t: t.middle * 1e3, "{:.1f}"),
    ("p99 during, ms", lambda t: t.p99 * 1e3, "{:.1f}"),
    ("**p99 during, of the median before**", lambda t: t.ratio, "x{:.2f}"),
]


def _spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    shown = [form.format(value) for value in (median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]}-{shown[2]})"


@dataclass
class Asker:
    """New prompts for one server."""

    target: Target
    client: Client
    prompts: Prompts
    rng: np.random.Generator

    def call(self, tokens: int, output: int, prefix: Sequence[int] = ()) -> Call:
        return Call(None, self.prompts.text(tokens, prefix, self.rng), tokens, output, None)

    def prefix(self) -> list[int]:
        """Words; some give more than one token."""
        return self.prompts.draw(PREFIX, self.rng)

    async def ask(self, call: Call) -> Outcome:
        """Raises SartorError where there is no whole answer."""
        body = self.target.body(call)
        outcome = await send(self.client, self.target, body, call, time.perf_counter())
        if outcome.error is not None or outcome.first is None:
            raise SartorError(f"a request failed: {outcome.error or 'no text came'}")
        return outcome

    async def first(self, call: Call) -> float:
        return (await self.ask(call)).first or 0.0


@contextlib.asynccontextmanager
async def answering(asker: Asker, tokens: int) -> AsyncIterator[list[Outcome]]:
    """Long answers to prompts of some tokens; the clients leave in the end."""
    calls = [asker.call(tokens, STREAM_OUTPUT) for _ in range(STREAMS)]
    now = time.perf_counter()
    outcomes = [Outcome(now, STREAM_OUTPUT) for _ in calls]
    tasks = [
        asyncio.create_task(
            send(asker.client, asker.target, asker.target.body(call), call, now, outcome)
        )
        for call, outcome in zip(calls, outcomes, strict=True)
    ]
    try:
        while any(len(outcome.pieces) < 2 for outcome in outcomes):
            await asyncio.sleep(0.05)
            if any(task.done() for task in tasks):
                error = next((o.error for o in outcomes if o.error is not None), "no text came")
                raise SartorError(f"an answer ended before it could be measured: {error}")
        await asyncio.sleep(WARM_SECONDS)
        yield outcomes
        if any(task.done() for task in tasks):
            raise SartorError("an answer ended before the long prompt had its first token")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def gaps_within(outcomes: Sequence[Outcome], begin: float, end: float) -> list[float]:
    """Gaps between tokens that ended in this time. Tokens of one piece share its gap: a character
    of two tokens comes after two steps."""
    gaps: list[float] = []
    for outcome in outcomes:
        ends = zip(outcome.pieces, outcome.pieces[1:], outcome.piece_tokens[1:], strict=False)
        for before, after, tokens in ends:
            if begin <= after < end:
                gaps += [(after - before) / tokens] * tokens
    return gaps


async def trial(asker: Asker, options: Options, wait: float | None) -> Trial:
    """With a long prompt, or for ``wait`` seconds without."""
    call = asker.call(options.tokens, 2)
    async with answering(asker, options.answered) as outcomes:
        begin = time.perf_counter()
        await asyncio.sleep(BEFORE_SECONDS)
        middle = time.perf_counter()
        if wait is None:
            wait = await asker.first(call)
        else:
            await asyncio.sleep(wait)
        before = gaps_within(outcomes, begin, middle)
        during = gaps_within(outcomes, middle, middle + wait)
        p50, p99 = np.percentile(during, [50, 99])
        return Trial(median(before), float(p50), float(p99), wait)


async def measure_long(asker: Asker, options: Options, findings: Findings) -> None:
    # Nobody has measured what these sizes take yet, and the server learns it from its steps.
    await trial(asker, options, None)
    for number in range(options.trials):
        found = await trial(asker, options, None)
        findings.beside.append(found)
        findings.control.append(await trial(asker, options, found.seconds))
        findings.alone.append(await asker.first(asker.call(options.tokens, 2)))
        say(
            f"trial {number + 1}: x{found.ratio:.2f} (without the prompt "
            f"x{findings.control[-1].ratio:.2f}), first token after {found.seconds:.1f} s"
        )


async def measure_repeat(asker: Asker, options: Options, findings: Findings) -> None:
    for _ in range(REPEATS):
        prefix = asker.prefix()
        findings.first.append(await asker.first(asker.call(PREFIX + SUFFIX, 2, prefix)))
        findings.again.append(await asker.first(asker.call(PREFIX + SUFFIX, 2, prefix)))


async def measure_together(asker: Asker, options: Options, findings: Findings) -> None:
    prefix = asker.prefix()
    calls = [asker.call(PREFIX + SUFFIX, 2, prefix) for _ in range(TOGETHER)]
    outcomes = await asyncio.gather(*map(asker.ask, calls))
    findings.together_last = max(outcome.first or 0.0 for outcome in outcomes)
    findings.together_computed = sum(o.prompt_tokens - o.cached_tokens for o in outcomes)


MEASURES = {"long": measure_long, "repeat": measure_repeat, "together": measure_together}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(options: Options) -> Findings:
    """Starts the server and measures. SartorError where a request fails."""
    sequences = max(TOGETHER, STREAMS + 1) if "together" in options.parts else STREAMS + 1
    room = options.answered + STREAM_OUTPUT, options.tokens + 64, PREFIX + SUFFIX + 64
    setting = Setting(
        options.model, options.threads, sequences, max(room), options.environments, options.more
    )
    log = options.environments / "logs" / f"interference_{options.server}.log"
    prompts = Prompts.of_model(options.model, "completions")
    with RunningServer(options.server, setting, log) as server:
        launch = server.launch
        findings = Findings(
            options.model.stem,
            launch.title,
            launch.settings,
            options.threads,
            options.tokens,
            options.answered,
        )

        async def all_parts() -> None:
            more = {"logprobs": 0}  # names the tokens of each piece
            target = Target(server.url, launch.model, "completions", timeout=1800, more=more)
            client = target.client()
            asker = Asker(target, client, prompts, np.random.default_rng(options.seed))
            try:
                await asker.ask(asker.call(options.answered, 8))
                for part in options.parts:
                    await MEASURES[part](asker, options, findings)
            finally:
                client.close()

        asyncio.run(all_parts())
    return findings


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line; UsageError for values that mean nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="a .gguf file")
    add("--server", choices=tuple(SERVERS), default=OWN)
    add("--option", default="", metavar="OPTIONS", help='of the server: --option="-fa off"')
    add("--parts", default=",".join(PARTS))
    add("--trials", type=int, default=5)
    add("--tokens", type=int, default=6000, help="of the long prompt")
    add("--answered", type=int, default=64, help="tokens of the prompts of the answers beside it")
    add("--threads", type=int, default=min(2, available_cores()))
    add("--seed", type=int, default=0)
    add("--environments", type=Path, default=default_environments())
    add("--json", type=Path, metavar="FILE")
    add("--write", type=Path, metavar="FILE", help="a section of this document")
    given = parser.parse_args(arguments)
    parts = tuple(given.parts.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"--parts: unknown {unknown}; choose from {', '.join(PARTS)}")
    if min(given.trials, given.threads, given.answered) < 1 or given.tokens < 16:
        raise UsageError("trials, threads and answered must be at least 1, tokens at least 16")
    if not given.model.is_file():
        raise UsageError(f"{given.model} is no file; name a .gguf file")
    return Options(
        given.model,
        given.server,
        tuple(given.option.split()),
        parts,
        given.trials,
        given.tokens,
        given.answered,
        given.threads,
        given.seed,
        given.environments,
        given.json,
        given.write,
    )


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
        options.json.write_text(json.dumps(asdict(findings), indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        write_section(options.write, section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
