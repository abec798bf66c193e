"""From the bytes of a request to what the engine takes: parsed, looked up, tokenised.

Pure: it depends on nothing but its arguments, so it runs where there is room for it, on the event
loop, on a thread or in a process of its own (see :mod:`sartor.serving.intake`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from sartor.engine.preset import Preset
from sartor.engine.vectors import dimensions_of, left_out, prompt_text
from sartor.errors import UsageError
from sartor.graph import SamplingParams
from sartor.serving.errors import (
    ApiError,
    invalid,
    model_not_found,
    too_large,
    unsupported,
)
from sartor.serving.frontend import Makes, ServedModel
from sartor.serving.limits import ServerLimits
from sartor.serving.names import ServedName, lookup, served_names
from sartor.serving.openai_types import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Prompts,
)
from sartor.serving.validation import parse

B = TypeVar("B", ChatRequest, CompletionRequest, EmbeddingRequest)
Models = Mapping[str, ServedModel]


@dataclass(frozen=True)
class Prepared(Generic[B]):
    """A request that is ready for the engine.

    ``body`` is the typed request without its texts, which have become ``prompts``; ``echoes`` are
    the texts to put before the answers to each prompt, where the request wants that. ``name`` is
    the model as answers name it; ``adapter`` is empty for the model as it is. ``left_out`` are the
    tokens at the start of each prompt that take no part in its vector; empty where all do.
    ``ignored`` names fields of messages that nobody knows.
    """

    body: B
    name: str
    model: str
    adapter: str
    params: SamplingParams
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class View:
    """What a client may see of the server: limits, and names of models (None: all)."""

    limits: ServerLimits
    names: frozenset[str] | None = None

    def shows(self, name: str) -> bool:
        return self.names is None or name in self.names


def prepare(kind: type[B], raw: bytes, models: Models, view: View) -> Prepared[B]:
    """Raises ApiError 4xx that says what is wrong."""
    body = parse(kind, raw, view.limits)
    if isinstance(body, ChatRequest):
        return _chat(body, models, view)  # type: ignore[return-value]  # B is ChatRequest here
    if isinstance(body, CompletionRequest):
        return _completion(body, models, view)  # type: ignore[return-value]
    return _embeddings(body, models, view)


def seen_names(models: Models, view: View) -> list[ServedName]:
    """The names that somebody may ask for: those that are listed, and those that the key names
    otherwise (the path of a model)."""
    seen = [served for served in served_names(models) if view.shows(served.name)]
    unlisted = (view.names or frozenset()) - {served.name for served in seen}
    return seen + [found for name in sorted(unlisted) if (found := lookup(models, name))]


def find_model(models: Models, name: str, view: View, makes: Makes | None = None) -> ServedName:
    """What a request names. Raises ApiError 404, and 400 where the model makes other things."""
    found = lookup(models, name) if view.shows(name) else None
    if found is None:
        raise model_not_found(name, [served.name for served in seen_names(models, view)])
    made = found.model.makes
    if makes not in (None, made):
        route = "/v1/embeddings" if makes == "text" else "/v1/chat/completions"
        raise invalid(f"the model {name} makes {made}, not {makes}; use {route}", "model")
    return found


def _chat(body: ChatRequest, models: Models, view: View) -> Prepared[ChatRequest]:
    found = find_model(models, body.model, view, "text")
    model, preset = found.model, found.preset or Preset("")
    params = sampling_params(body, found, view.limits)
    chat = model.chat(
        preset.opened([message.plain() for message in body.messages]),
        {**preset.template, **(body.chat_template_kwargs or {})},
    )
    prompt = _encode(chat.text, "messages", model, view.limits, chat.encode)
    _check_logprobs(body, params, [prompt], model, view.limits)
    lean = body.model_copy(update={"messages": [], **_HEAVY, "chat_template_kwargs": None})
    ignored = frozenset[str]().union(*(message.ignored() for message in body.messages))
    return Prepared(lean, found.name, model.name, found.adapter, params, (prompt,), ignored=ignored)


def _completion(body: CompletionRequest, models: Models, view: View) -> Prepared[CompletionRequest]:
    found = find_model(models, body.model, view, "text")
    model = found.model
    params = sampling_params(body, found, view.limits)
    given = _each(body.prompt, "prompt")
    prompts = _encode_all(given, "prompt", model, view.limits)
    _check_logprobs(body, params, prompts, model, view.limits)
    echoes = tuple(
        prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        for prompt in (given if body.echo else ())
    )
    lean = body.model_copy(update={"prompt": "", **_HEAVY})
    return Prepared(lean, found.name, model.name, found.adapter, params, prompts, echoes)


def _embeddings(body: EmbeddingRequest, models: Models, view: View) -> Prepared[EmbeddingRequest]:
    model = find_model(models, body.model, view, "embeddings").model
    vectors, given = model.vectors, _each(body.input, "input")
    assert vectors is not None
    try:
        dimensions = dimensions_of(vectors, model.width, body.dimensions)
    except UsageError as error:
        raise invalid(str(error), "dimensions") from None
    try:
        prompt = prompt_text(vectors, body.prompt_name)
    except UsageError as error:
        raise invalid(str(error), "prompt_name") from None
    if body.prompt_name is not None and not all(isinstance(one, str) for one in given):
        raise invalid("prompt_name: a prompt goes in front of text; token ids take none", "input")
    texts = [prompt + one if isinstance(one, str) else one for one in given]
    prompts = _encode_all(texts, "input", model, view.limits)
    skipped = left_out(vectors, model.tokenizer, prompt)
    counts = tuple(skipped if isinstance(one, str) else 0 for one in given)
    for count, ids in zip(counts, prompts, strict=True):
        if count >= len(ids):
            raise invalid("input: a text is empty behind its prompt; send some text", "input")
    lean = body.model_copy(update={"input": "", "dimensions": dimensions})
    params = SamplingParams(seed=0)
    return Prepared(lean, model.name, model.name, "", params, prompts, left_out=counts)


_HEAVY = {"metadata": None, "logit_bias": None, "stop": None, "stop_token_ids": None}
"""What is in the sampling parameters already, or nowhere needed."""


def sampling_params(
    body: ChatRequest | CompletionRequest, served: ServedName, limits: ServerLimits
) -> SamplingParams:
    """The request's parameters as the engine takes them; what it leaves open is the preset's, the
    model's own, or the default. Raises ApiError 400."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: only allowed where stream is true", "stream_options")
    max_tokens = body.max_tokens
    if isinstance(body, ChatRequest):
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs: only allowed where logprobs is true", "top_logprobs")
        if body.max_completion_tokens is not None:
            if max_tokens not in (None, body.max_completion_tokens):
                raise invalid(
                    "max_tokens: differs from max_completion_tokens, which is its newer name; "
                    "send one of them",
                    "max_tokens",
                )
            max_tokens = body.max_completion_tokens
    else:
        logprobs = body.logprobs
        max_tokens = max_tokens or DEFAULT_COMPLETION_TOKENS
        if body.echo and logprobs is not None:
            raise unsupported("echo", "with logprobs it asks for log probabilities of the prompt")
    model = served.model
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    model.check_tokens(tuple(bias), "logit_bias")
    stops = tuple(body.stop_token_ids or ())
    model.check_tokens(stops, "stop_token_ids")
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "n": body.n,
        "seed": body.seed,
        "ignore_eos": body.ignore_eos,
    }
    top_k = 0 if body.top_k == -1 else body.top_k  # -1 is vLLM's spelling of "all"
    stop = body.stop or ()
    try:
        return SamplingParams(
            logprobs=logprobs,
            max_tokens=max_tokens or limits.max_tokens or None,
            logit_bias=bias,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=stops,
            top_k=top_k,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        ).resolved(*served.sampling)
    except UsageError as error:
        raise invalid(str(error)) from None


