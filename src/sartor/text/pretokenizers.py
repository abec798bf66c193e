"""How byte-level BPE vocabularies cut text into words before merging.

A GGUF names the rule in ``tokenizer.ggml.pre``; the names are those of llama.cpp
(``src/llama-vocab.cpp``), the expressions those of the models' own ``tokenizer.json`` files.
Where the two differ the model's own file is followed, because that is how it was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sartor.errors import UnsupportedError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"

_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _modern(digits: str) -> str:
    """The expression of cl100k and its descendants; they differ in how many digits go together."""
    return rf"{_CONTRACTION}|{_BEFORE_WORD}\p{{L}}+|{digits}|{_SYMBOLS}[\r\n]*|{_SPACES}"


def _cased(contraction: str, digits: str) -> str:
    """The expression of o200k and Tekken: words break where lower case turns to upper case."""
    return (
        rf"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{contraction}"
        rf"|{_BEFORE_WORD}{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}|{_SYMBOLS}[\r\n/]*|{_SPACES}"
    )


_QWEN35 = (
    rf"{_CONTRACTION}|{_BEFORE_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    _DIGIT,
)
_SEED_CODER = rf"{_CONTRACTION}|{_BEFORE_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """One rule. ``splits`` are applied one after another, each to the pieces of the one before.

    ``nfc``: the text is brought to Unicode NFC first. ``whole_words``: a word that is itself a
    token is taken without merging (``ignore_merges``). ``add_bos``: the default where the file
    does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def build(self) -> Any:
        """The ``tokenizers`` pre-tokenizer; the last stage spells bytes in the GPT-2 alphabet."""
        from tokenizers import Regex, pre_tokenizers

        stages: list[Any] = [pre_tokenizers.Split(Regex(s), "isolated") for s in self.splits]
        stages.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(stages)


_PLAIN = PreTokenizer((_GPT2,))
_DIGITS_APART = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3 = PreTokenizer((_modern(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_CL100K = PreTokenizer((_modern(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_modern(_DIGIT),))
_O200K = PreTokenizer((_cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"),))

_FAMILIES: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    # "default" marks files made before the key existed: GPT-2's own rule is what most of those
    # models were trained with, and it is what transformers assumes.
    (_PLAIN, ("default", "gpt-2", "phi-2", "mpt", "jais", "trillion", "granite-docling")),
    (_PLAIN, ("gigachat", "a.x-4.0", "mellum", "exaone4")),
    (PreTokenizer((_GPT2,), nfc=True), ("olmo",)),
    (_DIGITS_APART, ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b")),
    (_DIGITS_APART, ("mellum2",)),
    (PreTokenizer((_DIGIT, _GPT2), nfc=True), ("command-r",)),
    (_LLAMA3, ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral")),
    (_LLAMA3, ("midm-2.0", "lfm2")),
    (_CL100K, ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe")),
    (PreTokenizer((_modern(_DIGIT),), nfc=True), ("qwen2",)),
    (PreTokenizer((_QWEN35,), nfc=True), ("qwen35",)),
    (_QWEN2, ("deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open")),
    (_QWEN2, ("grok-2",)),
    (PreTokenizer((_SEED_CODER,)), ("seed-coder",)),
    (PreTokenizer((_cased("", _DIGIT),), whole_words=True, add_bos=True), ("tekken",)),
    (_O200K, ("gpt-4o", "llama4", "kanana2", "minimax-m2")),
    (PreTokenizer(_DEEPSEEK3), ("deepseek-v3", "hunyuan-dense", "joyai-llm")),
    (PreTokenizer(_DEEPSEEK_CODER), ("deepseek-coder",)),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: p for p, names in _FAMILIES for name in names}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rule that ``tokenizer.ggml.pre`` names; UnsupportedError lists the known names."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise UnsupportedError(
            f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that is not supported; "
            f"supported: {', '.join(sorted(PRE_TOKENIZERS))}. Use a checkpoint folder with a "
            "tokenizer.json instead"
        ) from None
