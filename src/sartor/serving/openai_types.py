"""Requests of the OpenAI API, as far as they are honoured.

Every parameter is honoured, or a documented no-op, or refused by name
(:mod:`sartor.serving.parameters` prints them all):

- :data:`NO_OPS` are taken and change nothing: they concern the operator of a service, not the
  answer;
- :data:`REFUSED` lists what the API knows and this server does not do yet;
- anything else is unknown, and refused by name as well.

Fields of messages are another matter: clients send back what answers of this server or of others
had in them, and mean nothing by it. Those that are unknown are left out, and the log says so once.

Source: the OpenAI API reference (chat, completions and embeddings); ``top_k``, ``min_p``,
``repetition_penalty``, ``ignore_eos``, ``stop_token_ids``, ``chat_template_kwargs``, ``priority``
and ``cache_salt`` are extensions in the spelling of vLLM: a lower ``priority`` runs earlier, and 0
is that of the request's API key, before which no request can go; ``cache_salt`` keeps the prompt
from being found in the prefix cache by requests with another one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic_core import PydanticCustomError

from sartor.graph.sampling import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    sampling_in_effect,
)

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of /v1/completions where none is given, as in the OpenAI API."""

REFUSED: dict[str, str] = {
    "tools": "tool calling",
    "tool_choice": "tool calling",
    "parallel_tool_calls": "tool calling",
    "functions": "function calling",
    "function_call": "function calling",
    "response_format": "a response format other than text",
    "audio": "audio output",
    "modalities": "a modality other than text",
    "prediction": "predicted output",
    "reasoning_effort": "control of reasoning",
    "verbosity": "control of verbosity",
    "web_search_options": "web search",
    "moderation": "moderation",
    "logit_processors": "custom logit processing",
    "logits_processors": "custom logit processing",
    "guided_json": "constrained output",
    "guided_regex": "constrained output",
    "guided_choice": "constrained output",
    "guided_grammar": "constrained output",
    "structured_outputs": "constrained output",
    "suffix": "text to end at",
    "best_of": "choosing the best of several answers",
    "use_beam_search": "beam search",
    "min_tokens": "a least number of tokens",
    "prompt_logprobs": "log probabilities of the prompt",
    "grammar": "constrained output",
    "json_schema": "constrained output",
    "bad_words": "forbidden words",
    "chat_template": "a chat template of its own",
    "add_generation_prompt": "a prompt without the head of the answer",
    "continue_final_message": "the end of a message that is begun",
    "truncate_prompt_tokens": "a prompt that is cut",
    "return_token_ids": "token ids in the answer",
    "skip_special_tokens": "special tokens in the text",
    "spaces_between_special_tokens": "special tokens in the text",
    "include_stop_str_in_output": "the stop string in the text",
    "length_penalty": "beam search",
    "early_stopping": "beam search",
}
"""Parameters that are known and not done yet, and what they ask for."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
}
"""Values of refused parameters that ask for nothing, beside null."""

NO_OPS: dict[str, str] = {
    "user": "whom a service answers",
    "safety_identifier": "whom a service answers",
    "metadata": "what a service keeps with the answer",
    "store": "whether a service keeps the answer; nothing is kept here",
    "service_tier": "what a service charges",
    "prompt_cache_key": "prefixes are cached in any case",
    "prompt_cache_retention": "prefixes are cached in any case",
}
"""Parameters that are taken and change nothing, and what they are about."""

RENAMED: dict[str, str] = {
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
}
"""Names that other programs have for parameters of this API."""

REFUSED_IN_MESSAGES: dict[str, str] = {
    "tool_calls": "tool calling",
    "tool_call_id": "tool calling",
    "function_call": "function calling",
    "audio": "audio",
    "refusal": "a refusal of the model",
}
"""Fields of messages that mean something and are not done yet; null and [] ask for nothing."""
REFUSED_ROLES = ("tool", "function")
REFUSED_PARTS = ("image_url", "input_audio", "file", "video_url", "refusal")

# fail_fast: a list of a million wrong elements is one error, not a million.
Ids = Annotated[list[int], Field(fail_fast=True)]
Prompts = (
    str
    | Ids
    | Annotated[list[str], Field(fail_fast=True)]
    | Annotated[list[Ids], Field(fail_fast=True)]
)


def _whole(value: object) -> object:
    return int(value) if type(value) is float and value.is_integer() else value


# 1.0 is an integer to JSON Schema, and to languages that know one kind of number.
# Last of an annotation's parts, since constraints before it are those that schemas show.
WHOLE = BeforeValidator(_whole)
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
TokenKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE]
Later = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
Salt = Annotated[str, Field(min_length=1, max_length=1024)]


def _false(value: bool) -> bool:
    if value:
        raise PydanticCustomError("only_false", "Only false can be honoured")
    return value


# Not Literal[False], which takes 0.0 for it.
Off = Annotated[bool, AfterValidator(_false), Field(json_schema_extra={"const": False})]


def _open(name: str) -> Any:
    """A parameter that a model may have a value of its own for."""
    default = sampling_in_effect()[name][0]
    return Field(
        None,
        description="Where it is left out, or null: the value of the preset that is asked for, "
        f"else the model's own, else {default:g}.",
    )


class Strict(BaseModel):
    # Strict: "0.5" is not a number and 1 is not true. NaN and infinity are no JSON numbers.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ForModels(Strict):
    """Requests that a model answers: what :data:`REFUSED` says is of these."""


class StreamOptions(Strict):
    """``include_obfuscation`` pads events against eavesdroppers; only false can be honoured.

    ``continuous_usage_stats``, an extension of vLLM, has the usage so far in every event where
    ``include_usage`` wants it at all.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Off | None = None