def _check_logprobs(
    body: ChatRequest | CompletionRequest,
    params: SamplingParams,
    prompts: Sequence[Sequence[int]],
    model: ServedModel,
    limits: ServerLimits,
) -> None:
    """Raises ApiError 400 where an answer that is kept as a whole may have too many of them."""
    if body.stream or params.logprobs is None:
        return
    rows = (1 + params.logprobs) * params.n
    room = model.context_length
    tokens = sum(min(params.max_tokens or room, max(room - len(p), 0)) for p in prompts)
    if tokens * rows > limits.logprobs:
        raise too_large(
            "logprobs",
            f"the answer may have {tokens * rows} log probabilities ({tokens} tokens x {params.n} "
            f"choices x {1 + params.logprobs}), and the limit for one that is not streamed is "
            f"{limits.logprobs}; lower max_tokens, n or logprobs, or stream it",
        )


def _each(given: Prompts, param: str) -> list[str | list[int]]:
    """The prompts of a request, be they one or several. Raises ApiError 400 where there is none."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise invalid(f"{param}: the list is empty; send at least one", param)
    return list(cast(list[str | list[int]], given))


def _encode_all(
    prompts: Sequence[str | list[int]], param: str, model: ServedModel, limits: ServerLimits
) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt. Raises ApiError 400 for one that the model cannot take."""
    encoded: list[tuple[int, ...]] = []
    for prompt in prompts:
        try:
            if isinstance(prompt, str):
                encode = functools.partial(model.tokenizer.encode, prompt)
                encoded.append(_encode(prompt, param, model, limits, encode))
            else:
                _check(prompt, param, model, limits)
                encoded.append(tuple(prompt))
        except ApiError as error:  # those before it were work, too
            error.tokens += sum(map(len, encoded))
            raise
    return tuple(encoded)


