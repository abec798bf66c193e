from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from engine_helpers import (
    EOS,
    VOCAB,
    Engine,
    byte_tokenizer,
    make_engine,
    prompt,
    request,
    run,
    text,
    tokens,
)

from sartor.backends.null.backend import NullExecutable
from sartor.errors import CapacityError, SartorError, UsageError
from sartor.graph import Batch, Builder, Ragged, StepOutput
from sartor.ops import RopeSpec


def script(engine: Engine, answer: list[int]) -> None:
    """Lets the model of an engine say ``answer``, whatever it is asked; the prompt has 4 tokens."""
    executable = engine.executable
    real = executable.collect

    def collect(handle: int) -> StepOutput:
        output = real(handle)
        positions = positions_of.pop(handle)
        drawn = np.array([answer[p - 4] for p in positions], np.int32)
        return StepOutput(drawn, output.logprobs, output.top_tokens, output.top_logprobs)

    positions_of: dict[int, list[int]] = {}
    submit = executable.submit

    def remember(batch: Batch) -> int:
        handle = submit(batch)
        positions_of[handle] = batch.sampling["position"].tolist()
        return handle

    executable.collect, executable.submit = collect, remember  # type: ignore[method-assign]


def say(answer: bytes | list[int], **params: object) -> list:
    engine = make_engine()
    script(engine, [*answer, EOS, *b"after the end"])
    r = request("r", tuple(b"ask:"), **{"ignore_eos": False, "max_tokens": 20, **params})  # type: ignore[arg-type]
    return run(engine, r)["r", 0]


# Ends and text ------------------------------------------------------------------------


def test_end_of_text_ends_and_is_no_text() -> None:
    chunks = say(b"Hello")
    assert text(chunks) == "Hello"
    assert tokens(chunks) == [*b"Hello", EOS]
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].completion_tokens == 6
    assert chunks[-1].prompt_tokens == 4


def test_end_of_text_can_be_ignored() -> None:
    chunks = say(b"Hello", ignore_eos=True, max_tokens=8)
    assert text(chunks) == "Helloaf"
    assert chunks[-1].finish_reason == "length"


def test_stop_token_ids_end_too() -> None:
    chunks = say(b"Hello", stop_token_ids=(ord("l"),), ignore_eos=True)
    assert (text(chunks), chunks[-1].finish_reason) == ("He", "stop")


def test_max_tokens() -> None:
    chunks = say(b"Hello", max_tokens=3)
    assert (text(chunks), chunks[-1].finish_reason) == ("Hel", "length")
    assert [c.completion_tokens for c in chunks] == [1, 2, 3]


def test_a_stop_string_is_cut_off_and_what_might_be_one_is_withheld() -> None:
    chunks = say(b"a END b ENDING", stop=("ENDI", "xyz"))
    assert text(chunks) == "a END b "
    assert chunks[-1].finish_reason == "stop"
    assert tokens(chunks) == list(b"a END b ENDI")
    assert [c.text for c in chunks][:6] == ["a", " ", "", "", "", "END "]


def test_withheld_text_comes_at_the_end() -> None:
    assert text(say(b"maybe EN", stop=("END",))) == "maybe EN"
    assert text(say(b"maybe EN", stop=("END",), max_tokens=8)) == "maybe EN"


def test_no_half_characters() -> None:
    word = "né 你好"
    chunks = say(list(word.encode()))
    assert text(chunks) == word
    assert [c.text for c in chunks if c.text] == list(word)


def test_a_character_that_stays_half_is_marked() -> None:
    assert text(say("né".encode(), max_tokens=2)) == "n\N{REPLACEMENT CHARACTER}"


def test_text_can_be_left_out() -> None:
    engine = make_engine()
    script(engine, [*b"Hello END"])
    answer = run(
        engine, request("r", tuple(b"ask:"), want_text=False, stop=("END",), max_tokens=20)
    )
    assert text(answer["r", 0]) == ""
    assert tokens(answer["r", 0]) == list(b"Hello END")
    assert answer["r", 0][-1].finish_reason == "stop"


def test_the_context_ends_an_answer() -> None:
    engine = make_engine(context=64)
    answer = run(engine, request("r", prompt(1, 50), max_tokens=None))
    assert answer["r", 0][-1].finish_reason == "length"
    assert len(tokens(answer["r", 0])) == 14


