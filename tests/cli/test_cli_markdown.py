"""Markdown and plain text on a terminal, in pieces of any size."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from sartor.cli.markdown import MarkdownScreen
from sartor.cli.wrapping import WrappedText

_SGR = re.compile(r"\x1b\[[0-9;]*m")
TEXT = """# Title with **bold**

A paragraph with **bold text**, *italic*, `inline code`, ~~no~~ and a [link](https://e.org/a_b). It
wraps; 2 * 3 * 4 = 24, snake_case_name, \\*stars\\* and \\(a_1 * b_1\\) stay.
A line of its own.

- first item that is long enough to be wrapped over two lines
- [x] done
  1) nested `code`

> quoted text that is long enough for two lines on a narrow terminal

```python
def f(x):
    \"\"\"Doc
    string\"\"\"

    return x  # comment
```
~~~
    plain ```
~~~

| Name | Value | 说明 |
|:-----|------:|:--:|
| a | **1** | 这是一个很长的中文句子 |
| b \\| c | `2` | x |

中文句子没有空格，所以需要在任何两个字之间换行。这是一个很长的句子，用来测试换行。

***
Unclosed **bold and `tick
"""


def shown(
    text: str, pieces: list[int], columns: int | Callable[[], int] = 60, styled: bool = True
) -> str:
    out: list[str] = []
    width = columns if callable(columns) else lambda: columns
    screen = MarkdownScreen(out.append, width, styled=styled)  # type: ignore[arg-type]
    at = 0
    for count in pieces:
        screen.feed(text[at : at + count])
        at += count
    screen.feed(text[at:])
    screen.end()
    return "".join(out)


def plain(text: str, columns: int = 60) -> list[str]:
    return _SGR.sub("", shown(text, [], columns)).split("\n")


@pytest.mark.parametrize("columns", [20, 60, 200])
@pytest.mark.parametrize("styled", [True, False])
def test_pieces_make_no_difference(columns: int, styled: bool) -> None:
    whole = shown(TEXT, [], columns, styled)
    assert shown(TEXT, [1] * len(TEXT), columns, styled) == whole
    for seed in range(20):
        pick = random.Random(seed)
        assert shown(TEXT, [pick.randint(1, 9) for _ in TEXT], columns, styled) == whole


@given(st.text(alphabet="ab *_`~[]()<>#-+|\\!1.\n中", max_size=60), st.lists(st.integers(1, 5)))
def test_any_text_ends_and_loses_no_letter(text: str, pieces: list[int]) -> None:
    found = shown(text, pieces)
    assert found == shown(text, [1] * len(text))
    code = re.search(r"^\s*(```|~~~)", text, re.M)
    table = "|" in text
    if not code and not table:
        letters = [c for c in text if c in "ab中"]
        assert [c for c in _SGR.sub("", found) if c in "ab中"] == letters
    assert found == "" or found.endswith("\n")


def test_lines_fit_and_words_stay_whole() -> None:
    for columns in (20, 60, 200):
        for line in plain(TEXT, columns):
            if "def" not in line and "https" not in line:
                assert cell_len(line) < max(columns, 24), line
    words = " ".join(f"word{n}" for n in range(100))
    assert " ".join(plain(words)).strip() == words


def test_code_can_be_copied() -> None:
    lines = plain(TEXT)
    start = lines.index("def f(x):")
    assert lines[start : start + 5] == [
        "def f(x):",
        '    """Doc',
        '    string"""',
        "",
        "    return x  # comment",
    ]
    long = "x = " + "1 + " * 60 + "1"
    assert long in plain(f"- item:\n  ```python\n  {long}\n  ```\n")  # no wrap, and no indent
    assert "\tx" in plain("```make\nall:\n\tx\n```")


def test_marks_vanish_where_there_is_style_and_stay_where_there_is_none() -> None:
    text = "a **b** *c* `d` _e_ ~~f~~"
    assert plain(text) == ["a b c d e f", ""]
    assert shown(text, [], styled=False) == text + "\n"
    assert "\x1b" not in shown(TEXT, [], styled=False)


@pytest.mark.parametrize(
    "text",
    [
        "2 * 3 * 4",
        "snake_case_name and __init__x",
        "a [b] c [",
        "1 < 2 > 0",
        "C:\\dir",
        "-not a list",
        "#hashtag",
        "a | b",
        "**",
        "*",
        "1.",
        "`",
    ],
)
def test_what_is_no_markdown_stays(text: str) -> None:
    assert plain(text) == [text, ""]


def test_emphasis_that_never_ends_is_shown_in_time() -> None:
    out: list[str] = []
    screen = MarkdownScreen(out.append, lambda: 60)
    screen.feed("**" + "word " * 200)
    assert "".join(out).count("word") > 90
    screen.end()
    assert "".join(out).count("word") == 200


def test_words_come_as_they_are_made() -> None:
    out: list[str] = []
    screen = MarkdownScreen(out.append, lambda: 60)
    screen.feed("One two thr")
    assert "".join(out) == "One two"
    screen.feed("ee **fo")
    assert "".join(out) == "One two three"
    screen.feed("ur** five")
    assert _SGR.sub("", "".join(out)) == "One two three four"


def test_tables_have_columns() -> None:
    lines = plain("| a | b |\n|---|--:|\n| x | 1 |\n| long | 22 |\nafter")
    assert [line.rstrip() for line in lines[:4]] == [
        " a       b",
        "───────────",
        " x       1",
        " long   22",
    ]
    assert lines[4] == "after"
    assert plain("| no table |\ntext") == ["| no table |", "text", ""]


def test_a_width_that_changes_is_used_from_then_on() -> None:
    widths = iter([60] * 40 + [30] * 10_000)
    found = shown("word " * 60, [7] * 60, lambda: next(widths))
    assert " ".join(found.split()) == ("word " * 60).strip()
    assert max(map(len, found.split("\n")[-5:])) < 30


def test_plain_text_keeps_its_lines() -> None:
    out: list[str] = []
    text = WrappedText(out.append, lambda: 30)
    poem = "Roses are **red**,\n\n  violets are blue,\n" + "x " * 30
    for char in poem:
        text.feed(char)
    text.end()
    lines = "".join(out).split("\n")
    assert lines[:3] == ["Roses are **red**,", "", "  violets are blue,"]
    assert all(len(line) < 30 for line in lines)
    assert " ".join(lines[3:]).split() == ["x"] * 30


def test_joined_characters_stay_together() -> None:
    family = "👨‍👩‍👧"
    out: list[str] = []
    text = WrappedText(out.append, lambda: 20)
    text.feed(family * 30 + " " + "e\u0301" * 40)
    text.end()
    joined = "".join(out)
    assert "\n\u200d" not in joined
    assert "\u200d\n" not in joined
    assert "\n\u0301" not in joined
    assert joined.replace("\n", "").replace(" ", "") == family * 30 + "e\u0301" * 40
