"""Command lines by signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest

from sartor.cli.arguments import Argument, Option, call
from sartor.errors import UsageError

GIVEN: dict[str, Any] = {}


def command(
    first: Annotated[str, Argument(help="The first.")],
    rest: Annotated[list[Path] | None, Argument(help="The rest.", metavar="REST...")] = None,
    count: Annotated[int, Option(help="How many.", minimum=1)] = 3,
    share: Annotated[float, Option(help="How much.")] = 0.5,
    name: Annotated[str | None, Option(help="Called so.")] = None,
    tags: Annotated[list[str] | None, Option(help="Words.", name="--tag")] = None,
    dry_run: Annotated[bool, Option(help="Only look.")] = False,
) -> int:
    """Does something.

    And more of it.
    """
    GIVEN.clear()
    GIVEN.update(locals())
    return 7


def given(*words: str) -> dict[str, Any]:
    assert call("sartor do", command, words) == 7
    return {key: value for key, value in GIVEN.items() if value not in (None, 3, 0.5, False)}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["a"], {"first": "a"}),
        (["a", "b", "c"], {"first": "a", "rest": [Path("b"), Path("c")]}),
        (["--count", "5", "a"], {"first": "a", "count": 5}),
        (["a", "--count=5", "b"], {"first": "a", "rest": [Path("b")], "count": 5}),
        (["a", "--share", "-1"], {"first": "a", "share": -1.0}),
        (["a", "--name", "--tag"], {"first": "a", "name": "--tag"}),
        (["a", "--name="], {"first": "a", "name": ""}),
        (["a", "--name=b=c"], {"first": "a", "name": "b=c"}),
        (["a", "--tag", "x", "--tag=y"], {"first": "a", "tags": ["x", "y"]}),
        (["--dry-run", "a"], {"first": "a", "dry_run": True}),
        (["--", "--count", "-h"], {"first": "--count", "rest": [Path("-h")]}),
        (["-"], {"first": "-"}),
        (["a", "--count", "5", "--count", "6"], {"first": "a", "count": 6}),
        ([""], {"first": ""}),
    ],
)
def test_words_become_values(words: list[str], values: dict[str, object]) -> None:
    assert given(*words) == values


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "FIRST is missing"),
        (["--count", "5"], "FIRST is missing"),
        (["a", "--count", "x"], "--count must be a whole number, not 'x'"),
        (["a", "--count", "1.5"], "--count must be a whole number"),
        (["a", "--count", "0"], "--count must be at least 1, not 0"),
        (["a", "--share", "much"], "--share must be a number"),
        (["a", "--name"], "--name needs a value"),
        (["a", "--dry-run=yes"], "--dry-run takes no value"),
        (["a", "--cuont", "1"], r"no such option: --cuont \(did you mean '--count'"),
        (["a", "-x"], "no such option: -x"),
        (["a", "--xyzzy=1"], "no such option: --xyzzy;"),
    ],
)
def test_what_does_not_fit_is_named(words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=f"{says}.*`sartor do --help` tells more"):
        call("sartor do", command, words)


def test_no_argument_too_many() -> None:
    def single(only: Annotated[str, Argument(help="One.")]) -> None:
        """Takes one."""

    with pytest.raises(UsageError, match="one argument too many: 'b'"):
        call("sartor one", single, ["a", "b"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    GIVEN.clear()
    for words in (["--help"], ["a", "--count", "3", "-h"]):
        assert call("sartor do", command, words) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("Usage: sartor do [OPTIONS] FIRST [REST...]\n\n  Does something.\n")
        assert "\n\n  And more of it.\n" in shown
        assert "\n  FIRST    The first.\n" in shown
        assert "\n  --count INT    How many. [default: 3]\n" in shown
        assert "\n  --tag TEXT     Words.\n" in shown
        assert "\n  --dry-run      Only look.\n" in shown
    assert not GIVEN  # the command did not run