def test_logprobs_name_every_token() -> None:
    chunks = say(b"Hi", logprobs=3)
    assert [len(c.logprobs) for c in chunks] == [1, 1, 1]
    entry = chunks[0].logprobs[0]
    assert (entry.token, entry.text, entry.bytes) == (ord("H"), "H", b"H")
    assert len(entry.top) == 3
    assert entry.logprob == entry.top[0].logprob > entry.top[1].logprob
    assert [c.logprobs for c in say(b"Hi")] == [(), (), ()]
    assert say(b"Hi", logprobs=0)[0].logprobs[0].top == ()


# Refusals -----------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_names_both_numbers() -> None:
    engine = make_engine(context=64)
    with pytest.raises(CapacityError, match=r"64 tokens.*can have 64"):
        engine.add(request("r", prompt(1, 64)))
    run(engine, request("r", prompt(1, 63)))


def test_the_state_bounds_the_context() -> None:
    engine = make_engine(context=4096, blocks=4)
    assert engine.context_length == 64
    answer = run(engine, request("r", prompt(1, 40), max_tokens=None))
    assert len(tokens(answer["r", 0])) == 24


def test_too_few_blocks_for_a_window() -> None:
    with pytest.raises(CapacityError, match="at least 7"):
        make_engine(windows=(0, 70), blocks=6)


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ((), {}, "no tokens"),
        ((1, VOCAB), {}, "prompt has token id 256"),
        ((-1,), {}, "prompt has token id -1"),
        ((1,), {"logit_bias": {300: 1.0}}, "logit_bias has token id 300"),
        ((1,), {"emitted": [[256]]}, "emitted has token id 256"),
        ((1,), {"n": 2, "emitted": [[1]]}, "emitted has 1 lists for 2"),
    ],
)
def test_impossible_requests_are_refused(
    ids: tuple[int, ...], params: dict[str, object], message: str
) -> None:
    engine = make_engine()
    with pytest.raises(UsageError, match=message):
        engine.add(request("r", ids, **params))  # type: ignore[arg-type]
    assert not engine.has_work


def test_ids_are_unique_while_in_use() -> None:
    engine = make_engine()
    engine.add(request("r", (1,)))
    with pytest.raises(UsageError, match="in use"):
        engine.add(request("r", (1,)))
    run(engine)
    run(engine, request("r", (1,)))


# Abort, failure, reset ----------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("windows", [(0,), (0, 40)])
def test_abort_in_any_state_frees_everything(steps: int, windows: tuple[int, ...]) -> None:
    engine = make_engine(windows=windows, max_batch_tokens=32, max_sequences=4)
    for i in range(3):
        engine.add(request(f"r{i}", prompt(i, 60), n=2))
    for _ in range(steps):
        engine.step()
    for i in range(3):
        engine.abort(f"r{i}")
        engine.check()
    assert not any(engine.blocks_held())
    chunks = engine.step()
    assert [(c.request_id, c.choice, c.finish_reason) for c in chunks] == [
        (f"r{i}", c, "abort") for i in range(3) for c in range(2)
    ]
    assert not engine.has_work
    engine.abort("r0")
    assert engine.step() == []


def test_others_go_on_when_one_is_aborted() -> None:
    engine, ids = make_engine(), prompt(1, 40)
    expected = tokens(run(make_engine(), request("a", ids))["a", 0])
    engine.add(request("b", ids))
    engine.add(request("a", ids))
    for _ in range(3):
        engine.step()
    engine.abort("b")
    chunks = run(engine)["a", 0]
    assert tokens(chunks) == expected[-len(tokens(chunks)) :]


def failing(engine: Engine, error: BaseException, part: str = "submit") -> Callable[[], None]:
    """Makes the next step raise; call the result to mend it."""
    real = getattr(engine.executable, part)

    def fail(argument: object) -> int:
        raise error

    setattr(engine.executable, part, fail)
    return lambda: setattr(engine.executable, part, real)


