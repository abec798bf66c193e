"""What the model sees of a chat, and files of chats and of history."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sartor import SamplingParams
from sartor.cli import history
from sartor.cli.conversation import Conversation, changed, load, save
from sartor.cli.history import HistoryFile, history_path
from sartor.errors import CapacityError, SartorError, UsageError

PARAMS = SamplingParams(max_tokens=10)


def encode(messages: Sequence[dict[str, Any]]) -> list[int]:
    """A token a character, and one a message."""
    return [0] * sum(1 + len(message["content"]) for message in messages)


def talk(turns: int, length: int = 9, system: str | None = "system") -> Conversation:
    conversation = Conversation(system)
    for _ in range(turns):
        conversation.add("user", "u" * length)
        conversation.add("assistant", "a" * length)
    conversation.add("user", "question?")
    return conversation


def test_nothing_is_forgotten_while_there_is_room() -> None:
    conversation = talk(3)
    ids, gone = conversation.fit(encode, 100, 10)
    assert (len(ids), gone, conversation.forgotten) == (77, 0, 0)


def test_whole_turns_go_and_the_system_prompt_stays() -> None:
    conversation = talk(10)
    ids, gone = conversation.fit(encode, 200, None)
    assert len(ids) <= 200 - 50
    assert len(ids) >= 100  # about half is kept
    assert conversation.forgotten == 2 * gone > 0
    window = conversation.window()
    assert window[0] == {"role": "system", "content": "system"}
    assert window[1]["role"] == "user"
    assert window[-1]["content"] == "question?"
    assert len(conversation.everything()) == 22  # a file still has all
    assert conversation.fit(encode, 200, None)[1] == 0  # there is room now


def test_a_large_turn_is_kept_where_it_fits() -> None:
    conversation = talk(1, 20)
    conversation.messages[2:2] = [
        {"role": "user", "content": "x" * 50},
        {"role": "assistant", "content": "y" * 60},
    ]
    assert conversation.fit(encode, 180, None)[1] == 1
    assert len(conversation.window()[1]["content"]) == 50


def test_a_message_that_is_too_long_names_both_sizes() -> None:
    conversation = talk(2)
    conversation.add("user", "x" * 300)
    with pytest.raises(CapacityError, match=r"308 tokens.* 200; shorten"):
        conversation.fit(encode, 200, None)
    assert conversation.forgotten == 0
    assert conversation.undo() == "x" * 300
    conversation.fit(encode, 200, None)


def test_a_long_message_may_leave_less_for_the_answer() -> None:
    conversation = Conversation()
    conversation.add("user", "x" * 190)
    assert len(conversation.fit(encode, 200, None)[0]) == 191


def test_files_keep_everything(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = talk(2)
    conversation.add("assistant", "中文 \ud83d")  # a lone surrogate too
    conversation.forgotten = 2
    params = changed(PARAMS, {"temperature": 0.5, "stop": "END", "seed": 7})
    save(path, conversation, "m", params, False)
    found, read, model = load(path, PARAMS)
    assert (found.everything(), found.forgotten) == (conversation.everything(), 0)
    assert (read, model) == (params, "m")
    with pytest.raises(UsageError, match="there already"):
        save(path, conversation, "m", params, False)
    save(path, Conversation(None, [{"role": "user", "content": "x"}]), "m", params, True)
    assert len(json.loads(path.read_text())["messages"]) == 1
    assert os.listdir(tmp_path) == ["chat.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX rights")
def test_rights_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("{}")
    real.chmod(0o640)
    link.symlink_to(real)
    save(link, talk(1), "m", PARAMS, True)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    with pytest.raises(UsageError, match="no file"):
        save(Path("/dev/null"), talk(1), "m", PARAMS, True)


def test_a_bare_list_of_messages_is_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text('[{"role": "user", "content": "hi"}]', encoding="utf-8-sig")
    found, read, model = load(path, PARAMS)
    assert (found.messages, read, model) == ([{"role": "user", "content": "hi"}], PARAMS, None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "no list of messages"),
        (b"{}", "no list of messages"),
        (b'{"messages": 3}', "no list of messages"),
        (b'["hi"]', "message 0 has no role"),
        (b'[{"role": "king", "content": ""}]', "message 0 has no role"),
        (b'[{"role": "user"}]', "message 0 has no content"),
        (b'{"messages": [], "params": 3}', "params is a int"),
        (b'{"messages": [], "params": {"heat": 1}}', "'heat'"),
        (b'{"messages": [], "params": {"top_p": 3}}', "params: top_p is 3"),
        (b'{"messages": [], "params": {"top_k": 1.5}}', "params: top_k is 1.5"),
        (b'{"messages": [], "params": {"stop": [1]}}', "params: stop must be"),
    ],
)
def test_files_that_hold_no_conversation(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(SartorError) as error:
        load(path, PARAMS)
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_history_is_bounded_and_survives_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "ENTRIES", 10)
    file = HistoryFile(tmp_path / "new" / "history")
    assert file.read() == []
    for number in range(30):
        file.append(f"entry\n{number}")
    file.append("x" * (history.LONGEST + 1))
    with file.path.open("ab") as damaged:
        damaged.write(b'3\n{"a"\n\xff\xfe\n')
    assert file.read() == [f"entry\n{number}" for number in range(20, 30)]
    assert len(file.path.read_text().splitlines()) == 10
    if os.name == "posix":
        assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_where_history_is(monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> None:
    assert history_path() == home / "history"
    monkeypatch.delenv("SARTOR_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "sartor" / "history"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_path() == Path.home() / ".local" / "state" / "sartor" / "history"
