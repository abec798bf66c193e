"""Minutes of mixed load on ``sartor serve`` with killed workers: is everything as it was before?

    python benchmarks/soak.py MODEL.gguf [--minutes 10] [--kills 3] [--seed 0] [--json FILE]

Clients ask chats and completions, streamed and whole, with several choices, seeds and shared
prefixes; some go away amid an answer or before it begins, some send requests that must be
refused. Workers are killed (SIGKILL) at moments that the seed draws. Every answer is compared
with the one that the same question got alone before. After a warm-up and at the end the load
rests, and what the server then holds is compared: state blocks and requests (none), resident
memory, file descriptors, threads. Exit code 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from http_stream import Client, ExchangeError
from peers import default_environments
from prometheus_client.parser import text_string_to_metric_families
from servers import RunningServer, Setting, exit_on_sigterm
from soak_questions import Answer, BadRequest, ask, bad_requests, make_questions
from traffic import Prompts

from sartor.errors import SartorError, UsageError

QUESTIONS = 24
GROWTH = 0.03
"""Of resident memory from the end of the warm-up to the end of all."""
REST_SECONDS = 15.0
"""At most, until a server without load holds nothing any more."""
NOTHING_HELD: tuple[tuple[str, dict[str, str]], ...] = (
    ("sartor_requests_in_flight", {}),
    ("sartor_engine_sequences", {}),
    ("sartor_state_blocks", {"state": "held"}),
)
"""Metrics that are 0 in a server without load, with the labels that choose them."""
ACTIONS = ("whole", "stream", "leave", "abort", "refused")
SHARES = (0.3, 0.4, 0.1, 0.1, 0.1)


@dataclass(frozen=True)
class Plan:
    """``seconds`` of load with ``kills``, after ``warm_up`` seconds of the same load without."""

    seconds: float
    warm_up: float
    kills: int
    clients: int
    seed: int
    longest: int = 300
    timeout: float = 300.0

    def kill_times(self) -> list[float]:
        """Seconds after the warm-up: in the first 70 %, as the last worker needs a warm-up, too."""
        rng = np.random.default_rng([self.seed, 1])
        return sorted(float(at) for at in rng.uniform(0, 0.7 * self.seconds, self.kills))


@dataclass(frozen=True)
class Sample:
    """What a process uses; ``at`` seconds after the start of the load."""

    at: float
    role: str
    pid: int
    rss_bytes: int
    descriptors: int
    threads: int


@dataclass
class Findings:
    """``rests``: the samples of the two moments without load; ``held``: metrics that were not 0
    at the end, None where the server shows no metrics."""

    plan: Plan
    actions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    killed: list[float] = field(default_factory=list)
    series: list[Sample] = field(default_factory=list)
    rests: list[dict[str, Sample]] = field(default_factory=list)
    held: dict[str, float] | None = None
    workers: int = 0
    healthy: bool = False
    tracebacks: int = 0

    def checks(self) -> list[tuple[str, bool, str]]:
        """What was to be shown, whether it was, and the figures."""
        first, last = self.rests
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.actions.items()))
        found = [
            ("answers", not self.failures, f"{done}; {len(self.failures)} wrong"),
            ("kills", len(self.killed) == self.plan.kills, f"{len(self.killed)} workers killed"),
            ("health", self.healthy and self.workers == 1, f"{self.workers} worker at the end"),
            ("log", not self.tracebacks, f"{self.tracebacks} tracebacks"),
        ]
        if self.held is None:
            found.append(("ledger", False, "unknown, the server shows no metrics"))
        else:
            text = ", ".join(f"{name} {value:g}" for name, value in self.held.items())
            found.append(("ledger", not self.held, text or "nothing is held"))
        for role in first:
            before, after = first[role], last[role]
            growth = after.rss_bytes / before.rss_bytes - 1
            found += [
                (
                    f"{role}'s memory",
                    growth <= GROWTH,
                    f"{before.rss_bytes / 1e6:.1f} -> {after.rss_bytes / 1e6:.1f} MB "
                    f"({growth:+.1%})",
                ),
                (
                    f"{role}'s descriptors",
                    after.descriptors <= before.descriptors,
                    f"{before.descriptors} -> {after.descriptors}",
                ),
                (
                    f"{role}'s threads",
                    after.threads <= before.threads,
                    f"{before.threads} -> {after.threads}",
                ),
            ]
        return found

    @property
    def passed(self) -> bool:
        return all(right for _, right, _ in self.checks())

    def lines(self) -> list[str]:
        """What is shown to people: every check, then memory over time in ten places."""
        shown = [
            f"{'ok' if right else 'WRONG':<7}{name:<22}{text}"
            for name, right, text in self.checks()
        ]
        shown += [f"       {text}" for text in self.failures[:20]]
        for role in self.rests[0]:
            samples = [sample for sample in self.series if sample.role == role]
            chosen = samples[:: max(1, len(samples) // 10)]
            values = " ".join(f"{sample.rss_bytes / 1e6:.0f}" for sample in chosen)
            shown.append(f"{role}'s memory in MB over time: {values}")
        if self.killed:
            times = ", ".join(f"{at:.0f}" for at in self.killed)
            shown.append(f"workers killed after s: {times}")
        return shown

    def to_json_dict(self) -> dict[str, Any]:
        checks = [{"name": n, "right": right, "text": text} for n, right, text in self.checks()]
        return {
            "plan": dataclasses.asdict(self.plan),
            "passed": self.passed,
            "checks": checks,
            "actions": dict(self.actions),
            "failures": self.failures,
            "killed": self.killed,
            "held": self.held,
            "series": [dataclasses.asdict(sample) for sample in self.series],
        }


class Soak:
    """One run. The load's clock starts with the first client."""

    def __init__(
        self, server: RunningServer, prompts: Prompts, plan: Plan, say: Callable[[str], None]
    ) -> None:
        self._server, self._plan, self._say = server, plan, say
        model = server.launch.model
        self._questions = make_questions(model, prompts, QUESTIONS, plan.longest, plan.seed)
        self._bad = bad_requests(model)
        self._right: list[Answer] = []
        self._begun = 0.0
        self.findings = Findings(plan)

    async def run(self) -> Findings:
        plan, found = self._plan, self.findings
        self._say(f"{len(self._questions)} questions alone ...")
        client = Client(self._server.url)
        for question in self._questions:
            answer = await ask(client, question, False, plan.timeout)
            if answer.error:
                raise SartorError(f"a question alone had no answer: {answer.error}")
            self._right.append(answer)
        client.close()
        self._begun = time.monotonic()
        watching = asyncio.create_task(self._watch())
        try:
            self._say(f"warm-up of {plan.warm_up:.0f} s ...")
            await self._fill_pools()
            await self._load(plan.warm_up, 0, [])
            await self._fill_pools()
            found.rests.append(await self._rest(None))
            self._say(f"load for {plan.seconds:.0f} s with {plan.kills} kills ...")
            await self._load(plan.seconds, 1, plan.kill_times())
            await self._fill_pools()
            found.held = await self._ledger()
            found.rests.append(await self._rest(found.rests[0]))
        finally:
            watching.cancel()
        found.workers = len(self._server.workers())
        client = Client(self._server.url)
        found.healthy = (await client.call("GET", "/health"))[0] == 200
        client.close()
        return found

    async def _load(self, seconds: float, phase: int, kills: Sequence[float]) -> None:
        """Clients at work; each ends with what it began before the time was over."""
        client = Client(self._server.url)
        end = time.monotonic() + seconds
        killing = asyncio.create_task(self._kill(kills))
        await asyncio.gather(
            *(self._client(client, end, [phase, i]) for i in range(self._plan.clients))
        )
        await killing
        client.close()

    async def _fill_pools(self) -> None:
        """Long bodies at once: threads and processes that start when they are needed are there
        from then on, at every moment that is compared."""
        longest = max(self._bad, key=lambda bad: len(bad.body))
        client = Client(self._server.url)
        await asyncio.gather(*(self._refused(client, longest) for _ in range(12)))
        client.close()

    async def _client(self, client: Client, end: float, seed: Sequence[int]) -> None:
        rng = np.random.default_rng([self._plan.seed, 2, *seed])
        while time.monotonic() < end:
            action = str(rng.choice(ACTIONS, p=SHARES))
            number = int(rng.integers(len(self._questions)))
            try:
                problem = await self._act(client, action, number, rng)
            except ExchangeError as error:
                problem = str(error)
            self.findings.actions[action] += 1
            if problem:
                at = time.monotonic() - self._begun
                self.findings.failures.append(f"{action} {number} after {at:.1f} s: {problem}")

    async def _act(self, client: Client, action: str, number: int, rng: np.random.Generator) -> str:
        """What is wrong with one exchange, or nothing."""
        question, right, patience = self._questions[number], self._right[number], self._plan.timeout
        if action == "refused":
            return await self._refused(client, self._bad[int(rng.integers(len(self._bad)))])
        if action == "abort":  # before or soon after the prompt is read
            with contextlib.suppress(ExchangeError):
                await ask(client, question, bool(rng.integers(2)), float(rng.uniform(0, 0.2)))
            return ""
        if action == "leave":
            part = await ask(client, question, True, patience, int(rng.integers(1, 12)))
            return "" if part.begins(right) else f"{part} is no part of {right}"
        answer = await ask(client, question, action == "stream", patience)
        return "" if answer == right else f"{answer} instead of {right}"

    async def _refused(self, client: Client, bad: BadRequest) -> str:
        status, body = await client.call(bad.method, bad.path, bad.body, self._plan.timeout)
        if status == bad.status and json.loads(body)["error"]["message"]:
            return ""
        return f"{bad.path} gave {status} instead of {bad.status}: {body[:200]!r}"

    async def _kill(self, times: Sequence[float]) -> None:
        begun = time.monotonic()
        for at in times:
            await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
            while not (workers := self._server.workers()):
                await asyncio.sleep(0.02)  # the one before is just being replaced
            workers[0].kill()
            self.findings.killed.append(round(time.monotonic() - self._begun, 1))

    def _sample(self) -> dict[str, Sample]:
        found = {}
        at = round(time.monotonic() - self._begun, 2)
        named = [("gateway", self._server.root), *(("worker", w) for w in self._server.workers())]
        for role, process in named:
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                rss, files = process.memory_info().rss, process.num_fds()
                found[role] = Sample(at, role, process.pid, rss, files, process.num_threads())
        return found

    async def _watch(self) -> None:
        pause = max(0.5, (self._plan.seconds + self._plan.warm_up) / 400)
        while True:
            self.findings.series += self._sample().values()
            await asyncio.sleep(pause)

    async def _rest(self, before: dict[str, Sample] | None) -> dict[str, Sample]:
        """A sample of a server without load: when it uses no more than before, or uses the
        same for a while; else the last one there is time for."""
        end = time.monotonic() + REST_SECONDS
        last: dict[str, Sample] = {}
        same = 0
        while time.monotonic() < end and same < 5:
            await asyncio.sleep(0.3)
            now = self._sample()
            same = same + 1 if _counts(now) == _counts(last) and len(now) == 2 else 0
            last = now
            if before is not None and same and _no_more(now, before):
                break
        if len(last) < 2:
            raise SartorError("the server has no worker at rest")
        return last

    async def _ledger(self) -> dict[str, float] | None:
        """What is held although nobody asks for anything; None where there are no metrics."""
        client = Client(self._server.url)
        end = time.monotonic() + REST_SECONDS
        try:
            while True:
                status, page = await client.call("GET", "/metrics")
                if status != 200:
                    return None
                held = still_held(page.decode())
                if not held or time.monotonic() > end:
                    return held
                await asyncio.sleep(0.2)
        finally:
            client.close()