@pytest.mark.parametrize("part", ["submit", "collect"])
def test_a_failed_step_answers_its_requests_and_the_engine_lives_on(part: str) -> None:
    engine = make_engine(max_sequences=3)
    for name in "ab":
        engine.add(request(name, prompt(1, 20), n=2))
    engine.step()
    mend = failing(engine, RuntimeError("broken chip"), part)
    chunks = engine.step()
    mend()
    engine.check()
    ended = {(c.request_id, c.choice): c for c in chunks}
    # Both choices of a, which is in the batch, and both of b, of which one is.
    assert ended.keys() == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert {c.finish_reason for c in chunks} == {"error"}
    assert chunks[0].error == "RuntimeError: broken chip"
    assert not any(engine.blocks_held())
    assert len(tokens(run(engine, request("c", prompt(1, 20)))["c", 0])) == 12


def test_an_error_of_ours_keeps_its_message() -> None:
    engine = make_engine()
    failing(engine, SartorError("out of memory; free some"))
    assert run(engine, request("r", (1,)))["r", 0][0].error == "out of memory; free some"


def test_a_failure_while_making_text_is_answered_too() -> None:
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)
    engine.add(request("r", prompt(1, 20)))
    tokenizer.piece = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    assert engine.step()[-1].finish_reason == "error"
    engine.check()
    assert not engine.has_work


