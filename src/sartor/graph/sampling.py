"""How a request wants its tokens chosen, and when to stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sartor.errors import UsageError
from sartor.graph.batch import SAMPLING_ROW

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_CHOICES = 128

SAMPLING_LIMITS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}
"""What a model may have values of its own for, and the least and largest of each."""


def check_sampling(name: str, value: object) -> None:
    """Raises UsageError where ``value`` is none that the parameter of that name may have."""
    _within(name, value, *SAMPLING_LIMITS[name])


_SHOWN = 80
_WHOLE = frozenset({"top_k", "n", "logprobs", "max_tokens", "seed"})


def _within(name: str, value: object, low: float, high: float) -> None:
    kinds = int if name in _WHOLE else int | float
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (number and low <= value <= high):  # type: ignore[operator]  # NaN is in no range
        what = "a whole number" if name in _WHOLE else "a number"
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
        raise UsageError(
            f"{name} is {shown}; it must be {what} from {low} to {high}", fields=(name,)
        )


@dataclass(frozen=True)
class SamplingDefaults:
    """What is taken where a request says nothing: a model's own values, or those of a preset.

    None: nothing is said here either. ``origin`` says where the values are from, for people, and
    ``notes`` has a line for each value there that could not be taken.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    origin: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.said().items():
            check_sampling(name, value)

    def said(self) -> dict[str, float]:
        """The values that there are, by name."""
        values = {name: getattr(self, name) for name in SAMPLING_LIMITS}
        return {name: value for name, value in values.items() if value is not None}


UNSAID = SamplingDefaults()
DEFAULT_SAMPLING = SamplingDefaults(
    temperature=0.7, top_p=0.95, top_k=0, min_p=0.0, repetition_penalty=1.0, origin="default"
)
"""What is taken where neither the request nor the model says anything."""

_NEUTRAL = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}


def sampling_in_effect(*layers: SamplingDefaults) -> dict[str, tuple[float, str]]:
    """Value and origin by name: of the first layer that says something, else of the default."""
    found: dict[str, tuple[float, str]] = {}
    for layer in (DEFAULT_SAMPLING, *reversed(layers)):
        found |= {name: (value, layer.origin) for name, value in layer.said().items()}
    return found


def describe_sampling(*layers: SamplingDefaults) -> str:
    """One line for people: the temperature, whatever else changes something, and where from."""
    found = sampling_in_effect(*layers)
    by_origin: dict[str, list[str]] = {}
    for name in SAMPLING_LIMITS:
        value, origin = found[name]
        if name == "temperature" or value != _NEUTRAL[name]:
            shown = f"{name.replace('_', ' ' if name == 'repetition_penalty' else '-')} {value:g}"
            by_origin.setdefault(origin, []).append(shown)
    return "; ".join(f"{', '.join(values)} ({origin})" for origin, values in by_origin.items())


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request.

    None stands, in the first five, for the model's own value (``generation_config.json``, or the
    sampling keys of a GGUF file), and where it has none for :data:`DEFAULT_SAMPLING`: temperature
    0.7, top_p 0.95, nothing else. ``SamplingParams(temperature=1, top_p=1)`` is plain sampling
    from a model without values of its own.

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

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
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
        for name in SAMPLING_LIMITS:
            value = getattr(self, name)
            if value is not None:
                check_sampling(name, value)
        _within("presence_penalty", self.presence_penalty, -100, 100)
        _within("frequency_penalty", self.frequency_penalty, -100, 100)
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

    def resolved(self, *layers: SamplingDefaults) -> SamplingParams:
        """The same without None in the first five: what is given, else what the first of the
        ``layers`` says (a preset's, the model's own), else the default. The engine sees no others,
        so that a replay draws by the same values."""
        missing = [name for name in SAMPLING_LIMITS if getattr(self, name) is None]
        if not missing:
            return self
        found = sampling_in_effect(*layers)
        return dataclasses.replace(self, **{name: found[name][0] for name in missing})  # type: ignore[arg-type]

    @property
    def needs_history(self) -> bool:
        return bool(
            self.repetition_penalty not in (None, 1)
            or self.presence_penalty
            or self.frequency_penalty
        )

    def row(self, *, seed: int, choice: int, prompt_length: int) -> npt.NDArray[np.void]:
        """The step's view of these parameters: one :data:`SAMPLING_ROW`; position is 0."""
        row = np.zeros(1, SAMPLING_ROW)
        whole = self.resolved()
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "top_k",
        ):
            row[name] = getattr(whole, name)
        row["choice"] = choice
        row["seed"] = seed & (2**64 - 1)
        row["prompt_length"] = prompt_length
        row["logprobs"] = -1 if self.logprobs is None else self.logprobs
        return row
