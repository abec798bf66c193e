"""What the gateway knows of a model: its text side and its limits, but no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from sartor.engine.fallback.model import describe_fallback
from sartor.engine.load import load_text
from sartor.engine.preset import Preset
from sartor.engine.vectors import text_limit, vector_width
from sartor.errors import UsageError
from sartor.formats import open_checkpoint
from sartor.graph import UNSAID, SamplingDefaults
from sartor.models import UnknownArchitectureError, load_model, own_sampling
from sartor.models.config import VectorConfig
from sartor.plan import ExecutionPlan
from sartor.serving.errors import context_exceeded, invalid
from sartor.serving.messages import AdapterSpec, ModelSpec
from sartor.text.chat import Chat
from sartor.text.template import ChatTemplate
from sartor.text.tokenizer import Tokenizer

Makes = Literal["text", "embeddings"]
_TAKEN = {"self", "messages", "tools", "bos_token", "eos_token", "special_in_text"}


@dataclass
class ServedModel:
    """A model by the name that requests use; they may also use one of its ``aliases``, of which
    those that are ``listed`` are shown to clients.

    ``created`` is the time of its file in Unix seconds; ``fingerprint`` changes with the model
    and with what can change its answers in the plan. ``vectors`` says what a model that makes
    them wants, and ``width`` how many numbers each has. ``adapters`` and ``presets`` are those that
    requests may name in its place. ``sampling`` is what the checkpoint says of how to draw tokens.
    ``special_in_text``: control tokens that chats spell become those tokens.
    """

    name: str
    spec: ModelSpec
    tokenizer: Tokenizer
    template: ChatTemplate | None
    context_length: int
    vocab_size: int
    fingerprint: str
    created: int
    vectors: VectorConfig | None = None
    width: int = 0
    adapters: dict[str, AdapterSpec] = field(default_factory=dict)
    aliases: frozenset[str] = frozenset()
    sampling: SamplingDefaults = UNSAID
    presets: dict[str, Preset] = field(default_factory=dict)
    special_in_text: bool = False

    @property
    def makes(self) -> Makes:
        """What its answers are."""
        return "text" if self.vectors is None else "embeddings"

    listed: tuple[str, ...] = ()

    def hosted(self, retired: Sequence[AdapterSpec] = ()) -> ModelSpec:
        """What a worker has to load: the model with its adapters, and with those that only
        requests of before still use."""
        return msgspec.structs.replace(self.spec, adapters=(*self.adapters.values(), *retired))

    def limit_context(self, context_length: int) -> None:
        """The worker may have room for less than the model's own limit."""
        self.context_length = min(self.context_length, context_length)

    def chat(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Chat:
        """A chat as the model's template writes it."""
        if self.template is None:
            raise invalid(
                f"the model {self.name} has no chat template; use /v1/completions", "messages"
            )
        if taken := sorted(_TAKEN & variables.keys()):
            param = "chat_template_kwargs"
            raise invalid(f"{param}: {', '.join(taken)} cannot be set here", param)
        try:
            return Chat(
                self.template,
                self.tokenizer,
                messages,
                special_in_text=self.special_in_text,
                **variables,
            )
        except UsageError as error:
            raise invalid(f"messages: {error}", "messages") from None

    def check_prompt(self, prompt: Collection[int], param: str) -> None:
        """Raises ApiError where a prompt is empty, too long, or has ids that are none."""
        if not prompt:
            raise invalid(f"{param}: the prompt has no tokens; send some text", param)
        self.check_length(len(prompt), param)
        self.check_tokens(prompt, param)

    def check_length(self, tokens: int, param: str, *, at_least: bool = False) -> None:
        """Raises ApiError where a prompt of so many tokens, or ``at_least`` so many, is too
        long."""
        room = 1 if self.vectors is None else 0  # for an answer
        if tokens + room > self.context_length:
            limit = ""
            if self.vectors is not None:
                limit = text_limit(self.vectors, self.spec.plan, self.context_length)
            raise context_exceeded(tokens, self.context_length, param, limit, at_least=at_least)

    def check_tokens(self, tokens: Collection[int], param: str) -> None:
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < self.vocab_size:
                raise invalid(
                    f"{param}: {token} is not a token id; {self.name} has ids from 0 to "
                    f"{self.vocab_size - 1}",
                    param,
                )


def open_served_model(
    name: str, path: Path, plan: ExecutionPlan, cache: Path | None = None
) -> ServedModel:
    """Reads configuration and tokenizer of a checkpoint.

    A ``max_context`` that is above the model's own limit is left out of its plan. SartorError
    (FormatError, UnsupportedError, UsageError) says what is wrong with it.
    """
    checkpoint = open_checkpoint(path)
    vectors, width = None, 0
    try:
        try:
            model = load_model(checkpoint)
            context, vocab_size = model.context_length, model.vocab_size
            if not model.program.samples:
                vectors, width = model.config.vectors, vector_width(model.program)
        except UnknownArchitectureError as unknown:
            context, vocab_size = describe_fallback(checkpoint, unknown, plan)
        if plan.max_context > context:
            plan = plan.replace(max_context=0)
        tokenizer, template = load_text(checkpoint, vectors=vectors)
        sampling = own_sampling(checkpoint)
        identity = f"{checkpoint.identity()} {plan.numerics()}"
    finally:
        checkpoint.close()
    return ServedModel(
        name=name,
        spec=ModelSpec(name, str(path), plan, None if cache is None else str(cache)),
        tokenizer=tokenizer,
        template=template,
        context_length=min(context, plan.max_context) if plan.max_context else context,
        vocab_size=vocab_size,
        fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12],
        created=int(path.stat().st_mtime),
        sampling=sampling,
        vectors=vectors,
        width=width,
    )
