"""How an encoder is asked: prompts in front of texts, dimensions, and the longest text."""

from __future__ import annotations

from sartor.errors import UsageError
from sartor.graph import Program
from sartor.models.config import VectorConfig
from sartor.plan import ExecutionPlan
from sartor.text.tokenizer import Tokenizer


def prompt_text(vectors: VectorConfig, name: str | None) -> str:
    """The prompt of that name, or the default one; empty for none. UsageError lists the names."""
    if name is None:
        return vectors.prompts.get(vectors.default_prompt, "")
    if name not in vectors.prompts:
        known = ", ".join(vectors.prompts) or "none"
        raise UsageError(f"prompt_name {name!r} is unknown; this model's prompts are: {known}")
    return vectors.prompts[name]


def left_out(vectors: VectorConfig, tokenizer: Tokenizer, prompt: str) -> int:
    """Tokens at the start of a text behind ``prompt`` that take no part in its vector: those of
    the prompt by itself, but for a special token behind it."""
    if vectors.include_prompt or not prompt:
        return 0
    ids = tokenizer.encode(prompt)
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.special_ids)


def dimensions_of(vectors: VectorConfig, width: int, asked: int | None) -> int:
    """How many numbers of each vector are given: as many as asked for, else the model's own.

    The first ones are, and they are not made to length 1 again (as in sentence-transformers).
    UsageError where the model has fewer.
    """
    if asked is None:
        return vectors.dimensions or width
    if not 1 <= asked <= width:
        raise UsageError(f"dimensions is {asked}, but this model's vectors have {width}")
    return asked


def vector_width(program: Program) -> int:
    """Numbers of the vector that an encoder's program makes of a text."""
    width = program.values[program.outputs["embedding"]].shape[1]
    assert isinstance(width, int)
    return width


def text_limit(vectors: VectorConfig, plan: ExecutionPlan, context_length: int) -> str:
    """What states the longest text, for people."""
    if plan.max_context == context_length:
        return "the context that was asked for"
    if vectors.max_length == context_length:
        return vectors.limit
    return "the positions that it has"
