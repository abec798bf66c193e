"""What was measured of servers: numbers, JSON, and a section for a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from load_report import Objective, Report, Round
from results import OWN, where_and_when
from traffic import Traffic

from sartor.bench import Spread


@dataclass
class Row:
    """One load on several servers. ``used[server]``: processor seconds of each round, by
    ``front`` (of Sartor: the gateway) and ``workers``."""

    title: str
    streams: int
    traffic: Mapping[str, Traffic]
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    used: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, name: str, found: Round, used: dict[str, float]) -> None:
        self.rounds.setdefault(name, []).append(found)
        self.used.setdefault(name, []).append(used)

    def drop(self, name: str) -> None:
        """Its rounds would not be those of the others."""
        self.rounds.pop(name, None)
        self.used.pop(name, None)

    def report(self, name: str) -> Report:
        return Report(self.rounds[name], Objective())

    def ratio(self, name: str) -> Spread:
        """How many times as many tokens a second Sartor wrote, by round."""
        pairs = zip(self.rounds[OWN], self.rounds[name], strict=True)
        return Spread.of([own.tokens_per_s / other.tokens_per_s for own, other in pairs])

    def gateway_seconds_per_token(self) -> float:
        seconds = sum(used["front"] for used in self.used[OWN])
        return seconds / sum(round_.tokens for round_ in self.rounds[OWN])

    def to_json_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self.rounds:
            found[name] = {**self.report(name).to_json_dict(), "processor_seconds": self.used[name]}
            if name != OWN:
                found[name]["sartor_times"] = dataclasses.asdict(self.ratio(name))
        return {
            "streams": self.streams,
            "gateway_seconds_per_token": self.gateway_seconds_per_token(),
            "servers": found,
        }


@dataclass(frozen=True)
class FirstToken:
    """Seconds to the first token of the same prompts, over HTTP and in the engine's process."""

    tokens: int
    over_http: Sequence[float]
    in_process: Sequence[float]

    @property
    def added(self) -> float:
        """By HTTP and processes: between the medians."""
        return median(self.over_http) - median(self.in_process)

    def to_json_dict(self) -> dict[str, Any]:
        pairs = zip(self.over_http, self.in_process, strict=True)
        return {
            "prompt_tokens": self.tokens,
            "over_http": list(self.over_http),
            "in_process": list(self.in_process),
            "added": self.added,
            "median_of_differences": median(http - own for http, own in pairs),
        }


@dataclass(frozen=True)
class Burst:
    """``gateway_seconds`` of processor time; memory in resident bytes."""

    size: int
    round: Round
    gateway_seconds: float
    worker_idle_bytes: int
    gateway_peak_bytes: int
    worker_peak_bytes: int

    @property
    def report(self) -> Report:
        return Report([self.round], Objective())

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            **self.report.to_json_dict(),
            "gateway_seconds_per_token": self.gateway_seconds / max(self.round.tokens, 1),
            "worker_idle_bytes": self.worker_idle_bytes,
            "gateway_peak_bytes": self.gateway_peak_bytes,
            "worker_peak_bytes": self.worker_peak_bytes,
        }


@dataclass
class Findings:
    """``servers``: title and settings by name; ``missing``: why others are not there."""

    model: str
    threads: int
    input_tokens: int
    output_tokens: int
    servers: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    first: FirstToken | None = None
    bursts: list[Burst] = field(default_factory=list)

    def own_errors(self) -> dict[str, int]:
        """What went wrong with Sartor's answers, with how often."""
        reports = [row.report(OWN) for row in self.rows] + [burst.report for burst in self.bursts]
        found: dict[str, int] = {}
        for report in reports:
            for kind, count in report.errors().items():
                found[kind] = found.get(kind, 0) + count
        return found

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "threads": self.threads,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "servers": {n: {"title": t, "settings": s} for n, (t, s) in self.servers.items()},
            "missing": dict(self.missing),
            "rows": {row.title: row.to_json_dict() for row in self.rows},
            "first_token": None if self.first is None else self.first.to_json_dict(),
            "bursts": [burst.to_json_dict() for burst in self.bursts],
        }

    def to_markdown(self) -> str:
        lines = [f"## {self.model} over HTTP", ""]
        lines.append(
            f"{self.threads} threads; requests of {self.input_tokens} tokens in and "
            f"{self.output_tokens} out, greedy, streamed. Times in ms, median and p99."
        )
        for row in self.rows:
            lines += ["", *self._row(row)]
        if self.bursts:
            lines += ["", *self._bursts()]
        lines.append("")
        for row in self.rows:
            cost = 1e6 * row.gateway_seconds_per_token()
            lines.append(f"- gateway, {row.title}: {cost:.0f} us of processor time a token")
        if self.first is not None:
            http, engine = median(self.first.over_http), median(self.first.in_process)
            lines.append(
                f"- first token of {self.first.tokens} tokens, median of "
                f"{len(self.first.over_http)}: {1e3 * http:.1f} ms over HTTP, "
                f"{1e3 * engine:.1f} ms in the engine's process; {1e3 * self.first.added:.1f} ms "
                "are added"
            )
        lines += [f"- {name}: {value}" for name, value in where_and_when().items()]
        lines += [f"- {title}: {settings}" for title, settings in self.servers.values()]
        lines += [f"- not measured, {name}: {why}" for name, why in self.missing.items()]
        return "\n".join(lines) + "\n"

    def _row(self, row: Row) -> list[str]:
        lines = [
            f"| {row.title} | output tokens a second | Sartor is | first token | between pieces "
            "| failed |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name in (name for name in row.traffic if name in row.rounds):
            report = row.report(name)
            rate = Spread.of([round_.tokens_per_s for round_ in row.rounds[name]])
            shown = f"{rate.median:.0f} ({rate.low:.0f}-{rate.high:.0f})"
            times = ""
            if name != OWN:
                ratio = row.ratio(name)
                times = f"**x{ratio.median:.2f}** ({ratio.low:.2f}-{ratio.high:.2f})"
            found = report.times()
            first, gap = found["first_token"], found["between_pieces"]
            lines.append(
                f"| {self.servers[name][0]} | {shown} | {times} "
                f"| {1e3 * first.median:.0f}, {1e3 * first.p99:.0f} "
                f"| {1e3 * gap.median:.1f}, {1e3 * gap.p99:.1f} "
                f"| {report.counts()['failed']} of {report.counts()['requests']} |"
            )
        return lines

    def _bursts(self) -> list[str]:
        lines = [
            "| at once | finished | failed | tokens a second | first token | gateway "
            "| gateway's memory | worker's memory |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for burst in self.bursts:
            counts, first = burst.report.counts(), burst.report.times()["first_token"]
            cost = 1e6 * burst.gateway_seconds / max(burst.round.tokens, 1)
            lines.append(
                f"| {burst.size} | {counts['finished']} | {counts['failed']} "
                f"| {burst.round.tokens_per_s:.0f} "
                f"| {1e3 * first.median:.0f}, {1e3 * first.p99:.0f} | {cost:.0f} us a token "
                f"| {burst.gateway_peak_bytes / 1e6:.0f} MB "
                f"| {burst.worker_idle_bytes / 1e6:.0f} -> {burst.worker_peak_bytes / 1e6:.0f} MB |"
            )
        return lines
