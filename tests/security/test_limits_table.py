"""The table of limits in docs/serving.md: complete, and each with a test that exists."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from sartor.serving.limits import ServerLimits

ROOT = Path(__file__).parents[2]

ROWS = {
    "body_bytes": "bytes of a body, ",
    "bodies_bytes": "bytes of all bodies",
    "key_part": "of several keys",
    "body_seconds": "time for a whole body",
    "head_seconds": "time for the head",
    "idle_seconds": "time between two requests",
    "connections": "connections, ",
    "peer_connections": "connections of one address",
    "json_depth": "levels and values of JSON",
    "json_values": "levels and values of JSON",
    "prompt_tokens": "tokens of a prompt",
    "chars_per_token": "characters of a prompt",
    "max_tokens": "tokens of an answer",
    "messages": "messages of a chat",
    "prompts": "prompts, `n`",
    "choices": "prompts, `n`",
    "sequences": "prompts, `n`",
    "stop_strings": "stop strings",
    "stop_chars": "stop strings",
    "logit_biases": "tokens with a bias",
    "logprobs": "tokens x choices",
    "answers_bytes": "bytes of answers",
    "request_seconds": "time for a request",
}


def rows() -> list[list[str]]:
    """The cells of each row."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    table = page.partition("| limit | default | answer | test |\n")[2].partition("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]
    ]


def functions(name: str) -> set[str]:
    """The tests of a file, which has its name once in the whole tree."""
    (file,) = (ROOT / "tests").rglob(f"{name}.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_limit_names_tests_that_exist() -> None:
    found = rows()
    assert len(found) >= 25
    for limit, _, _, tests in found:
        assert tests, limit
        for test in tests.split("; "):
            file, _, function = test.strip("`").partition("::")
            assert function in functions(file), f"{limit}: {test}"


def test_no_limit_of_the_server_is_missing() -> None:
    assert set(ROWS) == {field.name for field in dataclasses.fields(ServerLimits)}
    shown = [row[0] for row in rows()]
    for begin in ROWS.values():
        assert sum(limit.startswith(begin) for limit in shown) == 1, begin
