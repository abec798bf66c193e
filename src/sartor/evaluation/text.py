"""What is evaluated: a page of English that comes with Sartor, or any text file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sartor.errors import UsageError
from sartor.text.tokenizer import Tokenizer


def english_text() -> str:
    """The bundled page: about 900 tokens, written for Sartor, so no model has seen it."""
    return files("sartor.evaluation").joinpath("english.txt").read_text(encoding="utf-8")


def read_text(path: Path | None) -> str:
    """A UTF-8 text file; None for the bundled page."""
    if path is None:
        return english_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error}); check it") from error


def evaluation_tokens(tokenizer: Tokenizer, text: str, positions: int) -> tuple[int, ...]:
    """The first ``positions`` tokens of a text, with the bos that the model wants in front.

    UsageError when the text is shorter: a smaller number would look like a full one.
    """
    if positions < 2:
        raise UsageError(f"positions is {positions}; an evaluation needs at least 2")
    ids = tokenizer.encode(text, parse_special=False)
    if tokenizer.add_eos:
        ids = ids[:-1]
    if len(ids) < positions:
        raise UsageError(
            f"the text has {len(ids)} tokens, but {positions} positions were asked for; give a "
            "longer text or fewer positions"
        )
    return tuple(ids[:positions])
