"""The conversation of ``sartor run`` without a prompt."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.cli.answer import follow
from sartor.cli.screen import say, write_text
from sartor.errors import SartorError

if TYPE_CHECKING:
    from sartor.engine.llm import LLM
    from sartor.graph import SamplingParams

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    llm: LLM,
    name: str,
    params: SamplingParams,
    system: str | None,
    adapter: str,
    template: Mapping[str, Any],
) -> None:
    """Reads lines and answers them until the end of the input. ``template`` has variables of the
    chat template."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    say(f"{name}: {_HELP}")
    while (line := _read()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/bye" | "/quit":
                return
            case "/clear":
                messages = list(opening)
                continue
            case "/help" | "/?":
                say(_HELP)
                continue
        messages.append({"role": "user", "content": line})
        said: list[str] = []

        def show(text: str, said: list[str] = said) -> None:
            said.append(text)
            write_text(text)

        try:
            chunks = llm.chat(messages, params, stream=True, adapter=adapter, **template)
            answer = follow(chunks, show)
        except KeyboardInterrupt:
            write_text("\n")
            say("(stopped)")
        except SartorError as error:
            say(f"error: {error}; /clear starts anew")
            messages.pop()
            continue
        else:
            write_text("" if answer.text.endswith("\n") else "\n")
            say(answer.speed())
        messages.append({"role": "assistant", "content": "".join(said)})


def _read() -> str | None:
    """One line of the person, None at the end."""
    try:
        if sys.stdout.isatty():
            return input("> ")
        # input() would write its prompt between the answers.
        sys.stderr.write("> ")
        sys.stderr.flush()
        return input()
    except EOFError:
        say("")
        return None
