from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from traffic import Lengths, Prompts, Traffic, arrivals, plan_calls

from sartor.errors import UsageError

SEED = [3, 1]


def traffic(**fields: object) -> Traffic:
    usual = {"requests": 400, "input": Lengths.parse("40"), "output": Lengths.parse("8")}
    return Traffic(**{**usual, "streams": 4, **fields})  # type: ignore[arg-type]


def test_lengths_have_their_distribution() -> None:
    rng = np.random.default_rng(0)
    assert {Lengths.parse("7").draw(rng) for _ in range(20)} == {7}
    uniform = [Lengths.parse("3-5").draw(rng) for _ in range(300)]
    assert set(uniform) == {3, 4, 5}
    logs = np.log([Lengths.parse("lognormal:100,0.5").draw(rng) for _ in range(4000)])
    assert np.median(logs) == pytest.approx(np.log(100), abs=0.05)
    assert logs.std() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("text", ["0", "x", "5-", "9-3", "lognormal:5", "lognormal:-1,1", "-4"])
def test_lengths_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Lengths.parse(text)


@pytest.mark.parametrize("text", ["12", "3-5", "lognormal:100,0.5"])
def test_lengths_are_shown_as_they_are_written(text: str) -> None:
    assert str(Lengths.parse(text)) == text


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(20, 5000, np.random.default_rng(1))
    gaps = np.diff(times)
    assert np.all(gaps >= 0)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    # As many more in crowded seconds than in others: the variance of the counts is their mean.
    counts = np.bincount(np.floor(times).astype(int))[:-1]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.35)


def test_one_way_of_arriving() -> None:
    with pytest.raises(UsageError, match="one of"):
        traffic(rate=1.0)
    with pytest.raises(UsageError, match="one of"):
        traffic(streams=0)
    with pytest.raises(UsageError, match="--leave"):
        traffic(leave=1.5)


def test_the_same_seed_gives_the_same_calls_and_another_one_others() -> None:
    prompts = Prompts.common()
    calls = plan_calls(traffic(), prompts, SEED)
    assert plan_calls(traffic(), prompts, SEED) == calls
    assert (
        len(
            {call.prompt for call in calls}
            | {c.prompt for c in plan_calls(traffic(), prompts, [3, 2])}
        )
        == 800
    )
    assert all(call.at is None and call.input_tokens == 40 for call in calls)
    assert all(len(str(call.prompt).split()) == 40 for call in calls)


def test_calls_have_their_times() -> None:
    prompts = Prompts.common()
    burst = plan_calls(traffic(streams=0, burst=400), prompts, SEED)
    assert {call.at for call in burst} == {0.0}
    times = [call.at for call in plan_calls(traffic(streams=0, rate=50.0), prompts, SEED)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(8, rel=0.3)


def test_prefixes_are_shared_and_clients_leave_as_often_as_asked() -> None:
    wanted = traffic(share=0.5, groups=3, prefix=20, leave=0.25, leave_after=2)
    prompts = Prompts.common()

    def heads(seed: list[int]) -> list[str]:
        calls = plan_calls(wanted, prompts, seed)
        return [" ".join(str(call.prompt).split()[:20]) for call in calls]

    found = heads(SEED)
    shared = {head: found.count(head) for head in found if found.count(head) > 1}
    assert len(shared) == 3
    assert sum(shared.values()) == pytest.approx(200, abs=40)
    assert shared.keys() <= set(heads([3, 2])), "another round has other prefixes"
    calls = plan_calls(wanted, prompts, SEED)
    assert {call.leave_after for call in calls} == {None, 2}
    assert sum(call.leave_after == 2 for call in calls) == pytest.approx(100, abs=35)


def test_a_text_is_corrected_until_its_length_is_right() -> None:
    def encode(text: str) -> range:
        """Five tokens around; the first word and every word with an "e" in it is two."""
        words = text.split()
        return range(5 + len(words) + bool(words) + sum("e" in word for word in words))

    prompts = Prompts(["egg", "ham", "jam", "tea"], (), encode)
    for seed in range(50):
        for tokens in (8, 30, 100):
            try:
                text = prompts.text(tokens, [], np.random.default_rng(seed))
            except UsageError:  # a word of two tokens may never fit into one place
                continue
            assert len(encode(text)) == tokens
    with pytest.raises(UsageError, match="no prompt of 6 tokens"):
        prompts.text(6, [0, 1, 2], np.random.default_rng(0))


def test_without_a_tokenizer_there_are_no_ids() -> None:
    with pytest.raises(UsageError, match="--tokenizer"):
        plan_calls(traffic(), Prompts.common(), SEED, as_ids=True)


def test_a_tokenizer_makes_lengths_exact(model_files: dict[str, Path]) -> None:
    from sartor.engine.load import load_text
    from sartor.formats import open_checkpoint

    real_model = model_files["smollm2-135m"]
    checkpoint = open_checkpoint(real_model)
    tokenizer, template = load_text(checkpoint)
    checkpoint.close()
    assert template is not None
    wanted = traffic(requests=20, input=Lengths.parse("50-300"), share=0.5, prefix=12)
    for call in plan_calls(wanted, Prompts.of_model(real_model, "completions"), SEED):
        assert len(tokenizer.encode(str(call.prompt))) == call.input_tokens
    for call in plan_calls(wanted, Prompts.of_model(real_model, "chat"), SEED):
        chat = template.render([{"role": "user", "content": call.prompt}])
        assert len(tokenizer.encode(chat, add_special=False)) == call.input_tokens
    for call in plan_calls(wanted, Prompts.of_model(real_model, "completions"), SEED, as_ids=True):
        assert len(call.prompt) == call.input_tokens
