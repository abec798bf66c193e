"""The shape of content: found by rendering, however the template reaches the text."""

from __future__ import annotations

from typing import Any

import pytest
from test_template import CHATML, GEMMA, LLAMA3, TOOLS, oracle, template

from sartor.errors import UsageError
from sartor.text.template_process import TemplateProcess

EACH = "{% for m in messages %}"
END = "{% endfor %}"

# Templates that show the text of parts only, each by another way.
PARTS_ONLY = {
    "selectattr": EACH + "{{ m.role }}: {% for c in m['content'] | selectattr('type','equalto',"
    "'text') %}{{ c.text }}{% endfor %}" + END,
    "map": EACH + "{{ m.content | map(attribute='text') | join }}" + END,
    "map after a filter": EACH + "{{ m.content | selectattr('type', 'eq', 'text') "
    "| map(attribute='text') | join('') }}" + END,
    "assignment": EACH + "{% set parts = m.content %}{% for p in parts %}{{ p['text'] }}{% endfor %}"
    + END,
    "namespace": EACH + "{% set ns = namespace(p=m.content) %}{% for p in ns.p %}{{ p.text }}"
    "{% endfor %}" + END,
    "slice": EACH + "{% for p in m.content[0:] %}{{ p.text }}{% endfor %}" + END,
    "reverse twice": EACH + "{% for p in m.content[::-1] | reverse %}{{ p.text }}{% endfor %}" + END,
    "macro": "{% macro show(parts) %}{% for p in parts %}{{ p.text }}{% endfor %}{% endmacro %}"
    + EACH + "{{ show(m.content) }}" + END,
    "get": EACH + "{% for p in m.get('content') %}{{ p.get('text') }}{% endfor %}" + END,
    "items": EACH + "{% for k, v in m | items if k == 'content' %}{% for p in v %}{{ p.text }}"
    "{% endfor %}{% endfor %}" + END,
    "loop over contents": "{% for parts in messages | map(attribute='content') %}{% for p in parts %}"
    "{{ p.text }}{% endfor %}{% endfor %}",
    "test": EACH + "{% if m.content is not string %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endif %}" + END,
    "conditional": EACH + "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}" + END,
}  # fmt: skip

# Templates that show one string only.
TEXT_ONLY = {
    "direct": EACH + "{{ m.content }}" + END,
    "filter": EACH + "{{ m.content | trim | upper | lower }}" + END,
    "assignment": EACH + "{% set content = m['content'] %}{% set x = content %}{{ x }}" + END,
    "concatenation": EACH + "{{ m.role + ': ' + m.content }}" + END,
    "split": EACH + "{{ m.content.split('</think>')[-1].lstrip() }}" + END,
    "replace": EACH + "{{ m.content | replace('\\n', ' ') }}" + END,
    "slice": EACH + "{{ m.content[0:] }}" + END,
    "loop over characters": EACH + "{% for c in m.content %}{{ c }}{% endfor %}" + END,
    "test": EACH + "{% if m.content is string %}{{ m.content }}{% endif %}" + END,
    "named content": "{% for content in messages | map(attribute='content') %}{{ content }}"
    "{% endfor %}",
    "json": EACH + "{{ m.content | tojson }}" + END,
    "parts are printed": EACH + "{% if m.content is iterable %}{{ m.content }}{% endif %}" + END,
    "texts are printed": EACH + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content | map(attribute='text') | list }}{% endif %}" + END,
    "parts are dumped": EACH + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content | tojson }}{% endif %}" + END,
    "twice": EACH + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text }}{{ p.text }}{% endfor %}{% endif %}" + END,
}

TEXT = [{"role": "user", "content": "hello there"}]
PART = [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
]


@pytest.mark.parametrize("source", PARTS_ONLY.values(), ids=PARTS_ONLY.keys())
def test_text_becomes_one_part(source: str) -> None:
    ours = template(source)
    assert ours.render(TEXT) == oracle(source, PART)
    assert ours.render(PART) == oracle(source, PART)
    assert ours.render(PARTS) == oracle(source, PARTS)
    assert "hello there" in ours.render(TEXT)


@pytest.mark.parametrize("source", TEXT_ONLY.values(), ids=TEXT_ONLY.keys())
def test_parts_become_text(source: str) -> None:
    ours = template(source)
    assert ours.render(TEXT) == oracle(source, TEXT)
    assert ours.render(PART) == oracle(source, TEXT)
    assert ours.render(PARTS) == oracle(source, [{"role": "user", "content": "one\ntwo"}])
    assert "hello there" in ours.render(PART)


