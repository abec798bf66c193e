"""How many tokens of prompts a step can take, so that running answers keep their pace."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.engine.scheduler import UNBOUNDED

_NEWEST = 0.25  # weight of the newest measurement in an average
_OUTLIER = 4.0  # times the average: a step that was held up by something else says nothing
_PURE_EVERY = 16  # steps; one of them goes without prompts, to see what decodes take


@dataclass(frozen=True)
class PacePolicy:
    """How a step's time is divided between answers that run and prompts that wait.

    short_share   of the time for short prompts, however many answers run: it makes few steps
                  longer, and the sooner they are done, the fuller the steps to come
    long_share    of the time for long ones: they make many steps longer, but are never starved
    calm_seconds  a step may take that long whatever the shares are: nobody reads faster
    least_tokens  of prompts a step, whatever they cost
    """

    short_share: float = 0.62
    long_share: float = 0.35
    calm_seconds: float = 0.01
    least_tokens: int = 4


class Pace:
    """Learns from step times what decodes take and what a token of a prompt adds.

    Every sequence that could compute gets an equal part of a step's time: W prompts beside R
    decodes get W / (W + R) of it, and at least the policy's share. So one long prompt beside many
    answers makes their steps longer by a fixed share, a crowd of prompts beside few answers
    goes ahead at nearly full speed, and it all follows the machine as it gets faster or slower
    and prompts as they get dearer with their length.

    No clock in here: :meth:`learn` is told, :meth:`budget` answers.
    """

    def __init__(self, policy: PacePolicy | None = None) -> None:
        self._policy = policy or PacePolicy()
        self._decode_seconds: dict[int, float] = {}
        self._added_seconds: float | None = None
        self._prompt_tokens = 1.0
        self._mixed_steps = 0

    def learn(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many decodes and tokens of prompts took ``seconds``."""
        if prompt_tokens == 0:
            if decodes:
                self._mixed_steps = 0
                before = self._decode_seconds.get(decodes)
                self._decode_seconds[decodes] = _average(before, seconds)
            return
        self._mixed_steps += decodes > 0
        alone = self.decode_seconds(decodes)
        if alone is not None:
            # At least a tenth: decodes may have become faster than we remember.
            added = max(seconds - alone, seconds / 10)
            # Both averaged by themselves: the quotient of a short chunk is mostly noise.
            if self._added_seconds is None:
                self._added_seconds, self._prompt_tokens = added, prompt_tokens
            most = _OUTLIER * self._added_seconds / self._prompt_tokens * prompt_tokens
            self._added_seconds += _NEWEST * (min(added, most) - self._added_seconds)
            self._prompt_tokens += _NEWEST * (prompt_tokens - self._prompt_tokens)

    def decode_seconds(self, decodes: int) -> float | None:
        """What a step of so many decodes takes by itself; None where nothing is known."""
        if decodes == 0:
            return 0.0
        if not self._decode_seconds:
            return None
        nearest = min(self._decode_seconds, key=lambda known: abs(known - decodes))
        # About half of a step is the same for all; what is measured soon corrects this.
        return self._decode_seconds[nearest] * (0.5 + 0.5 * decodes / nearest)

    def budget(self, decodes: int, prompts: int, long: bool) -> int:
        """Tokens of prompts for the next step, where ``prompts`` could use some; ``long``: those
        of them that are for long ones."""
        alone = self.decode_seconds(decodes)
        if decodes == 0 or not self._added_seconds:  # nothing known, or a clock that stands still
            return UNBOUNDED
        if alone is None:
            return 0
        if self._mixed_steps >= _PURE_EVERY:
            return 0
        policy = self._policy
        least = policy.long_share if long else policy.short_share
        share = max(least, prompts / (prompts + decodes))
        seconds = max(alone * share / (1 - share), policy.calm_seconds - alone)
        tokens = seconds * self._prompt_tokens / self._added_seconds
        return max(policy.least_tokens, int(tokens))


def _average(before: float | None, seconds: float) -> float:
    if before is None or seconds < before:
        # Time is only ever added to what a step takes: what is less is nearer to the truth.
        return seconds if before is None else before + 0.5 * (seconds - before)
    return before + _NEWEST * (min(seconds, _OUTLIER * before) - before)