def test_reset_answers_everyone_and_starts_anew() -> None:
    engine = make_engine(max_sequences=2)
    for name in "abc":
        engine.add(request(name, prompt(1, 20)))
    mend = failing(engine, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    mend()
    engine.reset()
    engine.check()
    assert [(c.request_id, c.finish_reason) for c in engine.step()] == [
        (name, "abort") for name in "abc"
    ]
    run(engine, request("a", prompt(1, 20)))


# Sharing and order --------------------------------------------------------------------


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    engine, ids = make_engine(max_batch_tokens=32), prompt(1, 100)
    requests = [request(f"r{i}", (*ids, i)) for i in range(8)]
    answers = run(engine, *requests)
    # Of 12 tokens a request the last is not computed. What is cut to one token counts as decoded.
    computed = sum(r.prompt_tokens + r.decode_tokens for r in engine.records)
    assert computed == 101 + 7 * 5 + 8 * 11
    assert [answers[f"r{i}", 0][-1].cached_tokens for i in range(8)] == [0] + [96] * 7


def test_tenants_do_not_share() -> None:
    engine, ids = make_engine(), prompt(1, 100)
    run(engine, request("a", ids, salt="one"))
    other = run(engine, request("b", ids, salt="two"))
    assert other["b", 0][-1].cached_tokens == 0
    same = run(engine, request("c", ids, salt="one"))
    assert same["c", 0][-1].cached_tokens == 96


def test_a_rope_that_depends_on_length_separates_prefixes() -> None:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embedding", VOCAB, 16)
    rope = RopeSpec(16, kind="dynamic", factor=2.0, original_context=64)
    q = builder.rope(x, rope, 16, "rope")
    x = builder.attention(q, q, x, heads=1, kv_heads=1, head_dim=16, scale=1.0)
    x = builder.gather_rows(x, builder.output_rows)
    program = builder.finish(builder.linear(x, "head", VOCAB))
    engine, ids = make_engine(program=program), prompt(1, 100)
    first = run(engine, request("a", ids))
    assert run(engine, request("b", ids))["b", 0][-1].cached_tokens == 96
    longer = run(engine, request("c", ids, max_tokens=13))
    assert longer["c", 0][-1].cached_tokens == 0
    assert tokens(longer["c", 0])[:12] != tokens(first["a", 0])


def test_priority_goes_first_and_takes_the_place_of_others() -> None:
    engine = make_engine(max_sequences=2)
    for i in range(4):
        engine.add(request(f"low{i}", prompt(i, 20)))
    engine.step()
    engine.add(request("high", prompt(9, 20), priority=1, max_tokens=2))
    ended = [c.request_id for _ in range(100) for c in engine.step() if c.finish_reason]
    assert ended == ["high", "low0", "low1", "low2", "low3"]


def test_more_requests_than_places_all_end() -> None:
    engine = make_engine(max_sequences=4, max_batch_tokens=16, blocks=20)
    answers = run(engine, *(request(f"r{i}", prompt(i, 1 + i)) for i in range(60)))
    assert len(answers) == 60
    assert all(c[-1].finish_reason == "length" for c in answers.values())


def test_one_place_per_token_of_a_step() -> None:
    engine = make_engine(max_sequences=64, max_batch_tokens=3)
    run(engine, *(request(f"r{i}", prompt(i, 9)) for i in range(8)))
    assert max(r.sequences for r in engine.records) == 3


def test_blocks_of_a_window_are_given_back_while_it_runs() -> None:
    engine = make_engine(windows=(0, 40), blocks=[32, 8], max_batch_tokens=16)
    engine.add(request("r", prompt(1, 300)))
    held = []
    while engine.has_work:
        engine.step()
        engine.check()
        held.append(engine.blocks_held()[1])
    assert max(held) <= 5
    assert engine.records[-1].blocks_cached[1] > 0


# Replay and records -------------------------------------------------------------------


def test_a_replay_of_an_ended_answer_ends_at_once() -> None:
    engine = make_engine()
    whole = run(engine, request("r", prompt(1, 20)))
    chunks = run(engine, request("r", prompt(1, 20), emitted=[tokens(whole["r", 0])]))["r", 0]
    assert [(c.tokens, c.text, c.finish_reason) for c in chunks] == [((), "", "length")]
    assert chunks[0].completion_tokens == 12


def test_a_replay_inside_of_a_possible_stop_string() -> None:
    engine = make_engine()
    script(engine, [*b"ab ENDx", EOS])
    params = {"stop": ("END!",), "ignore_eos": False, "emitted": [list(b"ab EN")]}
    chunks = run(engine, request("r", tuple(b"ask:"), **params))["r", 0]  # type: ignore[arg-type]
    assert text(chunks) == "ENDx"


def test_steps_leave_records() -> None:
    engine = make_engine(clock=time.perf_counter)
    run(engine, request("a", prompt(1, 20)), request("b", prompt(2, 30)))
    first, last = engine.records[0], engine.records[-1]
    assert (first.prompt_tokens, first.decode_tokens, first.output_tokens) == (50, 0, 2)
    assert (last.prompt_tokens, last.decode_tokens, last.sequences) == (0, 2, 2)
    assert [r.index for r in engine.records] == list(range(12))
    assert first.blocks_held == (4,)
    assert last.blocks_total == (64,)
    assert min(first.schedule_seconds, first.build_seconds, first.execute_seconds) > 0
    assert first.host_seconds < 0.1


def test_a_batch_is_sound_and_carries_what_the_request_says() -> None:
    engine = make_engine(max_batch_tokens=64)
    executable = engine.executable
    assert isinstance(executable, NullExecutable)
    batches: list[tuple[Batch, Ragged]] = []
    submit = executable.submit

    def spy(batch: Batch) -> int:
        batch.validate()
        history = Ragged(batch.history.values.copy(), batch.history.starts.copy())
        batches.append((batch, history))
        return submit(batch)

    executable.submit = spy  # type: ignore[method-assign]
    engine.add(request("a", prompt(1, 20), temperature=0.5, top_k=3, seed=11, max_tokens=2))
    biased = request(
        "b", prompt(2, 30), presence_penalty=1.0, logit_bias={5: 2.0}, n=1, max_tokens=2
    )
    engine.add(biased)
    engine.step()
    batch, history = batches[-1]
    assert batch.sampling["seed"].tolist() == [11, 7]
    assert batch.sampling["top_k"].tolist() == [3, 0]
    assert batch.sampling["position"].tolist() == [20, 30]
    assert batch.sampling["prompt_length"].tolist() == [20, 30]
    assert batch.rope_lengths.tolist() == [22, 32]
    assert history.values.tolist() == list(biased.prompt)
    assert history.starts.tolist() == [0, 0, 30]
    assert batch.bias_tokens.values.tolist() == [5]
    assert batch.bias_values.values.tolist() == [2.0]


def test_the_first_chunk_says_what_its_prefill_took() -> None:
    engine = make_engine(device="null-20ms", max_batch_tokens=32, max_sequences=1)
    begin = time.perf_counter()
    chunks = run(engine, request("long", prompt(0, 80), max_tokens=3, n=2))
    took = time.perf_counter() - begin
    firsts = []
    for choice in range(2):
        first, *others = chunks["long", choice]
        assert [chunk.prefill_seconds for chunk in others] == [0, 0]
        firsts.append(first.prefill_seconds)
    # 80 tokens in chunks of 32; the other choice waits, which is no part of its prefill, and
    # finds most of the prompt in the cache.
    assert firsts[0] >= 3 * 0.02
    assert firsts[1] >= 0.02
    assert sum(firsts) <= took - 4 * 0.02
