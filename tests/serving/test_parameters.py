"""The tables of what each API takes: up to date, and as the server behaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sartor.serving.errors import ApiError
from sartor.serving.limits import ServerLimits
from sartor.serving.openai_types import NEUTRAL, NO_OPS, REFUSED
from sartor.serving.parameters import (
    ADAPTER_APIS,
    APIS,
    field_table,
    parameter_table,
    standing,
)
from sartor.serving.validation import parse

ROOT = Path(__file__).parents[2]

OPENAI = {
    "chat/completions": """
        audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens
        max_tokens messages metadata modalities model n parallel_tool_calls prediction
        presence_penalty prompt_cache_key prompt_cache_retention reasoning_effort response_format
        safety_identifier seed service_tier stop store stream stream_options temperature
        tool_choice tools top_logprobs top_p user verbosity web_search_options""",
    "completions": """
        best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty
        prompt seed stop stream stream_options suffix temperature top_p user""",
    "embeddings": "dimensions encoding_format input model user",
}
"""Parameters of the OpenAI API reference (2026)."""


def test_the_tables_of_the_page_are_up_to_date() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for lines in (parameter_table(APIS), field_table(), parameter_table(ADAPTER_APIS)):
        assert "\n".join(lines) in page, "run python -m sartor.serving.parameters"


@pytest.mark.parametrize("api", APIS)
def test_every_parameter_of_the_reference_is_known(api: str) -> None:
    unknown = [name for name in OPENAI[api].split() if standing(APIS[api], name) == "unknown"]
    assert not unknown


@pytest.mark.parametrize("api", [*APIS, *ADAPTER_APIS])
def test_the_standing_is_what_happens(api: str) -> None:
    """Parameters with a value that none can have: the error tells what the server knows."""
    kind = (APIS | ADAPTER_APIS)[api]
    names = {name for kind in (APIS | ADAPTER_APIS).values() for name in kind.model_fields}
    for name in (*names, *REFUSED, "frobnicate"):
        with pytest.raises(ApiError) as error:
            parse(kind, json.dumps({name: {"a": [[]]}}).encode(), ServerLimits())
        found = standing(kind, name)
        if found == "refused":
            assert (error.value.code, error.value.param) == ("unsupported", name)
        elif found == "unknown":
            assert (error.value.code, error.value.param) == ("unknown_parameter", name)
        else:
            assert error.value.code not in ("unsupported", "unknown_parameter")


def test_what_the_lists_are_about() -> None:
    honoured = {name for kind in APIS.values() for name in kind.model_fields} - set(NO_OPS)
    assert not set(NO_OPS) & set(REFUSED)
    assert not honoured & set(REFUSED)
    assert all(any(name in kind.model_fields for kind in APIS.values()) for name in NO_OPS)
    assert set(NEUTRAL) <= set(REFUSED)
