"""Regular expressions of a tokenizer.json: those of models are used, costly ones are refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from sartor.errors import FormatError
from sartor.text import pattern_limits
from sartor.text.pattern_limits import Cost, CostlyPatternError, check_patterns, cost_of
from sartor.text.pretokenizers import PRE_TOKENIZERS
from sartor.text.tokenizer import tokenizer_from_folder

OF_MODELS = {
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tiktoken": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "clip": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "kimi": r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "falcon": r"[0-9][0-9][0-9]",
    "digits from the right": r"(?=(?:\d{3})+(?!\d))",
    "digits in threes": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    "deepseek": r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-Ⴥ]+",
    "deepseek punctuation": r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    "deepseek ends": r"\s+$",
    "spaces": " {2,}",
    "quotes": r"``|''",
    "lines": r"(?:\r?\n)+",
    "no-break": r"[\u00a0\x{3000}]",
}


@pytest.mark.parametrize("name", OF_MODELS)
def test_those_of_models_are_used(name: str) -> None:
    cost = cost_of(OF_MODELS[name])
    assert cost.degree <= 1
    assert cost.factor <= 4
    pre_tokenizers.Split(Regex(OF_MODELS[name]), "isolated").pre_tokenize_str("a 1234 b\n\n c's")


def test_those_that_gguf_files_name_are_used() -> None:
    for rule in PRE_TOKENIZERS.values():
        for split in rule.splits:
            assert cost_of(split).degree <= 1


COSTLY = [
    r"(a+)+$",
    r"(a*)*b",
    r"(?:a|a)+$",
    r"(?:a|ab|b)*c",
    r"(?:a?a)*$",
    r"(?:(?:a+b?)+c)x",
    r"(a{1,30}){1,30}$",
    r"(?=(a+)+$)a",
    r"(?!(?:a|a)*b)a",
    r"(?i)(a+)+$",
    r"(?<name>a+)+$",
    r"(?:a+){2,}$",
    r"(?:\p{L}+\s*)+\.",
    r"\s*\s*\s*$",
    r"a*a*a*a*$",
    r".*.*.*x",
    r"(?>a)+(?>a)+(?>a)+b",
    r"(?:(?=a*b)a)+c",
    "(a|b)" * 20 + "c",
    "a?" * 12 + "b",
    "(?:a{0,9}){3}b",
]
UNKNOWN = [
    r"(.*)\1$",
    r"(?<x>a)\k<x>",
    r"(?<x>a\g<x>?)b",
    r"(?<=a+)b",
    r"(?<!a{1,3})b",
    r"(?x) a",
    r"(?~abc)",
    r"(?(1)a|b)",
    r"(*FAIL)",
    r"\X",
    r"a\K" "\\",
    "(a",
    "a)",
    "[a",
    "[[a]",
    "a+*+*+*",
    "(" * 60 + "a" + ")" * 60,
    r"\p{L}" * 5000,
]


@pytest.mark.parametrize("expression", COSTLY)
def test_costly_ones_are_refused(expression: str) -> None:
    with pytest.raises(CostlyPatternError, match=r"regular expression .*(way|ways); write it"):
        check_patterns({"pattern": {"Regex": expression}}, "tokenizer.json")


@pytest.mark.parametrize("expression", UNKNOWN)
def test_what_is_not_looked_into_is_refused(expression: str) -> None:
    with pytest.raises(CostlyPatternError, match="regular expression"):
        cost_of(expression)


@pytest.mark.parametrize("expression", [r"(?:a++)+b", r"(?>(?:a|ab)+)c", r"(a+)++b", r"(a+)+"])
def test_what_is_never_tried_again_costs_nothing(expression: str) -> None:
    assert cost_of(expression).degree <= 2


def test_costs() -> None:
    assert cost_of("abc") == Cost()
    assert cost_of("a*b") == Cost(1)
    assert cost_of("a*") == Cost()
    assert cost_of("(?:ab|cd)e") == Cost(0, 2)
    assert cost_of("a{1,3}b") == Cost(0, 3)
    assert cost_of("a{1,300}b") == Cost(1)
    assert cost_of("(?:abc)*d") == Cost(1)
    assert cost_of("[]a*]b") == cost_of(r"[^]\]a*[b]*]c") == Cost()


def test_many_expressions_are_refused() -> None:
    part = [{"Regex": "a"}] * (pattern_limits.MOST_EXPRESSIONS + 1)
    with pytest.raises(CostlyPatternError, match="65 regular expressions; at most 64"):
        check_patterns(part, "tokenizer.json")


SYNTAX = st.lists(
    st.sampled_from(
        [
            "a",
            "b",
            ".",
            r"\p{L}",
            r"\s",
            "[ab]",
            "(",
            "(?:",
            "(?>",
            "(?=",
            ")",
            "|",
            "*",
            "+",
            "?",
            "*+",
            "+?",
            "{2}",
            "{1,3}",
            "{2,}",
            "{,9}",
            "\\",
            "[",
            "]",
            "$",
        ]
    ),
    max_size=14,
).map("".join)
TEXTS = ("a" * 400, "ab" * 200, "a" * 399 + "c", "a " * 200 + "!", " " * 400)


@given(SYNTAX)
def test_what_is_used_takes_no_time(expression: str) -> None:
    """The library either does not know the expression, or is quick on texts that loop."""
    try:
        check_patterns({"Regex": expression}, "x")
        split = pre_tokenizers.Split(Regex(expression), "isolated")
    except Exception:
        return
    began = time.process_time()
    for text in TEXTS:
        split.pre_tokenize_str(text)
    assert time.process_time() - began < 2


def folder_with(path: Path, part: str, expression: str) -> Path:
    state: dict[str, object] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }
    pattern = {"Regex": expression}
    state[part] = (
        {"type": "Replace", "pattern": pattern, "content": "b"}
        if part == "normalizer"
        else {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        ]}
    )  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(state))
    return path


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_checkpoint_with_one_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: the regular expression '\(a\+\)\+\$'"):
        tokenizer_from_folder(folder_with(tmp_path, part, "(a+)+$"))
    tokenizer = tokenizer_from_folder(folder_with(tmp_path, part, "c+"))
    assert tokenizer.encode("ab") == [0, 1]
