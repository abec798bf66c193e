"""Which requests a load test sends: when, how long, with what in common. All from one seed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sartor.engine.load import load_text
from sartor.errors import UsageError
from sartor.formats import open_checkpoint

Rng = np.random.Generator
Endpoint = Literal["chat", "completions"]


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens.

    fixed      ``first``
    uniform    from ``first`` to ``second``, both included
    lognormal  median ``first``, and ``second``: the standard deviation of the logarithm
    """

    kind: Literal["fixed", "uniform", "lognormal"]
    first: float
    second: float = 0.0

    @staticmethod
    def parse(text: str) -> Lengths:
        """From ``128``, ``64-512`` or ``lognormal:128,0.8``. UsageError for anything else."""
        try:
            if text.startswith("lognormal:"):
                median, sigma = text.removeprefix("lognormal:").split(",")
                found = Lengths("lognormal", float(median), float(sigma))
            elif "-" in text:
                low, high = text.split("-")
                found = Lengths("uniform", int(low), int(high))
            else:
                found = Lengths("fixed", int(text))
        except ValueError:
            found = Lengths("fixed", 0)
        if not (1 <= found.first < math.inf) or not (0 <= found.second < math.inf):
            raise UsageError(
                f"{text} is no distribution of lengths; write 128, 64-512 or lognormal:128,0.8"
            )
        if found.kind == "uniform" and found.second < found.first:
            raise UsageError(f"{text}: the second length is below the first; write them in order")
        return found

    def draw(self, rng: Rng) -> int:
        if self.kind == "uniform":
            return int(rng.integers(int(self.first), int(self.second), endpoint=True))
        if self.kind == "lognormal":
            return max(1, round(self.first * math.exp(self.second * rng.standard_normal())))
        return int(self.first)

    def __str__(self) -> str:
        if self.kind == "uniform":
            return f"{self.first:g}-{self.second:g}"
        if self.kind == "lognormal":
            return f"lognormal:{self.first:g},{self.second:g}"
        return f"{self.first:g}"


@dataclass(frozen=True)
class Traffic:
    """What is sent in one round; exactly one of ``rate``, ``streams`` and ``burst`` is not 0.

    rate     requests a second, Poisson arrivals, however many are unfinished
    streams  clients that send the next request when they have the answer to the last
    burst    that many at once
    share    part of the requests that begin with one of ``groups`` prefixes of ``prefix`` tokens
    leave    part of the clients that go away after ``leave_after`` pieces of the answer
    """

    requests: int
    input: Lengths
    output: Lengths
    rate: float = 0.0
    streams: int = 0
    burst: int = 0
    share: float = 0.0
    groups: int = 1
    prefix: int = 0
    leave: float = 0.0
    leave_after: int = 1

    def __post_init__(self) -> None:
        if sum(1 for given in (self.rate, self.streams, self.burst) if given) != 1:
            raise UsageError("give one of --rate, --streams and --burst")
        if self.rate < 0 or self.streams < 0 or self.burst < 0 or self.requests < 1:
            raise UsageError("rate, streams, burst and requests must be positive")
        for name in ("share", "leave"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name} is a part of the requests, from 0 to 1")
        if self.groups < 1 or self.prefix < 0 or self.leave_after < 1:
            raise UsageError("groups and leave-after must be at least 1, prefix at least 0")


@dataclass(frozen=True)
class Call:
    """One request. ``at``: seconds after the start, None when a stream is free; ``leave_after``
    pieces the client goes, None for one that stays; ``prompt`` as text or as token ids."""

    at: float | None
    prompt: str | tuple[int, ...]
    input_tokens: int
    output_tokens: int
    leave_after: int | None


def arrivals(rate: float, count: int, rng: Rng) -> list[float]:
    """Times of a Poisson process from 0 on: gaps are exponential with mean 1 / ``rate``."""
    return list(itertools.accumulate(rng.exponential(1 / rate, count)))


COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face level office door health person art war history party result change morning"
)
"""For servers whose tokenizer is not at hand; most tokenizers know each as one token."""