class Generation(ForModels):
    """Parameters that chat and completions share; the last ones are :data:`NO_OPS`.

    What a request leaves open of ``temperature``, ``top_p``, ``top_k``, ``min_p`` and
    ``repetition_penalty`` is the preset's, else the model's own, else the default.
    """

    model: str
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = _open("temperature")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = _open("top_p")
    n: Choices | None = None
    stop: StopString | StopStrings | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = _open("top_k")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = _open("min_p")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = _open(
        "repetition_penalty"
    )
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=256, fail_fast=True)] | None = None
    priority: Later | None = None
    cache_salt: Salt | None = None

    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Echo(BaseModel):
    """What clients send back as they got it: fields that nobody knows are kept apart."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class TextPart(Echo):
    type: Literal["text"]
    text: str


def _describe_message(schema: dict[str, Any]) -> None:
    schema["properties"] |= {name: {"enum": [None, []]} for name in REFUSED_IN_MESSAGES}


class Message(Echo):
    """One message of a chat. ``name`` reaches the template, which may or may not show it.

    ``developer`` counts as ``system``: templates know no other role for instructions.
    """

    model_config = ConfigDict(json_schema_extra=_describe_message)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """As templates take it; no content is their business too."""
        role = "system" if self.role == "developer" else self.role
        content: object = self.content
        if isinstance(self.content, list):
            content = [{"type": part.type, "text": part.text} for part in self.content]
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}

    def ignored(self) -> set[str]:
        """Names of the fields that nobody knows, here and in the parts of the content."""
        names = set(self.model_extra or ())
        if isinstance(self.content, list):
            names.update(*(part.model_extra or () for part in self.content))
        return names


class ChatRequest(Generation):
    """POST /v1/chat/completions. ``max_completion_tokens`` is the newer name of ``max_tokens``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class CompletionRequest(Generation):
    """POST /v1/completions. ``prompt``: one text or several, each a string or token ids."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None


class EmbeddingRequest(ForModels):
    """POST /v1/embeddings.

    ``dimensions`` gives that many of the first numbers of each vector, and the length is then
    less than 1. ``prompt_name``, which OpenAI does not have, names a prompt of the model to put
    in front of each text.
    """

    model: str
    input: Prompts
    prompt_name: Annotated[str, Field(max_length=256)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1), WHOLE] | None = None
    priority: Later | None = None
    cache_salt: Salt | None = None
    user: str | None = None


class LoadAdapterRequest(Strict):
    """POST /v1/load_lora_adapter, in the spelling of vLLM. ``lora_path`` is a folder below the
    server's adapter folder; ``base_model_name`` is needed where several models are served."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    base_model_name: str | None = None


class UnloadAdapterRequest(Strict):
    """POST /v1/unload_lora_adapter, in the spelling of vLLM."""

    lora_name: str
