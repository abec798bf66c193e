"""The conversation of ``sartor run`` without a prompt."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sartor.cli.answer import Answer, follow, more_context
from sartor.cli.chat_commands import WORDS, After, ChatState, execute
from sartor.cli.conversation import Conversation, Message
from sartor.cli.display import open_display
from sartor.cli.reading import LineReader, Reader
from sartor.cli.terminal import Interrupts, is_terminal, left_as_found, quiet_keys, remark
from sartor.errors import CapacityError, SartorError

if TYPE_CHECKING:
    from sartor.engine.llm import LLM
    from sartor.engine.load import LoadedModel
    from sartor.graph import SamplingParams


def chat(
    llm: LLM,
    loaded: LoadedModel,
    params: SamplingParams,
    system: str | None,
    adapter: str,
    *,
    variables: Mapping[str, Any],
    special_in_text: bool,
    markdown: bool,
    history: bool,
) -> None:
    """Reads messages and answers them until the person leaves. ``variables`` are the chat
    template's; ``special_in_text`` is :class:`sartor.text.chat.Chat`'s."""
    from sartor.text.chat import Chat

    template = loaded.template
    assert template is not None  # the caller has looked

    def encode(messages: Sequence[Message]) -> list[int]:
        conversation = Chat(
            template, llm.tokenizer, messages, special_in_text=special_in_text, **variables
        )
        return conversation.encode()

    state = ChatState(
        model=loaded.name,
        context=llm.context_length,
        conversation=Conversation(system),
        params=params,
        encode=encode,
        reader=_reader(history),
        switches={"history": history, "markdown": markdown, "stats": True},
    )
    if system is not None:
        encode([*state.conversation.window(), {"role": "user", "content": "hello"}])
    remark(
        f"{loaded.name}, {state.context} tokens of context; /help lists what there is, /clear "
        "starts anew, Ctrl-D leaves"
    )
    if state.context < loaded.context_length:
        remark(
            f"note: {loaded.name} could have {loaded.context_length} tokens of context; memory for "
            "no more is free"
        )
    with left_as_found():
        _converse(llm, loaded, state, adapter)


def _converse(llm: LLM, loaded: LoadedModel, state: ChatState, adapter: str) -> None:
    warned = False
    while True:
        try:
            typed = state.reader.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                return
            remark("(Ctrl-C again, or Ctrl-D, leaves)")
            warned = True
            continue
        warned = False
        text = typed.text
        if not text.strip():
            continue
        try:
            if not typed.literal and text.startswith("/") and not text.startswith("//"):
                match execute(state, text):
                    case After.LEAVE:
                        return
                    case After.READ:
                        continue
            else:
                if not typed.literal and text.startswith("//"):
                    text = text[1:]
                state.conversation.add("user", text)
            _answer(llm, loaded, state, adapter)
        except SartorError as error:
            remark(f"error: {error}")


def _answer(llm: LLM, loaded: LoadedModel, state: ChatState, adapter: str) -> None:
    """Answers the last message; one that has no answer does not stay in the conversation."""
    conversation = state.conversation
    said: list[str] = []
    try:
        ids = _fit(loaded, state)
        display = open_display(state.switches["markdown"])

        def show(text: str) -> None:
            interrupts.speaking = True
            said.append(text)
            display.feed(text)

        answer: Answer | None = None
        with quiet_keys(), Interrupts() as interrupts:
            try:
                chunks = llm.stream(ids, state.params, adapter=adapter)
                answer = follow(chunks, show, lambda: interrupts.asked)
            except KeyboardInterrupt:
                pass
            finally:
                if said or answer is not None:
                    display.end()
    except SartorError:
        if not said:
            conversation.undo()
        raise
    finally:
        if said:
            conversation.add("assistant", "".join(said))
    if answer is None or answer.finish_reason is None:
        if said:
            remark("(stopped)")
        else:
            conversation.undo()
            remark("(stopped before the first word; the message is taken back)")
    elif not said:
        conversation.add("assistant", "")
    if answer is not None:
        _account(state, answer)


def _fit(loaded: LoadedModel, state: ChatState) -> list[int]:
    """The prompt's tokens; what had to be forgotten for it is told."""
    try:
        ids, gone = state.conversation.fit(state.encode, state.context, state.params.max_tokens)
    except CapacityError as error:
        raise CapacityError(f"{error}{more_context(loaded, state.context)}") from None
    if gone:
        turns = "turn is" if gone == 1 else f"{gone} turns are"
        remark(
            f"(the context of {state.context} tokens is full: the oldest {turns} forgotten; "
            "/save still has them)"
        )
    return ids


def _account(state: ChatState, answer: Answer) -> None:
    state.last = answer
    state.answers += 1
    state.answer_tokens += answer.completion_tokens
    if answer.finish_reason == "length":
        if answer.prompt_tokens + answer.completion_tokens >= state.context:
            remark(
                f"(the answer reached the end of the context, {state.context} tokens; /clear "
                "starts anew)"
            )
        else:
            remark(f"(the answer reached max_tokens, {state.params.max_tokens}; /set changes it)")
    if state.switches["stats"]:
        remark(answer.speed())


def _reader(history: bool) -> Reader:
    """An editor where both ends are a terminal that can be written anywhere."""
    dumb = os.environ.get("TERM", "dumb" if os.name == "posix" else "") in ("dumb", "unknown", "")
    if os.name != "posix":
        dumb = False
    if dumb or not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        return LineReader()
    from sartor.cli.history import HistoryFile, history_path
    from sartor.cli.line_editor import LineEditor

    return LineEditor(HistoryFile(history_path()), history, WORDS, remark)