class Prompts:
    """Prompts of real words, with an exact number of tokens where the tokenizer is known.

    ``words``   one token each, with the space before it
    ``ids``     the tokens of these words, or empty where they are not known
    ``encode``  the tokens that the server makes of a text, with all that it puts around it
    """

    def __init__(
        self, words: Sequence[str], ids: Sequence[int], encode: Callable[[str], Sequence[int]]
    ) -> None:
        self.encode = encode
        self._words, self._ids = words, ids

    @staticmethod
    def common() -> Prompts:
        """Without a tokenizer: one token a word, which the server's own counts will correct."""
        return Prompts(COMMON_WORDS.split(), (), lambda text: range(len(text.split())))

    @staticmethod
    def of_model(path: Path, endpoint: Endpoint) -> Prompts:
        """With the tokenizer and template of a model file. SartorError where it has none."""
        checkpoint = open_checkpoint(path)
        try:
            tokenizer, template = load_text(checkpoint)
        finally:
            checkpoint.close()
        pieces = ((token, tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        known = {piece[1:].decode(): token for token, piece in pieces if _WORD.fullmatch(piece)}
        if not known:
            raise UsageError(f"{path}: its tokenizer has no words; leave out --tokenizer")

        def encode(text: str) -> Sequence[int]:
            if endpoint == "completions":
                return tokenizer.encode(text, add_special=True)
            if template is None:
                raise UsageError(f"{path} has no chat template; use --endpoint completions")
            chat = template.render([{"role": "user", "content": text}])
            return tokenizer.encode(chat, add_special=False)

        return Prompts(list(known), list(known.values()), encode)

    def draw(self, tokens: int, rng: Rng) -> list[int]:
        """Places in the list of words."""
        return [int(i) for i in rng.integers(0, len(self._words), max(tokens, 0))]

    def words(self, places: Sequence[int]) -> str:
        return " ".join(self._words[i] for i in places)

    def token_ids(self, tokens: int, prefix: Sequence[int], rng: Rng) -> tuple[int, ...]:
        """A prompt as token ids, which no server puts anything around."""
        if not self._ids:
            raise UsageError("prompts as token ids need --tokenizer")
        chosen = [*prefix, *self.draw(tokens - len(prefix), rng)]
        return tuple(self._ids[i] for i in chosen[:tokens])

    def text(self, tokens: int, prefix: Sequence[int], rng: Rng) -> str:
        """A text of so many tokens that begins with ``prefix``. UsageError where none can be."""
        around = len(self.encode(""))
        chosen = [*prefix, *self.draw(tokens - around - len(prefix), rng)]
        # Nearly always right at once: a word at the start, without a space, may be two tokens.
        for _ in range(16):
            text = self.words(chosen)
            excess = len(self.encode(text)) - tokens
            if excess == 0:
                return text
            if excess > 0 and len(chosen) - excess <= len(prefix):
                break
            chosen = chosen[:-excess] if excess > 0 else [*chosen, *self.draw(-excess, rng)]
        raise UsageError(
            f"no prompt of {tokens} tokens: the server puts {around} around it, and {len(prefix)} "
            "are the shared prefix; ask for longer ones"
        )


_WORD = re.compile(rb" [a-z]{3,}")


def plan_calls(
    traffic: Traffic,
    prompts: Prompts,
    seed: Sequence[int],
    *,
    as_ids: bool = False,
    common_seed: int = 0,
) -> list[Call]:
    """The requests of one round, in order. Shared prefixes come from ``common_seed``, so that
    rounds with other seeds have the same ones; all else from ``seed``."""
    prefixes = [
        prompts.draw(traffic.prefix, np.random.default_rng([common_seed, group]))
        for group in range(traffic.groups)
    ]
    rng = np.random.default_rng(seed)
    times: Sequence[float | None] = [None] * traffic.requests
    if traffic.rate:
        times = arrivals(traffic.rate, traffic.requests, rng)
    elif traffic.burst:
        times = [0.0] * traffic.requests
    make = prompts.token_ids if as_ids else prompts.text
    calls = []
    for at in times:
        length, output = traffic.input.draw(rng), traffic.output.draw(rng)
        shared = rng.random() < traffic.share
        prefix = prefixes[int(rng.integers(traffic.groups))] if shared else ()
        leaves = rng.random() < traffic.leave
        prompt = make(length, prefix, rng)
        calls.append(Call(at, prompt, length, output, traffic.leave_after if leaves else None))
    return calls
