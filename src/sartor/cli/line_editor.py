"""The prompt of a chat on a terminal, by prompt_toolkit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth, create_output
from prompt_toolkit.shortcuts import CompleteStyle

from sartor.cli.history import HistoryFile
from sartor.cli.reading import QUOTES, Typed, block, is_open
from sartor.cli.terminal import has_style


class LineEditor:
    """Edits a message over several lines, with history, search in it, and completion.

    ``history`` is where messages are kept, if they are (``keep``); ``complain`` hears, once, that
    this is not possible. ``words`` are what Tab completes, by the command before them; those of ""
    are the commands.
    """

    def __init__(
        self,
        history: HistoryFile,
        keep: bool,
        words: Mapping[str, Sequence[str]],
        complain: Callable[[str], None],
    ) -> None:
        self._history = KeptHistory(history, keep)
        self._complaint = complain
        self._pasted = False  # the text begins with what was pasted
        output = create_output()
        if hasattr(output, "enable_cpr"):
            output.enable_cpr = False  # not every terminal answers where its cursor is
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            history=self._history,
            completer=Words(words),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            key_bindings=self._keys(),
            prompt_continuation="  ",
            enable_suspend=True,
            search_ignore_case=True,
            output=output,
            color_depth=None if has_style() else ColorDepth.DEPTH_1_BIT,
        )

    def keep_history(self, on: bool) -> None:
        self._history.on = on

    def read(self) -> Typed:
        self._pasted = False
        self._complain()
        text = self._session.prompt("> ")
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if self._pasted and text.lstrip().startswith(QUOTES):
            return Typed(text, literal=True)
        return block(text) or Typed(text)

    def _complain(self) -> None:
        """Not in the middle of a prompt."""
        if self._history.failure:
            self._complaint(f"note: no history is kept: {self._history.failure}")
            self._history.failure = ""

    def _is_open(self, text: str) -> bool:
        return not self._pasted and is_open(text)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        here = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=here)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if self._is_open(buffer.text):
                buffer.insert_text("\n")
            elif buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=here)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=here)
        @keys.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                self._clear(event.current_buffer)
            else:
                event.app.exit(exception=KeyboardInterrupt())

        @keys.add(Keys.BracketedPaste, filter=here)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if not buffer.text:
                self._pasted = True
            buffer.insert_text(event.data.replace("\r\n", "\n").replace("\r", "\n"))

        return keys

    def _clear(self, buffer: Buffer) -> None:
        self._pasted = False
        buffer.reset()


class KeptHistory(History):
    """What was typed before, in this chat and in earlier ones; ``failure`` says why it cannot be
    kept, once."""

    def __init__(self, file: HistoryFile, on: bool) -> None:
        super().__init__()
        self.on = on
        self.failure = ""
        self._file: HistoryFile | None = file
        self._before: list[str] = []
        if on:
            try:
                self._before = file.read()
            except OSError as error:
                self._failed(error)

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._before)  # the newest first

    def store_string(self, string: str) -> None:
        if self._file is None or not self.on:
            return
        try:
            self._file.append(string)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if self._file is not None:
            self.failure = f"{self._file.path}: {error.strerror}"
            self._file = None


class Words(Completer):
    """Commands, their words and files; nothing in a message."""

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        self._words = words
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, _, begun = text.rpartition(" ")
        for word in self._words.get(command, ()):
            if word.startswith(begun):
                yield Completion(word, -len(begun))
        for command in ("/save ", "/load "):
            if text.startswith(command):
                path = text.removeprefix(command).removeprefix("-f ")
                yield from self._paths.get_completions(Document(path, len(path)), event)