def still_held(page: str) -> dict[str, float]:
    """Of a page of metrics, those of ``NOTHING_HELD`` that are not 0 or not there (nan)."""
    families = {family.name: family for family in text_string_to_metric_families(page)}
    held: dict[str, float] = {}
    for name, labels in NOTHING_HELD:
        samples = [
            sample
            for sample in (families[name].samples if name in families else ())
            if labels.items() <= sample.labels.items()
        ]
        if not samples:
            held[name] = float("nan")
        for sample in samples:
            if sample.value:
                held[f"{name}{json.dumps(sample.labels)}"] = sample.value
    return held


def _counts(samples: dict[str, Sample]) -> list[tuple[int, int, int]]:
    return [(s.pid, s.descriptors, s.threads) for s in samples.values()]


def _no_more(now: dict[str, Sample], before: dict[str, Sample]) -> bool:
    return all(
        now[role].descriptors <= before[role].descriptors
        and now[role].threads <= before[role].threads
        for role in before
    )


def soak(
    setting: Setting, plan: Plan, prompts: Prompts, say: Callable[[str], None] = lambda text: None
) -> Findings:
    """Starts a server, soaks it and ends it. SartorError where it could not be asked at all."""
    log = setting.environments / "logs" / "soak.log"
    with RunningServer("sartor", setting, log):
        pass  # packs the weights where nobody has: a worker that finds them has a file more open
    with RunningServer("sartor", setting, log) as server:
        findings = asyncio.run(Soak(server, prompts, plan, say).run())
    text = log.read_text(encoding="utf-8", errors="replace")
    findings.tracebacks = text.count("Traceback (most recent call last)")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, help="seconds (a fifth of the time)")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--option", default="", help='of sartor serve, as --option="--backend null"'
    )
    parser.add_argument("--environments", type=Path, default=default_environments())
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    exit_on_sigterm()
    try:
        if given.minutes <= 0 or given.kills < 0 or given.clients < 1 or given.seed < 0:
            raise UsageError("minutes and clients must be positive, kills and seed at least 0")
        if not given.model.is_file():
            raise UsageError(f"{given.model} is no file; name a .gguf file")
        seconds = 60 * given.minutes
        warm_up = seconds / 5 if given.warm_up is None else given.warm_up
        plan = Plan(seconds - warm_up, warm_up, given.kills, given.clients, given.seed)
        options = given.option.split()
        setting = Setting(given.model, given.threads, 1, 1, given.environments, options)
        prompts = Prompts.of_model(given.model, "completions")
        findings = soak(setting, plan, prompts, lambda text: print(text, file=sys.stderr))
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(findings.lines()))
    if given.json is not None:
        text = json.dumps(findings.to_json_dict(), indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0 if findings.passed else 1


if __name__ == "__main__":
    sys.exit(main())
