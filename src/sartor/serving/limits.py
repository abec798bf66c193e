"""How much one client, one request and all of them together may take."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sartor.errors import UsageError


@dataclass(frozen=True)
class ServerLimits:
    """Hard limits of a server; each error about one names it. Numbers are inclusive; those of
    choices and stop strings can only be lowered, since the engine takes no more.

    Bytes on the way in:

    body_bytes        of one request
    bodies_bytes      of all requests together that are being read
    key_part          how much of that, of unfinished prompts and of answers that wait, and of the
                      places for work, one key may have where there are several: from 0 to 1
    body_seconds      until a body is there as a whole: slow senders hold a connection, and no more
    head_seconds      the same for request line and headers, and for unread rests of a body
    idle_seconds      that a connection may wait for its next request
    connections       at once
    peer_connections  of one address; never more than half of all, where that is 64 or more

    What a body may ask for:

    json_depth        of objects and lists in each other
    json_values       in all of a body
    prompt_tokens     of one prompt; 0: as many as the model's context holds
    chars_per_token   a prompt with more characters than this for each token that there may be is
                      refused before it is tokenised, which would take long and end the same way
    max_tokens        of one answer; 0: as many as the context holds. Where a request names no
                      number it gets this one
    messages          of one chat
    prompts           in one request
    choices           (``n``) of one prompt
    sequences         prompts x choices of one request
    stop_strings      and the characters of each (``stop_chars``)
    logit_biases      tokens with a bias

    logprobs          tokens x (1 + alternatives) in all of an answer that is not streamed
    answers_bytes     of all answers that wait to be taken: what is not streamed until its end, and
                      of streams what their readers have not taken. Beyond it, the largest answer of
                      the key that has most is given up

    request_seconds   from a request's admission to the end of its answer; 0: no limit
    """

    body_bytes: int = 8 * 2**20
    bodies_bytes: int = 128 * 2**20
    key_part: float = 0.5
    body_seconds: float = 30.0
    head_seconds: float = 10.0
    idle_seconds: float = 5.0
    connections: int = 4096
    peer_connections: int = 2048
    json_depth: int = 64
    json_values: int = 2**20
    prompt_tokens: int = 0
    chars_per_token: int = 32
    max_tokens: int = 0
    messages: int = 2048
    prompts: int = 1024
    choices: int = 128
    sequences: int = 1024
    stop_strings: int = 16
    stop_chars: int = 1024
    logit_biases: int = 1024
    logprobs: int = 2**20
    answers_bytes: int = 256 * 2**20
    request_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("prompt_tokens", "max_tokens", "request_seconds") else 1
            if field.name.endswith("_seconds") or field.name == "key_part":
                least = 0
            value = getattr(self, field.name)
            if not value >= least:
                raise UsageError(
                    f"limits: {field.name} is {value}; it must be at least {least}",
                    fields=(field.name,),
                )
            if field.name == "key_part" and not 0 < value <= 1:
                raise UsageError(
                    f"limits: key_part is {value}; it must be above 0 and at most 1",
                    fields=(field.name,),
                )
            if not math.isfinite(value):
                none = "; 0 sets no limit" if field.name == "request_seconds" else ""
                raise UsageError(
                    f"limits: {field.name} is {value}; it must be a number{none}",
                    fields=(field.name,),
                )