def _encode(
    text: str,
    param: str,
    model: ServedModel,
    limits: ServerLimits,
    encode: Callable[[], list[int]],
) -> tuple[int, ...]:
    most = min(limits.prompt_tokens or model.context_length, model.context_length)
    if len(text) > most * limits.chars_per_token:
        raise ApiError(
            400,
            f"the prompt has {len(text)} characters, and the limit is {limits.chars_per_token} for "
            f"each of the {most} tokens that there may be; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    if count := _surely_above(most, text, model):
        _check_length(count, param, model, limits, at_least=True)
    try:
        ids = tuple(encode())
    except UsageError as error:
        raise invalid(f"{param}: {error}", param) from None
    _check(ids, param, model, limits)
    return ids


_USUAL_CHARS = 4  # of a token; a text with fewer for each that may be is counted in one go
_SLICE_CHARS = 1 << 16


def _surely_above(most: int, text: str, model: ServedModel) -> int:
    """How many tokens were counted when the text had surely too many; 0 for one that may do.

    A text that is far too long costs no more this way than the longest that is taken. It is
    counted in slices; where these meet, and where a cut changes how the rest is divided, it may
    have a few tokens less, so what is near the limit is left to the exact count.
    """
    if len(text) <= max(most * _USUAL_CHARS, _SLICE_CHARS):
        return 0
    count = 0
    for begin in range(0, len(text), _SLICE_CHARS):
        try:
            count += len(
                model.tokenizer.encode(text[begin : begin + _SLICE_CHARS], add_special=False)
            )
        except UsageError:
            return 0
        if count > most + most // 8 + 1024:
            return count
    return 0


def _check(prompt: Collection[int], param: str, model: ServedModel, limits: ServerLimits) -> None:
    _check_length(len(prompt), param, model, limits)
    model.check_prompt(prompt, param)


def _check_length(
    tokens: int, param: str, model: ServedModel, limits: ServerLimits, *, at_least: bool = False
) -> None:
    if limits.prompt_tokens and tokens > limits.prompt_tokens:
        raise ApiError(
            400,
            f"the prompt has {'at least ' * at_least}{tokens} tokens, and this server's limit is "
            f"{limits.prompt_tokens} (--max-prompt-tokens); shorten the prompt",
            param=param,
            code="context_length_exceeded",
            tokens=tokens,
        )
    model.check_length(tokens, param, at_least=at_least)
