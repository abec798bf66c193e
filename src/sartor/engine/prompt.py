"""What callers give as a prompt, and the tokens and vectors that the engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sartor.engine.embedding import EmbeddingSegment
from sartor.errors import UsageError
from sartor.text.tokenizer import Tokenizer

_PLACEHOLDER = 0
"""The token id that stands where a vector is; its embedding is not used."""

PromptPart = str | Sequence[int] | npt.NDArray[Any]


@dataclass(frozen=True)
class MixedPrompt:
    """Text, token ids and vectors ``[n, hidden size]`` (arrays of two axes), in their order.

    Only in front of a first part of text stands the token that the model begins texts with;
    ids are taken as they are.
    """

    parts: Sequence[PromptPart]


Prompt = str | Sequence[int] | MixedPrompt


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt
) -> tuple[tuple[int, ...], tuple[EmbeddingSegment, ...]]:
    """Token ids, and the vectors that take the place of some of them."""
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt)), ()
    if not isinstance(prompt, MixedPrompt):
        return tuple(map(int, prompt)), ()
    if isinstance(prompt.parts, str):
        raise UsageError("prompt: a MixedPrompt takes a list of parts, not a single text")
    ids: list[int] = []
    segments: list[EmbeddingSegment] = []
    for index, part in enumerate(prompt.parts):
        if isinstance(part, str):
            if index == 0 and tokenizer.add_bos and tokenizer.bos_id is not None:
                ids.append(tokenizer.bos_id)
            ids += tokenizer.encode(part, add_special=False)
        elif isinstance(part, np.ndarray) and part.ndim != 1:
            segments.append(EmbeddingSegment.of(len(ids), part))
            ids += [_PLACEHOLDER] * len(part)
        else:
            ids += map(int, part)
    return tuple(ids), tuple(segments)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, told apart by what is inside."""
    if isinstance(prompts, str | MixedPrompt):
        return [prompts]
    first = prompts[0] if len(prompts) else ""
    if not isinstance(first, MixedPrompt) and not hasattr(first, "__len__"):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))
