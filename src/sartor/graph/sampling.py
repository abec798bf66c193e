"""How a request wants its tokens chosen, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sartor.errors import UsageError
from sartor.graph.batch import SAMPLING_ROW

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_CHOICES = 128


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request; the defaults are plain sampling from the model.

    temperature         0 is greedy; top_k 0 and top_p 1 keep every token
    min_p               drops tokens below this share of the likeliest one (arXiv:2407.01082)
    repetition_penalty  over prompt and output, 1 is none (arXiv:1909.05858)
    presence_penalty, frequency_penalty   subtracted once, and by count, over the output
    logit_bias          added to the logits of single tokens
    seed                None draws one; equal seeds give equal answers
    n                   independent choices of one prompt
    logprobs            None for none, else alternatives to report (0: the chosen token only)
    max_tokens          None goes on to the context's end
    stop                strings that end the answer and are not part of it
    stop_token_ids      ids that end the answer beside the model's own
    ignore_eos          go on past the model's end-of-text tokens
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -100, 100)
        _within("frequency_penalty", self.frequency_penalty, -100, 100)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("n", self.n, 1, MAX_CHOICES)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**64 - 1)
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise UsageError(
                f"stop: at most {MAX_STOP_STRINGS} strings, none of them empty", fields=("stop",)
            )
        for token, value in self.logit_bias.items():
            if not isinstance(token, int) or token < 0:
                raise UsageError(f"logit_bias: {token!r} is not a token id")
            _within(f"logit_bias[{token}]", value, -100, 100)

    @property
    def needs_history(self) -> bool:
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    def row(self, *, seed: int, choice: int, prompt_length: int) -> npt.NDArray[np.void]:
        """The step's view of these parameters: one :data:`SAMPLING_ROW`; position is 0."""
        row = np.zeros(1, SAMPLING_ROW)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "top_k",
        ):
            row[name] = getattr(self, name)
        row["choice"] = choice
        row["seed"] = seed & (2**64 - 1)
        row["prompt_length"] = prompt_length
        row["logprobs"] = -1 if self.logprobs is None else self.logprobs
        return row


def _within(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(
            f"{name} is {value!r}; it must be a number from {low} to {high}", fields=(name,)
        )
