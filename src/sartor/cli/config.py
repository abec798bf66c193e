"""``sartor config``: every value that a command would run with, and where it is from."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sartor.cli.presets import preset, preset_names
from sartor.cli.screen import print_facts, print_json, print_table, say
from sartor.cli.settings import PRESETS, Settings, Source, leaves, options_of, settings_of, settle

config = typer.Typer(help="Show settings: each value, and where it comes from.")

_ENVIRONMENT = (
    "SARTOR_CONFIG",
    "SARTOR_HOME",
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "APPDATA",
    "LOCALAPPDATA",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_ENDPOINT",
    "MODELSCOPE_DOMAIN",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "PIP_NO_INDEX",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "NO_COLOR",
)
"""Variables that something here reads, beside those of options."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL|_HEADERS", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHOWN = 60
_NARROW = 20


@dataclass(frozen=True)
class _Row:
    """A value of an option, and the commands that would run with it."""

    key: str
    value: Any
    source: Source | None
    commands: list[str]

    @property
    def origin(self) -> str:
        return "default" if self.source is None else str(self.source)

    @property
    def shown(self) -> str:
        """The same without the folder of the file, which is said once."""
        if self.source is None or self.source.variable:
            return self.origin
        section = f" [{self.source.section}]" if self.source.section else ""
        return self.source.file.name + section


@config.callback(invoke_without_command=True)
def show(
    call: typer.Context,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and nothing else there.")
    ] = False,
) -> int:
    """Show every value that commands would run with, and where it comes from.

    The command line comes first, then a variable (SARTOR_SERVE_PORT for one command,
    SARTOR_THREADS for each that has such an option), then the command's section in sartor.toml,
    then the keys at its beginning, then the default. docs/configuration.md tells more.
    """
    if call.invoked_subcommand is not None:
        return 0
    from sartor.cli.app import command_line

    settings, root = settings_of(call), command_line("")
    settled = settle(settings, root)
    rows = _rows(settings, root)
    presets, problems = _presets(settings)
    problems = list(dict.fromkeys([text for _, text in settled.problems] + problems))
    if json:
        print_json(
            {
                "file": str(settings.path),
                "exists": settings.path.exists(),
                "values": [
                    {"command": name, "key": r.key, "value": r.value, "from": r.origin}
                    for r in rows
                    for name in r.commands
                ],
                PRESETS: presets,
                "environment": dict(_environment()),
                "problems": problems,
                "warnings": settled.unknown,
            }
        )
    else:
        print(f"{settings.path}{'' if settings.path.exists() else ' (not there)'}\n")
        _print_rows(rows)
        for name, values in presets.items():
            print(f"\n[{PRESETS}.{name}]")
            print_facts([(key, _plain(value)) for key, value in values.items()] or [("", "empty")])
        print("\nENVIRONMENT")
        print_facts(list(_environment()) or [("", "nothing that is read here is set")])
    for line in settled.unknown:
        say(f"warning: {line}")
    for problem in problems:
        say(f"error: {problem}")
    return 2 if problems else 0


@config.command()
def path(call: typer.Context) -> int:
    """Print where the settings are read from."""
    print(settings_of(call).path)
    return 0


def _rows(settings: Settings, root: Any) -> list[_Row]:
    """What differs first; equal values of several commands are one row."""
    values = settle(settings, root).values
    rows: dict[tuple[str, str, str], _Row] = {}
    for names, command in leaves(root):
        for option in options_of(command):
            setting = values[names].get(option.parameter.name)
            value = _default(option.parameter) if setting is None else setting.value
            row = _Row(
                option.key, _without_login(value), None if setting is None else setting.source, []
            )
            same = rows.setdefault((row.key, repr(row.value), row.origin), row)
            same.commands.append(" ".join(names))
    return sorted(rows.values(), key=lambda row: (row.source is None, row.key))


def _print_rows(rows: list[_Row]) -> None:
    """As a table; a narrow terminal gets no column of commands, and cut values."""
    table = [["KEY", "VALUE", "FROM", "COMMANDS"]]
    table += [[r.key, _plain(r.value), r.shown, ", ".join(r.commands)] for r in rows]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns
        key, value, origin = (max(len(row[column]) for row in table) + 2 for column in range(3))
        wide = room - key - value - origin
        if wide >= _NARROW:
            table = [[*row[:3], _cut(row[3], wide)] for row in table]
        else:
            table = [[row[0], _cut(row[1], room - key - origin), row[2]] for row in table]
    print_table(table)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width, 8) - 3] + "..."


def _default(parameter: Any) -> Any:
    default = parameter.default
    if default is None and isinstance(parameter.show_default, str):
        return parameter.show_default
    return default() if callable(default) else default


def _presets(settings: Settings) -> tuple[dict[str, dict[str, Any]], list[str]]:
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for name in preset_names(settings):
        try:
            whole = preset(settings, name)
        except Exception as error:
            problems.append(str(error))
            continue
        given: dict[str, Any] = {
            "model": whole.model,
            "system": whole.system,
            **whole.sampling.said(),
        }
        if whole.template:
            given["template"] = dict(whole.template)
        found[name] = {key: value for key, value in given.items() if value not in (None, "")}
    return found, problems


def _environment() -> Iterator[tuple[str, str]]:
    """The variables that are set; secrets are not told."""
    for name in _ENVIRONMENT:
        for spelling in (name, name.lower()):  # proxies are written both ways
            value = os.environ.get(spelling)
            if value:
                yield spelling, "set" if _SECRET.search(name) else _LOGIN.sub("***", value)
    if not os.environ.get("HF_TOKEN"):
        yield "HF_TOKEN", "not set"


def _without_login(value: Any) -> Any:
    if isinstance(value, str):
        return _LOGIN.sub("***", value)
    return [_without_login(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> str:
    if value is None or value in ("", [], ()):
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return _cut(" ".join(text.split()), _SHOWN)