def test_what_takes_both_gets_what_was_sent() -> None:
    source = (
        EACH + "{% if m.content is string %}s:{{ m.content }}{% else %}{% for p in m.content %}"
        "p:{{ p.text }}{% endfor %}{% endif %}" + END
    )
    ours = template(source)
    assert [ours.render(chat) for chat in (TEXT, PART, PARTS)] == [
        "s:hello there", "p:hello there", "p:onep:two",
    ]  # fmt: skip


def test_one_part_alone() -> None:
    source = EACH + "[{{ m.content[0].text }}]" + END
    ours = template(source)
    assert ours.render(TEXT) == ours.render(PART) == "[hello there]"
    assert ours.render(PARTS) == "[one\ntwo]"  # the second would be lost


def test_each_role_by_itself() -> None:
    source = (
        EACH + "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ m.content + '!' }}{% endif %}" + END
    )
    chat = [{"role": "system", "content": "S"}, *TEXT, {"role": "assistant", "content": "A"}]
    assert template(source).render(chat) == "S!hello thereA!"
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    assert template(source).render(parts) == "S!hello thereA!"


ALTERNATE = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = [] %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first %}{% for p in s %}{{ p.text }}|{% endfor %}{% endif %}"
    "{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
)
LAST_ONLY = "{% for p in messages[-1].content %}{{ p.text }}{% endfor %}"
NEEDS_A_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('no user') }}{% endif %}" + PARTS_ONLY["map"]
)
NEEDS_A_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + PARTS_ONLY["map"]
)
NEEDS_TOOLS = (
    "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}{% for t in tools %}"
    "{{ t.function.name }}{{ t.function.parameters.properties | length }}{% endfor %}"
    + PARTS_ONLY["map"]
)
THREE = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]


@pytest.mark.parametrize("source", [ALTERNATE, NEEDS_A_USER, NEEDS_A_SYSTEM, PARTS_ONLY["map"]])
def test_what_a_template_asks_of_a_chat(source: str) -> None:
    rendered = template(source).render(THREE)
    assert rendered.replace("|", "") == "SUAV"


def test_the_last_message_only() -> None:
    assert template(LAST_ONLY).render(THREE) == "V"


def test_with_tools() -> None:
    ours = template(NEEDS_TOOLS)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}
    assert ours.render(THREE, tools=[tool]) == "f1SUAV"
    with pytest.raises(UsageError, match="no tools"):
        ours.render(THREE)


def test_the_chat_itself_decides_where_probes_do_not_fit() -> None:
    """Here only a chat of exactly its form gets through."""
    source = (
        "{% if messages | map(attribute='role') | join(' ') != 'setup user user' or not mode %}"
        "{{ raise_exception('odd') }}{% endif %}" + PARTS_ONLY["map"]
    )
    chat = [{"role": role, "content": role[0]} for role in ("setup", "user", "user")]
    ours = template(source)
    assert ours.render(chat, mode="x") == "suu"
    with pytest.raises(UsageError, match="refuses these messages: odd"):
        ours.render(chat)


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}nothing of it",
        EACH + "{{ m.role }}" + END,
        "{{ messages[0]['content'][0] }}",
        EACH + "{% for p in m.content %}{{ p.txet }}{% endfor %}" + END,
        EACH + "{{ m.content | length }}" + END,
        EACH + "{{ m.content | selectattr('type', 'equalto', 'text') }}" + END,
        EACH + "{{ m.content[:2] }}" + END,
        EACH + "{% if m.role == 'User' %}{{ m.content }}{% endif %}" + END,
    ],
)
def test_text_that_no_shape_shows_is_refused(source: str) -> None:
    for chat in (TEXT, PART, PARTS):
        with pytest.raises(UsageError, match="does not show the text of messages with role 'user'"):
            template(source).render(chat)


def test_a_role_that_is_left_out_is_refused_by_name() -> None:
    source = EACH + "{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}" + END
    ours = template(source)
    with pytest.raises(UsageError, match=r"role 'system', .*put it into a message of the user"):
        ours.render(THREE)
    assert ours.render(THREE[1:]) == "UAV"
    assert ours.render([{"role": "system", "content": " "}, *THREE[1:]]) == "UAV"  # nothing to lose


