"""What a load test found: one outcome a request, statistics over them, a table and JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Outcome:
    """One request; times in seconds of one clock.

    due     when it should have been sent: waiting for the generator counts as waiting
    asked   tokens that the answer should have
    pieces  when each piece of text came
    piece_tokens  of how many tokens each is, where the server tells (completions with logprobs);
            else one. A character may be of several, and comes with the last
    left    the client went away on purpose; such a request is neither good nor an error
    """

    due: float
    asked: int
    pieces: list[float] = field(default_factory=list)
    piece_tokens: list[int] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    left: bool = False

    @property
    def finished(self) -> bool:
        return self.error is None and not self.left

    @property
    def tokens(self) -> int:
        """As the server counts them, or the pieces where it does not say."""
        return len(self.pieces) if self.completion_tokens is None else self.completion_tokens

    @property
    def first(self) -> float | None:
        """Seconds to the first piece of text."""
        return self.pieces[0] - self.due if self.pieces else None

    @property
    def per_token(self) -> float | None:
        """Mean seconds a token after the first one."""
        if len(self.pieces) < 2 or self.tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces, one token each in most servers."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


@dataclass(frozen=True)
class Spread:
    """Of a sample; percentiles are interpolated linearly. All nan where there is no value."""

    count: int
    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if not values:
            return Spread(0, *[float("nan")] * 5)
        median, p90, p99 = np.percentile(values, [50, 90, 99])
        mean = statistics.fmean(values)
        return Spread(len(values), mean, float(median), float(p90), float(p99), max(values))


@dataclass(frozen=True)
class Objective:
    """What makes an answer good: seconds to the first token, and mean seconds a token after it."""

    first: float = float("inf")
    per_token: float = float("inf")

    def met(self, outcome: Outcome) -> bool:
        """A part that an answer is too short to have is met."""
        return (
            outcome.finished
            and (outcome.first or 0.0) <= self.first
            and (outcome.per_token or 0.0) <= self.per_token
        )


@dataclass(frozen=True)
class Round:
    """``seconds`` from the first request's time to the end of the last answer;
    ``client_seconds``: processor time of the load generator."""

    seconds: float
    client_seconds: float
    outcomes: Sequence[Outcome]

    @property
    def tokens(self) -> int:
        return sum(outcome.tokens for outcome in self.outcomes)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Finished ones."""
        return sum(outcome.finished for outcome in self.outcomes) / self.seconds

    def good_per_s(self, objective: Objective) -> float:
        return sum(objective.met(outcome) for outcome in self.outcomes) / self.seconds


@dataclass(frozen=True)
class Report:
    """Times are pooled over all rounds; rates are medians of the rounds, with their extremes."""

    rounds: Sequence[Round]
    objective: Objective

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for round_ in self.rounds for outcome in round_.outcomes]

    def times(self) -> dict[str, Spread]:
        finished = [outcome for outcome in self.outcomes if outcome.finished]
        return {
            "first_token": Spread.of([o.first for o in finished if o.first is not None]),
            "between_pieces": Spread.of([gap for o in finished for gap in o.gaps]),
            "per_token": Spread.of([o.per_token for o in finished if o.per_token is not None]),
            "end_to_end": Spread.of([o.end - o.due for o in finished]),
        }

    def rates(self) -> dict[str, list[float]]:
        """One value a round."""
        return {
            "output_tokens_per_s": [r.tokens_per_s for r in self.rounds],
            "requests_per_s": [r.requests_per_s for r in self.rounds],
            "good_requests_per_s": [r.good_per_s(self.objective) for r in self.rounds],
        }

    def errors(self) -> dict[str, int]:
        found = Counter(outcome.error for outcome in self.outcomes if outcome.error is not None)
        return {kind: count for kind, count in found.most_common() if kind is not None}

    def counts(self) -> dict[str, int]:
        outcomes = self.outcomes
        return {
            "requests": len(outcomes),
            "finished": sum(o.finished for o in outcomes),
            "left": sum(o.left for o in outcomes),
            "failed": sum(o.error is not None for o in outcomes),
            "short": sum(o.finished and o.tokens < o.asked for o in outcomes),
            "good": sum(self.objective.met(o) for o in outcomes),
            "prompt_tokens": sum(o.prompt_tokens for o in outcomes),
            "cached_tokens": sum(o.cached_tokens for o in outcomes),
            "output_tokens": sum(o.tokens for o in outcomes),
            "pieces": sum(len(o.pieces) for o in outcomes),
        }

    @property
    def client_seconds_per_token(self) -> float:
        tokens = sum(round_.tokens for round_ in self.rounds)
        seconds = sum(round_.client_seconds for round_ in self.rounds)
        return seconds / tokens if tokens else float("nan")

    def to_json_dict(self) -> dict[str, Any]:
        """Seconds and tokens; "nan" has no place in JSON and is null."""
        times = {name: _json(dataclasses.asdict(s)) for name, s in self.times().items()}
        rates = {
            name: {"median": statistics.median(values), "rounds": values}
            for name, values in self.rates().items()
        }
        return {
            **self.counts(),
            "errors": self.errors(),
            "seconds": times,
            **rates,
            "client_seconds_per_token": _none(self.client_seconds_per_token),
        }

    def lines(self) -> list[str]:
        """What is shown to people."""
        counts = self.counts()
        shown = [f"{'ms':<16}{'median':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
        for name, s in self.times().items():
            columns = [f"{1e3 * value:>10.1f}" for value in (s.median, s.p90, s.p99, s.max)]
            shown.append(f"{_title(name):<16}" + "".join(columns))
        shown.append("")
        for name, values in self.rates().items():
            extremes = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
            shown.append(f"{_title(name):<22}{statistics.median(values):.2f}{extremes}")
        shown.append(
            f"{'requests':<22}{counts['requests']}: {counts['finished']} finished, "
            f"{counts['left']} left, {counts['failed']} failed, {counts['short']} short"
        )
        shown += [f"{'  failed':<22}{count} x {kind}" for kind, count in self.errors().items()]
        shown.append(
            f"{'tokens':<22}{counts['prompt_tokens']} in ({counts['cached_tokens']} cached), "
            f"{counts['output_tokens']} out in {counts['pieces']} pieces"
        )
        cost = 1e6 * self.client_seconds_per_token
        shown.append(f"{'the generator itself':<22}{cost:.0f} us of processor time a token")
        return shown


def _title(name: str) -> str:
    return name.replace("_per_s", " a second").replace("_", " ")


def _none(value: float) -> float | None:
    return None if value != value else value


def _json(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _none(value) if isinstance(value, float) else value for name, value in values.items()
    }
