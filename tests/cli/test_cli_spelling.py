"""Errors name parameters as whoever wrote them: options, keywords, names in JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from sartor import LLM, SamplingParams
from sartor.cli.main import guarded
from sartor.cli.spelling import spelling
from sartor.errors import CapacityError, SartorError, UsageError

Capture = pytest.CaptureFixture[str]
LIMIT = 2048
"""Of the model in conftest.py."""


def error_of(capsys: Capture, *arguments: object) -> str:
    assert guarded([str(argument) for argument in arguments]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("command", ["run", "bench", "eval", "serve"])
@pytest.mark.parametrize("context", [LIMIT + 1, 99_999_999])
def test_a_context_above_the_models_own(
    capsys: Capture, tiny: Path, command: str, context: int
) -> None:
    prompt = ("hello",) if command == "run" else ()
    error = error_of(capsys, command, tiny, *prompt, "--context", context)
    name = tiny.name if command == "serve" else tiny  # as clients know it
    assert f"error: --context is {context}, but {name} has a limit of its own of 2048" in error
    assert "max_context" not in error


def test_the_same_in_python(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"max_context is 2049, but .* of 2048 tokens"):
        LLM(tiny, max_context=LIMIT + 1)
    with LLM(tiny, max_context=LIMIT) as llm:
        assert llm.context_length == LIMIT


@pytest.mark.parametrize("context", [2, 20, 31, 33, 100])
def test_a_context_of_a_few_tokens_works(capsys: Capture, tiny: Path, context: int) -> None:
    with LLM(tiny, max_context=context, max_sequences=1) as llm:
        assert llm.context_length == context
        output = llm.generate([[5]], SamplingParams(temperature=0, ignore_eos=True))[0]
        assert len(output.tokens) == context - 1
    error = error_of(capsys, "run", tiny, "--raw", "x" * context, "--context", context)
    assert f"can have {context}; shorten the prompt, or start with a --context of up to" in error


def test_one_of_several_models_may_have_a_shorter_context(
    capsys: Capture, tiny: Path, tmp_path: Path
) -> None:
    from sartor.plan import ExecutionPlan
    from sartor.serving.frontend import open_served_model
    from sartor.serving.server import _check_context

    short = write_tiny_model(tmp_path / "short.gguf", context=200)
    plan = ExecutionPlan(max_context=1000)
    served = [open_served_model(path.stem, path, plan) for path in (tiny, short)]
    assert [model.context_length for model in served] == [1000, 200]
    assert [model.spec.plan.max_context for model in served] == [1000, 0]
    _check_context(1000, served)
    assert "short has a limit of its own of 200 tokens" in capsys.readouterr().err
    with pytest.raises(UsageError, match="short has a limit of its own of 200"):
        _check_context(1000, served[1:])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--context", "-5"), "--context is -5"),
        (("--threads", "-1"), "--threads is -1"),
        (("--kv", "q4"), "--kv is 'q4'"),
        (("--activation", "int3"), "--activation is 'int3'"),
        (("--isa", "mmx"), "--isa is 'mmx'"),
        (("--head-bits", "9"), "--head-bits is 9"),
        (("--temperature", "-1"), "--temperature is -1.0"),
        (("--top-p", "2"), "--top-p is 2.0"),
        (("--top-k", "-1"), "--top-k is -1"),
        (("--min-p", "3"), "--min-p is 3.0"),
        (("--repetition-penalty", "0"), "--repetition-penalty is 0.0"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--seed", str(2**70)), "--seed is "),
        (("--stop", ""), "--stop: "),
    ],
)
def test_options_of_run(capsys: Capture, tiny: Path, options: tuple[str, ...], says: str) -> None:
    error = error_of(capsys, "run", tiny, "hello", *options)
    assert error.startswith(f"error: {says}")
    assert "plan" not in error


def test_other_commands(capsys: Capture, tiny: Path) -> None:
    assert "--repeats is 0" in error_of(capsys, "bench", tiny, "--repeats", 0)
    assert "raise --context" in error_of(capsys, "bench", tiny, "--context", 20)
    assert "lower --positions" in error_of(capsys, "eval", tiny, "--context", 20)
    assert "'--max-sequences': 0 is not" in error_of(capsys, "serve", tiny, "--max-sequences", 0)


def test_every_option_that_errors_name_is_there() -> None:
    from typer.main import get_command

    from sartor.cli.app import _app

    for command in ("run", "serve", "bench", "eval"):
        parameters = get_command(_app(command)).commands[command].params  # type: ignore[attr-defined]
        options = {option for parameter in parameters for option in parameter.opts}
        assert set(spelling(command).values()) <= options


def test_fields_and_advice() -> None:
    error = UsageError("plan: max_context is 3, not max_contexts", fields=("max_context",))
    assert str(error) == "plan: max_context is 3, not max_contexts"
    assert error.spelled({}) == str(error)
    assert error.spelled({"max_context": "--context"}) == "--context is 3, not max_contexts"
    fields = ("state_bytes", "max_sequences", "max_context")
    full = CapacityError("no memory", advice=("lower {}", fields))
    assert str(full) == "no memory; lower state_bytes, max_sequences or max_context"
    assert full.spelled({"max_context": "--context"}) == "no memory; lower --context"
    assert full.spelled({"threads": "--threads"}).startswith("no memory; free some memory")


def test_errors_go_through_pickle() -> None:
    import pickle

    error = CapacityError("no memory", fields=("kv",), advice=("lower {}", ("max_context",)))
    again: SartorError = pickle.loads(pickle.dumps(error))
    assert (str(again), again.fields, again.advice) == (str(error), error.fields, error.advice)