def test_what_one_request_sets_decides_for_no_other() -> None:
    source = EACH + "{% if not hidden %}{{ m.content }}{% endif %}" + END
    ours = template(source)
    assert ours.render(TEXT, hidden=True) == ""  # as it asked for
    assert ours.render(TEXT) == "hello there"
    only = EACH + "{% if shown %}{{ m.content }}{% endif %}" + END
    ours = template(only)
    with pytest.raises(UsageError, match="does not show the text"):
        ours.render(TEXT)
    assert ours.render(TEXT, shown=True) == "hello there"


def test_probes_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = template(PARTS_ONLY["selectattr"])
    ours.render(THREE)
    calls: list[object] = []
    render = TemplateProcess.render

    def counted(process: TemplateProcess, source: str, variables: dict[str, Any]) -> str:
        calls.append(variables)
        return render(process, source, variables)

    monkeypatch.setattr(TemplateProcess, "render", counted)
    ours.render(THREE)
    ours.render(THREE[:2])
    assert len(calls) == 2


def test_a_template_that_never_ends_is_asked_few_times() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match="loops more than"):
        template(source).render(THREE)


def test_other_names_of_text_parts() -> None:
    source = PARTS_ONLY["selectattr"]
    for kind in ("input_text", "output_text"):
        chat = [{"role": "user", "content": [{"type": kind, "text": "x"}]}]
        assert template(source).render(chat) == "user: x"
    untyped = [{"role": "user", "content": [{"text": "x"}]}]
    assert template(source).render(untyped) == "user: x"
    for part in (
        {"type": "image"},
        {"type": "text"},
        "x",
        None,
        {"type": "refusal", "refusal": ""},
    ):
        with pytest.raises(UsageError, match="message 0 holds a part of type"):
            template(source).render([{"role": "user", "content": [part]}])


# No content.

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
NONE_IS_A_CALL = (
    EACH + "{% if m.content is none %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}" + END
)
ABSENT_IS_A_CALL = (
    EACH + "{% if m.content is defined %}{{ m.content }}{% else %}{% for c in m.tool_calls %}"
    "<call>{{ c.function.name }}{% endfor %}{% endif %}" + END
)
PARTS_AND_CALLS = (
    EACH + "{% for p in m.content %}{{ p.text }}{% endfor %}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}{% endfor %}" + END
)
ADDS_AND_CALLS = (
    EACH + "{{ '' + m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% endfor %}" + END
)
PRINTS_AND_CALLS = (
    EACH + "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}"
    + END
)  # fmt: skip
FORMS: list[dict[str, Any]] = [{"content": None}, {"content": ""}, {"content": []}, {}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "source",
    [NONE_IS_A_CALL, ABSENT_IS_A_CALL, PARTS_AND_CALLS, ADDS_AND_CALLS, PRINTS_AND_CALLS],
)
def test_an_assistant_that_only_calls(source: str, form: dict[str, Any]) -> None:
    chat = [*TEXT, {"role": "assistant", **form, "tool_calls": [CALL]}, *TEXT]
    rendered = template(source).render(chat, tools=TOOLS)
    assert rendered == "hello there<call>fhello there"
    assert template(source).render(chat) == rendered


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, *PARTS_ONLY.values(), PRINTS_AND_CALLS])
def test_no_content_is_empty_text(source: str, role: str, form: dict[str, Any]) -> None:
    def chat(message: dict[str, Any]) -> list[dict[str, Any]]:
        message = {"role": role, **message}
        if role == "user":
            return [message]
        return [*TEXT, message, *TEXT] if role == "assistant" else [message, *TEXT]

    ours = template(source)
    rendered = ours.render(chat(form))
    assert rendered == ours.render(chat({"content": ""}))
    assert "None" not in rendered
    assert "[]" not in rendered


def test_the_messages_of_the_caller_stay_as_they_are() -> None:
    chat: list[dict[str, Any]] = [
        *TEXT, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "user"},
    ]  # fmt: skip
    template(PARTS_AND_CALLS).render(chat)
    assert chat[1:] == [
        {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "user"},
    ]  # fmt: skip


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA])
def test_over_http_it_is_the_same(source: str) -> None:
    from sartor.serving.openai_types import Message

    for form in FORMS:
        message = {"role": "assistant", **form}
        sent = [Message.model_validate(m).plain() for m in (*TEXT, message, *TEXT)]
        assert template(source).render(sent) == template(source).render([*TEXT, message, *TEXT])
