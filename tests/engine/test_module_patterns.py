"""Patterns of adapters: as PEFT reads them, and never for long."""

from __future__ import annotations

import random
import re
import time

import pytest

from sartor.engine.module_patterns import matches
from sartor.errors import FormatError

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
    "q_proj",
)
FORMS = (
    "q_proj",
    "layers.0.self_attn.q_proj",
    r"layers\.0\.self_attn\.q_proj",
    "^model.layers.0.self_attn.q_proj",
    "^q_proj$",
    r"model\.layers\.\d+\.mlp.down_proj",
    r".*\.1.*\.down_proj",
    ".*self_attn.*(q_proj|k_proj)$",
    "(q_proj|lm_head)",
    "(?:lm_head|down_proj)",
    "layers.[0-9]+.mlp.down_proj",
    ".*",
    ".*.q_proj",
    "0.self_attn.q_proj",
    "proj",
    "",
)


@pytest.mark.parametrize("pattern", FORMS)
def test_they_match_what_peft_would_match(pattern: str) -> None:
    for name in NAMES:
        assert matches(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name


def test_random_ones_match_alike() -> None:
    rng = random.Random(0)
    parts = ["a", "b", "ab", ".", r"\.", ".*", r"\d+", "(a|b)", "(a.b|b)", "0", "[0-9]+"]
    agreed = 0
    for _ in range(3000):
        pattern = rng.choice(["", "^"]) + "".join(rng.choices(parts, k=rng.randrange(1, 6)))
        name = "".join(rng.choices("ab.01", k=rng.randrange(0, 8)))
        expected = bool(re.match(rf"(.*\.)?({pattern})$", name))
        assert matches(pattern, name) == expected, (pattern, name)
        agreed += expected
    assert agreed > 100


@pytest.mark.parametrize(
    "pattern",
    [
        "([a-z0-9_.]+)+!",
        "(a+)+$",
        "(?=a)",
        "a{9999}",
        "[^a]*",
        "(a|(b|c))",
        r"(\w+\.)*x",
        "a" * 600,
    ],
)
def test_other_forms_are_refused_at_once(pattern: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(FormatError, match="pattern"):
        matches(pattern, "model.layers.0.self_attn.q_proj" * 20)
    assert time.perf_counter() - begin < 0.1


def test_many_stars_take_no_time() -> None:
    begin = time.perf_counter()
    assert not matches(".*a" * 150 + "x", "a" * 2000)
    assert time.perf_counter() - begin < 2.0
