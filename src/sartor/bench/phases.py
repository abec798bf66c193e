"""The measured phases: one prompt, decoding after it, and decoding in a batch.

Times are taken around whole engine steps, so scheduling, batch building, sampling and the
making of chunks and text are all inside.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sartor.engine.engine import Engine
from sartor.engine.request import Chunk, Request
from sartor.errors import CapacityError, SartorError
from sartor.graph import SamplingParams, StepShape
from sartor.text.tokenizer import Tokenizer

PROMPT_TOKENS = 512
DECODE_TOKENS = 64
BATCH_PROMPT_TOKENS = 128
BATCH_DECODE_TOKENS = 32
CONTEXT = PROMPT_TOKENS + DECODE_TOKENS + 1
"""Tokens that a model must be able to hold: the prompt's own output and 64 more."""

GREEDY = SamplingParams(temperature=0, ignore_eos=True)
_ids = itertools.count()


@dataclass(frozen=True)
class Single:
    """Rates in tokens a second of one request; ``host_share`` of the decode steps. ``tokens`` are
    the answer."""

    prompt: float
    decode: float
    host_share: float
    tokens: tuple[int, ...] = ()


def synthetic_prompt(
    seed: int, length: int, vocab: int, special: frozenset[int]
) -> tuple[int, ...]:
    """Pseudo-random token ids, the same for equal arguments, none of them special."""
    plain = np.setdiff1d(np.arange(vocab), np.fromiter(special, np.int64, len(special)))
    return tuple(np.random.default_rng(seed).choice(plain, length).tolist())


def shapes(batches: Sequence[int], max_batch_tokens: int) -> dict[str, list[StepShape]]:
    """The steps of every phase by name, as the engine makes them of so many tokens at most.

    In a batch every sequence stands at the end of its prompt when the measured steps begin; in
    truth some are a few tokens further.
    """
    prompt = [
        StepShape((min(max_batch_tokens, PROMPT_TOKENS - at),), (at,), 0)
        for at in range(0, PROMPT_TOKENS, max_batch_tokens)
    ]
    prompt[-1] = dataclasses.replace(prompt[-1], outputs=1)

    def decoding(sequences: int, context: int, steps: int) -> list[StepShape]:
        ones = (1,) * sequences
        return [StepShape(ones, (context + i,) * sequences, sequences) for i in range(steps)]

    return {
        f"prompt_{PROMPT_TOKENS}": prompt,
        "decode": decoding(1, PROMPT_TOKENS, DECODE_TOKENS),
        **{
            f"batch_{size}": decoding(size, BATCH_PROMPT_TOKENS, BATCH_DECODE_TOKENS)
            for size in batches
        },
    }


def costs(batches: Sequence[int]) -> dict[str, int]:
    """What the phases take beside each other, roughly, in tokens of a prompt; in their order."""

    def steps(count: int, sequences: int) -> int:
        return count * (8 + 3 * sequences)

    return {
        f"prompt_{PROMPT_TOKENS}": PROMPT_TOKENS,
        "decode": steps(DECODE_TOKENS, 1),
        **{
            f"batch_{size}": size * BATCH_PROMPT_TOKENS + steps(BATCH_DECODE_TOKENS, size)
            for size in batches
        },
    }


Mark = Callable[[str], None]
"""Called with the name of a phase when it has ended, and with "" where one is about to begin."""


def single(
    engine: Engine,
    seed: int,
    mark: Mark = lambda phase: None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
) -> Single:
    """One prompt, then so many tokens after the one that the prompt gives."""
    request = _request(engine, seed, prompt_tokens)
    answer: list[int] = []
    started = time.perf_counter()
    engine.add(request)
    while not answer:
        answer += _answered(engine.step())
    prompt_seconds = time.perf_counter() - started
    mark(f"prompt_{prompt_tokens}")
    first = len(answer)
    started = time.perf_counter()
    steps = 0
    while len(answer) < first + decode_tokens:
        answer += _answered(engine.step())
        steps += 1
    decode_seconds = time.perf_counter() - started
    mark("decode")
    records = list(engine.records)[-steps:]
    _end(engine, [request])
    host = sum(r.host_seconds for r in records)
    whole = host + sum(r.execute_seconds for r in records)
    return Single(
        prompt_tokens / prompt_seconds,
        decode_tokens / decode_seconds,
        host / whole,
        tuple(answer),
    )


def batch(engine: Engine, size: int, seed: int, mark: Mark = lambda phase: None) -> float:
    """Tokens a second of ``size`` requests over 32 steps in which all of them decode."""
    requests = [_request(engine, seed + i, BATCH_PROMPT_TOKENS) for i in range(size)]
    for request in requests:
        engine.add(request)
    begun: set[str] = set()
    while len(begun) < size:
        chunks = engine.step()
        _tokens(chunks)
        begun |= {chunk.request_id for chunk in chunks}
        if engine.records[-1].preempted:
            raise _too_large(size)
    mark("")
    started = time.perf_counter()
    done = 0
    for _ in range(BATCH_DECODE_TOKENS):
        done += _tokens(engine.step())
    seconds = time.perf_counter() - started
    mark(f"batch_{size}")
    _end(engine, requests)
    if done != size * BATCH_DECODE_TOKENS:
        raise _too_large(size)
    return done / seconds


def _too_large(size: int) -> CapacityError:
    return CapacityError(
        f"a batch of {size} does not fit in the sequence state; measure a smaller batch, or raise "
        "state_bytes"
    )


def _request(engine: Engine, seed: int, length: int) -> Request:
    vocab = engine.executable.program.vocab
    return synthetic_request(engine.tokenizer, vocab, seed, length)


def synthetic_request(tokenizer: Tokenizer, vocab: int, seed: int, length: int) -> Request:
    """A greedy request for a :func:`synthetic_prompt` that the model knows."""
    vocab = min(vocab, tokenizer.vocab_size)
    prompt = synthetic_prompt(seed, length, vocab, tokenizer.special_ids | tokenizer.eos_ids)
    return Request(f"bench-{next(_ids)}", prompt, GREEDY, seed=0)


def _tokens(chunks: Sequence[Chunk]) -> int:
    return len(_answered(chunks))


def _answered(chunks: Sequence[Chunk]) -> list[int]:
    """Tokens of a step; SartorError where a request failed."""
    for chunk in chunks:
        if chunk.error is not None:
            raise SartorError(f"the model failed while it was measured: {chunk.error}")
    return [token for chunk in chunks for token in chunk.tokens]


def _end(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.abort(request.id)
    while engine.has_work:
        engine.step()
