"""What the tokens of a GGUF take of the text around them.

Such attributes are part of a tokenizer.json and have no place in a GGUF. As in llama.cpp
(``src/llama-vocab.cpp``) the model's name says them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sartor.text.sentencepiece import Surroundings, TokenType, TokenTypes

if TYPE_CHECKING:
    from sartor.text.gguf import Keys

_PHI3 = re.compile(r"phi[-_ ]?3")
_PHI3_TURNS = {"<|user|>", "<|assistant|>", "<|end|>"}
_PHI3_BARE = {"<unk>", "<s>", "<|endoftext|>"}  # these take nothing there


def surroundings_of(
    keys: Keys, tokens: Sequence[str], types: TokenTypes
) -> dict[int, Surroundings]:
    """By id, for the tokens that take white space with them."""
    name = keys.general("name").lower()
    if _is_phi3(keys, name, tokens):
        added = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        return {
            i: Surroundings(rstrip=True)
            for i, kind in enumerate(types.tolist())
            if (kind in added or tokens[i] == "</s>") and tokens[i] not in _PHI3_BARE
        }
    if "modern-bert" in name and "[MASK]" in tokens:
        return {tokens.index("[MASK]"): Surroundings(lstrip=True)}
    return {}


def _is_phi3(keys: Keys, name: str, tokens: Sequence[str]) -> bool:
    if _PHI3.search(name):
        return True
    # A model made from it may have any name. Phi-4 shares the architecture, not the vocabulary.
    return (
        keys.general("architecture") == "phi3"
        and keys.text("model") == "llama"
        and _PHI3_TURNS.issubset(tokens)
    )
