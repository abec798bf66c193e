"""Control tokens by their spelling, for files that mark them wrongly.

Published GGUF files give some of their control tokens the type of plain text. Such a token would
never be read from a prompt, and an answer would not end at it. llama.cpp repairs those that it
knows by name too (``src/llama-vocab.cpp``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sartor.text.sentencepiece import TokenType, TokenTypes

# Tokens that end a turn or a text, by the names that chat models give them. Files often declare
# only one of theirs; a model that emits another would run on until its token limit. "</s>" is
# missing on purpose: vocabularies also have it as a piece of HTML.
END_OF_GENERATION = frozenset(
    {
        "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>",
        "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>", "<turn|>",
        "<|endofturn|>", "<EOT>", "[EOT]", "[EOS]", "<eos>", "<end_of_utterance>",
        "<|end_of_turn|>", "<|tool_response>", "[e~[",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip

# Tokens that begin a text or a turn, or say whose it is.
_TURNS = frozenset(
    {
        "<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<start_of_turn>", "<|turn>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|start_of_role|>", "<|end_of_role|>", "<bos>", "[INST]", "[/INST]", "[gMASK]", "<sop>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>",
        "<\uff5cAssistant\uff5c>",
    }
)  # fmt: skip


def end_of_generation(
    candidates: Iterable[tuple[str, int]], declared: Iterable[int | None]
) -> frozenset[int]:
    """Declared ids and those of ``candidates`` (special tokens only) that end a generation."""
    named = {text: i for text, i in candidates if text in END_OF_GENERATION}
    if "<|return|>" in named or named.keys() >= {"<|calls|>", "<|flush|>"}:
        # There (harmony, and Solar's form of it) <|end|> only closes a message; another follows.
        named.pop("<|end|>", None)
    return frozenset(named.values()) | {i for i in declared if i is not None}


def misnamed_control(
    tokens: Sequence[str], types: TokenTypes, merges: Iterable[Sequence[str]] = ()
) -> list[int]:
    """Ids of control tokens that have another type, whichever it is.

    These are the tokens of known names, and those of type NORMAL or UNUSED that are spelled
    ``<|...|>``. What ``merges`` make is a piece of text, however it is spelled.
    """
    known = END_OF_GENERATION | _TURNS
    kinds = types.tolist()
    plain = {int(TokenType.NORMAL), int(TokenType.UNUSED)}
    found = {
        text: i
        for i, text in enumerate(tokens)
        if text[:1] in ("<", "[")
        and kinds[i] != TokenType.CONTROL
        and (text in known or (kinds[i] in plain and _is_bracketed(text)))
    }
    if found:
        for pair in merges:
            found.pop("".join(pair), None)
    return list(found.values())


_JOINTS = str.maketrans("", "", "_-/")


def _is_bracketed(text: str) -> bool:
    inner = text[2:-2]
    return text.startswith("<|") and text.endswith("|>") and inner.translate(_JOINTS).isalnum()


def with_control(types: TokenTypes, ids: Collection[int]) -> TokenTypes:
    """The types, with those of some ids changed to CONTROL."""
    if not ids:
        return types
    changed = types.copy()
    changed[list(ids)] = TokenType.CONTROL
    return changed
