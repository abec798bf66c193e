"""What may follow on a command line: asked by the scripts that ``sartor completion`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

FILES = ":files"
"""A line for the shell: names of files may stand here, too."""

_PREFIXES = ("hf:", "modelscope:", "pypi:")
_STORED_ONLY = ("rm",)  # commands whose MODEL must be in the store


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to go on; ``help`` is short and may be empty."""

    text: str
    help: str = ""

    def __str__(self) -> str:
        return f"{self.text}\t{' '.join(self.help.split())}"


def complete(words: Annotated[list[str], typer.Argument()]) -> None:
    """Print the candidates for the last of WORDS, one a line with its help behind a tab."""
    seen: set[str] = set()
    for candidate in candidates(words):
        if candidate.text not in seen:
            seen.add(candidate.text)
            print(candidate if candidate.text != FILES else FILES)


def candidates(words: list[str]) -> Iterator[Candidate]:
    """What may stand for the last of ``words`` (after ``sartor``), which may be empty or begun."""
    from sartor.cli.app import command_line

    *before, begun = words
    named = [word for word in before if not word.startswith("-")]
    command: Any = command_line(named[0] if named else "")
    path = []
    while hasattr(command, "commands"):
        # Options of the group itself are flags: words that are none are names of commands.
        word = next((word for word in before if not word.startswith("-")), None)
        if word is None:
            yield from _begin(begun, [*_commands(command), *_options(command, begun)])
            return
        if word not in command.commands:
            return
        before = before[before.index(word) + 1 :]
        path.append(word)
        command = command.commands[word]
    yield from _of_command(command, path, before, begun)


def _of_command(
    command: Any, path: list[str], before: list[str], begun: str
) -> Iterator[Candidate]:
    """Within one command: an option, the value of an option, or an argument."""
    taking = {
        name: parameter
        for parameter in command.params
        if parameter.param_type_name == "option" and not _is_flag(parameter)
        for name in parameter.opts
    }
    waiting, arguments, only_arguments = None, 0, False
    for word in before:
        if waiting is not None:
            waiting = None
        elif word == "--" and not only_arguments:
            only_arguments = True
        elif word.startswith("-") and len(word) > 1 and not only_arguments:
            waiting = taking.get(word)
        else:
            arguments += 1
    if waiting is not None:
        yield from _begin(begun, _values(waiting, path))
        return
    name, sign, value = begun.partition("=")
    if sign and name in taking and not only_arguments:
        found = _begin(value, _values(taking[name], path))
        yield from (Candidate(f"{name}={c.text}", c.help) for c in found if c.text != FILES)
        return
    if begun.startswith("-") and not only_arguments:
        yield from _begin(begun, _options(command, begun))
        return
    places = [p for p in command.params if p.param_type_name == "argument"]
    if places and (arguments < len(places) or places[-1].nargs < 0):
        yield from _begin(begun, _values(places[min(arguments, len(places) - 1)], path))


def _begin(begun: str, found: Iterable[Candidate]) -> Iterator[Candidate]:
    return (c for c in found if c.text == FILES or c.text.startswith(begun))


def _is_flag(parameter: Any) -> bool:
    return bool(parameter.is_flag or parameter.count)


def _commands(group: Any) -> Iterator[Candidate]:
    for name, command in group.commands.items():
        if not command.hidden:
            yield Candidate(name, command.get_short_help_str(200))


def _options(command: Any, begun: str) -> Iterator[Candidate]:
    if not begun.startswith("-"):
        return
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            for name in (*parameter.opts, *parameter.secondary_opts):
                yield Candidate(name, (parameter.help or "").partition(". ")[0])
    yield Candidate("--help", "Show the help.")


def _values(parameter: Any, path: list[str]) -> Iterator[Candidate]:
    """Values of an option or an argument, where something is known of them."""
    choices = getattr(parameter.type, "choices", None)
    metavar = str(parameter.metavar or "").removesuffix("...")
    if choices is not None:
        yield from (Candidate(str(choice)) for choice in choices)
    elif metavar == "MODEL":
        stored_only = path[-1] in _STORED_ONLY
        yield from _models(stored_only=stored_only)
        if not stored_only:
            yield Candidate(FILES)
    elif parameter.type.name in ("path", "file", "directory", "filename") or "FOLDER" in metavar:
        yield Candidate(FILES)
    else:
        yield from map(Candidate, _of_plan(parameter.name))


def _of_plan(name: str) -> Iterable[str]:
    """Values of the options that choose how a model runs."""
    from typing import get_args

    from sartor.plan import plan

    match name:
        case "kv":
            return get_args(plan.KVFormat)
        case "activation":
            return get_args(plan.ActivationFormat)
        case "isa":
            return plan.ISAS
        case "backend":
            from sartor.backends.registry import backend_names

            return ("auto", *backend_names())
    return ()


def _models(*, stored_only: bool) -> Iterator[Candidate]:
    from sartor.store import ModelStore

    store = ModelStore()
    for model in store.list():
        yield Candidate(model.name, "stored")
    if not stored_only:
        for entry in store.catalogue.entries.values():
            yield Candidate(entry.name, f"{entry.title}, {entry.parameters}")
        yield from map(Candidate, _PREFIXES)
