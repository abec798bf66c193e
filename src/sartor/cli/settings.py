"""Values of options that the command line does not give: variables, and the file ``sartor.toml``.

An option's value is that of the command line, else of a variable (``SARTOR_SERVE_PORT`` for one
command, ``SARTOR_THREADS`` for each that has such an option), else of the command's section in the
file (``[serve]``), else of the file's general keys, else its default. The option parser gets what
is found as its map of defaults: commands know nothing of this, and each option can be set.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.errors import UsageError

if TYPE_CHECKING:
    import typer

FILE = "sartor.toml"
VARIABLE = "SARTOR_CONFIG"
PREFIX = "SARTOR_"
PRESETS = "presets"
_OTHER_VARIABLES = frozenset({"SARTOR_CONFIG", "SARTOR_HOME", "SARTOR_FUZZ_CASES"})
_OTHER_PREFIXES = ("SARTOR_TEST_",)  # what the tests of the project read
_SHOWN = 60
Table = Mapping[str, Any]
Names = tuple[str, ...]


def config_path(named: str | None = None) -> Path:
    """The file that ``--config`` names, else ``SARTOR_CONFIG``, else the one in the platform's
    folder for settings, which need not be there."""
    chosen = named or os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "sartor" / FILE
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or str(home / "AppData" / "Roaming")
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or str(home / ".config")
    return Path(base) / "sartor" / FILE


@dataclass(frozen=True)
class Source:
    """Where a value was set: in a variable, or in a section of the file ("" is its beginning)."""

    variable: str = ""
    file: Path = Path()
    section: str = ""

    def __str__(self) -> str:
        section = f"[{self.section}] of " if self.section else ""
        return self.variable or f"{section}{self.file}"

    def of(self, key: str) -> str:
        """A key of this place, for the beginning of an error."""
        section = f"[{self.section}] " if self.section else ""
        return self.variable or f"{self.file}: {section}{key}"


@dataclass(frozen=True)
class Setting:
    """A value that the command line does not give, as the option parser takes it."""

    value: Any
    source: Source


@dataclass(frozen=True)
class Option:
    """An option of a command: its name in the file (``max_tokens``), and as the parser knows it."""

    key: str
    parameter: Any

    @property
    def kind(self) -> str:
        """What its values are: bool, int, float, path or text."""
        if self.parameter.is_flag:
            return "bool"
        # "integer" until typer 0.23, "int" since.
        name = str(self.parameter.type.name).removesuffix(" range").replace("integer", "int")
        return name if name in ("int", "float", "path") else "text"


@dataclass
class Settled:
    """What file and variables come to.

    values     by command and by the parser's name of the option
    problems   what is wrong: of one command, or of all (None)
    unknown    a line for each variable that no command knows
    """

    values: dict[Names, dict[str, Setting]] = field(default_factory=dict)
    problems: list[tuple[Names | None, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def problem_of(self, names: Names) -> str:
        """The first that keeps a command from running; "" for none."""
        return next((text for whose, text in self.problems if whose in (None, names)), "")

    def default_map(self) -> dict[str, Any]:
        """The values as the option parser takes them, by names of commands and options."""
        whole: dict[str, Any] = {}
        for names, values in self.values.items():
            table = whole
            for name in names:
                table = table.setdefault(name, {})
            table.update({name: setting.value for name, setting in values.items()})
        return whole


@dataclass
class Settings:
    """What file and variables say.

    ``tables`` is the file's content; ``problem`` says what is wrong with the file as a whole.
    ``used`` has what applies to the command that runs, by the parser's names.
    """

    path: Path
    tables: Table = field(default_factory=dict)
    problem: str = ""
    used: dict[str, Setting] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """Those that may be values of options; an empty one counts as none."""
        return {
            name: value
            for name, value in os.environ.items()
            if name.startswith(PREFIX)
            and value
            and name not in _OTHER_VARIABLES
            and not name.startswith(_OTHER_PREFIXES)
        }

    @property
    def say_something(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.tables or self.problem or self.variables)

    def is_from_file(self, name: str) -> bool:
        """Whether an option that is not on the command line has its value from the file."""
        return name in self.used and not self.used[name].source.variable

    def explained(self, message: str) -> str:
        """The message of an error, with where a value that it names was set."""
        for name, setting in self.used.items():
            spelt = name.replace("_", "[-_]")
            if re.search(rf"(?<![\w-]){spelt}\b", message.replace("--", " ")):
                return f"{message} ({name} is set by {setting.source})"
        return message


def read_settings(named: str | None = None) -> Settings:
    """Reads the file where there is one; what is wrong with it is in ``problem``."""
    path = config_path(named)
    if not path.exists():
        chosen = "--config" if named else VARIABLE if os.environ.get(VARIABLE) else ""
        return Settings(path, problem=f"{path}: no such file; {chosen} names it" if chosen else "")
    import tomllib

    try:
        return Settings(path, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError:
        problem = "no valid TOML: it is not UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"no valid TOML: {error}"
    return Settings(path, problem=f"{path}: {problem}")


def settings_of(call: typer.Context) -> Settings:
    """Those of the command that runs."""
    return call.find_object(Settings) or Settings(config_path())


def options_of(command: Any) -> list[Option]:
    """The options of a command that can be set."""
    return [
        Option(max(parameter.opts, key=len).lstrip("-").replace("-", "_"), parameter)
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_eager
    ]


def leaves(command: Any, names: Names = ()) -> Iterator[tuple[Names, Any]]:
    """Every command that does something and can be set, by its names: ("run",), ("keys", "add")."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield names, command
        return
    for name, child in inner.items():
        if name != "config":
            yield from leaves(child, (*names, name))


