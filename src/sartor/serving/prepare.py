"""From the bytes of a request to what the engine takes: parsed, looked up, tokenised.

Pure: it depends on nothing but its arguments, so it runs where there is room for it, on the event
loop, on a thread or in a process of its own (see :mod:`sartor.serving.intake`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from sartor.errors import UsageError
from sartor.graph import SamplingParams
from sartor.serving.errors import ApiError, invalid, model_not_found, unsupported
from sartor.serving.frontend import Makes, ServedModel
from sartor.serving.limits import ServerLimits
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
    the texts to put before the answers to each prompt, where the request wants that. ``adapter``
    is empty for the model as it is. ``ignored`` names fields of messages that nobody knows.
    """

    body: B
    model: str
    adapter: str
    params: SamplingParams
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...] = ()
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


def lookup(models: Models, name: str) -> tuple[ServedModel, str] | None:
    """The model of that name, alias or adapter, and the adapter's name where it is one."""
    for model in models.values():
        if name == model.name or name in model.aliases:
            return model, ""
    for model in models.values():
        if name in model.adapters:
            return model, name
    return None


def find_model(
    models: Models, name: str, view: View, makes: Makes | None = None
) -> tuple[ServedModel, str]:
    """The model that a request names, and the adapter where the name is one's ("" else).

    Raises ApiError 404, and 400 where the model makes other things.
    """
    found = lookup(models, name) if view.shows(name) else None
    if found is None:
        known = [
            n for model in models.values() for n in (model.name, *model.listed, *model.adapters)
        ]
        raise model_not_found(name, [n for n in known if view.shows(n)])
    if makes not in (None, found[0].makes):
        route = "/v1/embeddings" if makes == "text" else "/v1/chat/completions"
        raise invalid(f"the model {name} makes {found[0].makes}, not {makes}; use {route}", "model")
    return found


def _chat(body: ChatRequest, models: Models, view: View) -> Prepared[ChatRequest]:
    model, adapter = find_model(models, body.model, view, "text")
    params = sampling_params(body, model, view.limits)
    text = model.chat_text(
        [message.plain() for message in body.messages], body.chat_template_kwargs or {}
    )
    prompt = _encode(text, "messages", model, view.limits, special=False)
    lean = body.model_copy(update={"messages": [], **_HEAVY, "chat_template_kwargs": None})
    ignored = frozenset[str]().union(*(message.ignored() for message in body.messages))
    return Prepared(lean, model.name, adapter, params, (prompt,), ignored=ignored)


def _completion(body: CompletionRequest, models: Models, view: View) -> Prepared[CompletionRequest]:
    model, adapter = find_model(models, body.model, view, "text")
    params = sampling_params(body, model, view.limits)
    given = _each(body.prompt, "prompt")
    prompts = _encode_all(given, "prompt", model, view.limits)
    echoes = tuple(
        prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        for prompt in (given if body.echo else ())
    )
    lean = body.model_copy(update={"prompt": "", **_HEAVY})
    return Prepared(lean, model.name, adapter, params, prompts, echoes)


def _embeddings(body: EmbeddingRequest, models: Models, view: View) -> Prepared[EmbeddingRequest]:
    model, _ = find_model(models, body.model, view, "embeddings")
    prompts = _encode_all(_each(body.input, "input"), "input", model, view.limits)
    lean = body.model_copy(update={"input": ""})
    return Prepared(lean, model.name, "", SamplingParams(seed=0), prompts)


_HEAVY = {"metadata": None, "logit_bias": None, "stop": None, "stop_token_ids": None}
"""What is in the sampling parameters already, or nowhere needed."""


def sampling_params(
    body: ChatRequest | CompletionRequest, model: ServedModel, limits: ServerLimits
) -> SamplingParams:
    """The request's parameters as the engine takes them. Raises ApiError 400."""
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
    top_k = 0 if body.top_k in (None, -1) else body.top_k  # -1 is vLLM's spelling of "all"
    stop = body.stop or ()
    try:
        return SamplingParams(
            logprobs=logprobs,
            max_tokens=max_tokens or limits.max_tokens or None,
            logit_bias=bias,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=stops,
            top_k=top_k or 0,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
    except UsageError as error:
        raise invalid(str(error)) from None


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
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(_encode(prompt, param, model, limits, special=True))
        else:
            _check(prompt, param, model, limits)
            encoded.append(tuple(prompt))
    return tuple(encoded)


def _encode(
    text: str, param: str, model: ServedModel, limits: ServerLimits, *, special: bool
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
    try:
        ids = tuple(model.tokenizer.encode(text, add_special=special))
    except UsageError as error:
        raise invalid(f"{param}: {error}", param) from None
    _check(ids, param, model, limits)
    return ids


def _check(prompt: Collection[int], param: str, model: ServedModel, limits: ServerLimits) -> None:
    if limits.prompt_tokens and len(prompt) > limits.prompt_tokens:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, and this server's limit is "
            f"{limits.prompt_tokens} (--max-prompt-tokens); shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    model.check_prompt(prompt, param)
