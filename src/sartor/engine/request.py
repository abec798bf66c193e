"""What goes into the engine and what comes out: one request, one stream of chunks."""

from __future__ import annotations

import builtins
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sartor.engine.embedding import EmbeddingSegment
from sartor.errors import UsageError
from sartor.graph.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprob(NamedTuple):
    """One token with its natural log probability, before penalties and temperature.

    ``bytes`` is what the token stands for in running text (perhaps part of a character),
    ``text`` the same for display. ``top`` holds the likeliest alternatives in falling order.

    A tuple, since a step makes up to 21 of these for each of its tokens, and every one crosses to
    another process: a frozen dataclass takes three times as long for both.
    """

    token: int
    text: str
    bytes: builtins.bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    Together with the model and the plan it fixes the answer, so ``seed`` is a number even
    where ``params.seed`` is None: the caller draws it, and a replay reuses it.

    params     without open values: what the maker of the request left to the model's own values
               (:meth:`SamplingParams.resolved`) gets the defaults here
    emitted    per choice, tokens that an earlier run generated already: they are taken as they
               are and not reported again (replay after a worker died); empty for a fresh request
    salt       requests share cached prefixes only with requests of the same salt
    tenant     who asks: requests of one priority share the machine fairly between tenants
    share      the tenant's weight in that: twice the share, twice the tokens
    priority   higher runs first
    want_text  False leaves the text of the chunks empty, and saves making it
    adapter    name of a loaded adapter, empty for the model as it is
    segments   vectors in place of some tokens, whose ids in the prompt are placeholders
    left_out   tokens at the start that take no part in the vector of a text: those of a prompt
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    emitted: tuple[tuple[int, ...], ...] = ()
    salt: str = ""
    tenant: str = ""
    share: float = 1.0
    priority: int = 0
    want_text: bool = True
    adapter: str = ""
    segments: tuple[EmbeddingSegment, ...] = ()
    left_out: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", self.params.resolved())
        if not self.prompt:
            raise UsageError(f"request {self.id}: the prompt has no tokens; give at least one")
        if not 0 < self.share < math.inf:
            raise UsageError(f"request {self.id}: share is {self.share}; it must be above 0")
        if self.emitted and len(self.emitted) != self.params.n:
            raise UsageError(
                f"request {self.id}: emitted has {len(self.emitted)} lists for {self.params.n} "
                "choices; give one a choice, or none at all"
            )


@dataclass(frozen=True)
class Chunk:
    """What one step added to one choice of a request.

    ``tokens`` and ``logprobs`` (where asked for) are those of this step, the end-of-text token
    included; ``text`` is what became certain, which may lag behind the tokens. The last chunk
    of a choice, and no other, has a ``finish_reason``. ``completion_tokens`` counts the choice
    from its start, ``cached_tokens`` the prompt tokens whose state was found in the cache.
    ``embedding`` (float32, little-endian) is what an encoder makes of the prompt.
    ``prefill_seconds`` is what a choice's first token took from the first step that had a place
    for it; 0 in every other chunk.
    """

    request_id: str
    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    embedding: bytes = b""
    prefill_seconds: float = 0.0