def settle(settings: Settings, root: Any) -> Settled:
    """What file and variables come to for all commands below ``root``, with all that is wrong."""
    commands = {names: options_of(command) for names, command in leaves(root)}
    found = Settled()
    if settings.problem:
        found.problems.append((None, settings.problem))
    _check_names(settings, commands, found)
    for names, options in commands.items():
        values = found.values.setdefault(names, {})
        for option in options:
            given = next(_given(settings, names, option.key), None)
            if given is None:
                continue
            value, source = given
            try:
                values[option.parameter.name] = Setting(_typed(option, value, source), source)
            except UsageError as error:
                found.problems.append((names, str(error)))
    return found


def _given(settings: Settings, names: Names, key: str) -> Iterator[tuple[Any, Source]]:
    """The values of a command's option, what counts first."""
    for variable in _variables(names, key):
        if variable in settings.variables:
            yield settings.variables[variable], Source(variable)
    own = _section(settings.tables, names)
    for table, section in ((own, ".".join(names)), (settings.tables, "")):
        for name, value in table.items():
            if _normal(name) == key and not isinstance(value, dict):
                yield value, Source(file=settings.path, section=section)


def _variables(names: Names, key: str) -> tuple[str, str]:
    return f"{PREFIX}{'_'.join(names)}_{key}".upper(), f"{PREFIX}{key}".upper()


def _section(tables: Table, names: Names) -> Table:
    """The file's section of a command; empty where there is none."""
    table: Any = tables
    for name in names:
        table = table.get(name)
        if not isinstance(table, dict):
            return {}
    found: Table = table
    return found


def _check_names(
    settings: Settings, commands: Mapping[Names, Sequence[Option]], found: Settled
) -> None:
    """Names in the file, and of variables, that nothing has."""
    keys = {option.key for options in commands.values() for option in options}
    for key, value in settings.tables.items():
        if isinstance(value, dict):
            if key != PRESETS:
                _check_section(settings.path, (key,), value, commands, found)
        elif _normal(key) not in keys:
            text = f"{settings.path}: {key}: no command has such an option"
            found.problems.append((None, text + near(_normal(key), keys)))
    known = {
        variable
        for names, options in commands.items()
        for option in options
        for variable in _variables(names, option.key)
    }
    found.unknown += [
        f"the variable {name} is not known{near(name, known)}"
        for name in sorted(settings.variables.keys() - known)
    ]


def _check_section(
    path: Path,
    names: Names,
    table: Table,
    commands: Mapping[Names, Sequence[Option]],
    found: Settled,
) -> None:
    where = f"{path}: [{'.'.join(names)}]"
    inner = {known[len(names)] for known in commands if names == known[: len(names)] != known}
    if names in commands:
        keys = {option.key for option in commands[names]}
        for key, value in table.items():
            if _normal(key) not in keys or isinstance(value, dict):
                text = f"{where} {key}: `sartor {' '.join(names)}` has no such option"
                found.problems.append((names, text + near(_normal(key), keys)))
    elif not inner:
        known = {name[len(names) - 1] for name in commands if name[:-1] == names[:-1]}
        known |= {name[0] for name in commands} | {PRESETS} if len(names) == 1 else set()
        text = f"{where}: there is no such command{near(names[-1], known)}"
        found.problems.append((None, text))
    for key, value in table.items() if inner else ():
        if isinstance(value, dict):
            _check_section(path, (*names, key), value, commands, found)
        else:
            sections = ", ".join(f"[{'.'.join(names)}.{name}]" for name in sorted(inner))
            found.problems.append((None, f"{where} {key}: write it into one of {sections}"))


def near(name: str, known: Iterable[str]) -> str:
    """A question that names what was meant, perhaps."""
    import difflib

    found = difflib.get_close_matches(name, sorted(known), 2, 0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _normal(key: str) -> str:
    return key.replace("-", "_")


def _typed(option: Option, value: Any, source: Source) -> Any:
    """A value as the parser takes it. UsageError where it is none for this option."""
    if not option.parameter.multiple:
        return _one(option, value, source)
    if source.variable:
        value = _listed(value)
    if not isinstance(value, list):
        raise _wrong(option, value, source)
    return [_one(option, item, source) for item in value]


_KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
}


def _one(option: Option, value: Any, source: Source) -> Any:
    if not source.variable:  # whose values are text, and for the parser to read
        _, types = _KINDS.get(option.kind, ("", (str,)))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _wrong(option, value, source)
    if option.kind == "path":
        path = Path(os.path.expanduser(value))
        # A file may be used from any folder, so that its paths start where it lies.
        value = str(path if source.variable else source.file.parent / path)
    try:
        option.parameter.type(value, option.parameter, None)
    except Exception as error:
        # The parser's own; its class lives elsewhere in each of the parser's versions.
        if not hasattr(error, "format_message"):
            raise
        reason = str(getattr(error, "message", error)).strip().rstrip(".")
        raise UsageError(f"{source.of(option.key)}: {reason}") from None
    return value


def _wrong(option: Option, value: Any, source: Source) -> UsageError:
    wanted, _ = _KINDS.get(option.kind, ("a string", ()))
    wanted = "a list of strings" if option.parameter.multiple else wanted
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
    return UsageError(f"{source.of(option.key)} is {shown}; it must be {wanted}")


def _listed(text: str) -> list[str]:
    """Several values in one variable: a JSON list of strings; anything else is one value."""
    if text.startswith("["):
        import json

        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        if all(isinstance(item, str) for item in found):
            return list(found)
    return [text]
