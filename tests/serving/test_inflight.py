from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sartor.engine.request import Chunk, FinishReason, Request
from sartor.graph import SamplingParams
from sartor.serving.inflight import InFlight, Ledger
from sartor.serving.lifecycle import KILLS_FORGIVEN


def entry(name: str, n: int = 1) -> InFlight:
    return InFlight("m", Request(name, (1,), SamplingParams(n=n), seed=1))


def chunk(choice: int, *tokens: int, end: FinishReason | None = None) -> Chunk:
    return Chunk("a", choice, "x", tokens, (), end, None, 1, len(tokens), 0)


def names(entries: list[InFlight]) -> str:
    return "".join(e.request.id for e in entries)


def ledger(which: str) -> Ledger:
    book = Ledger()
    for name in which:
        book.add(entry(name))
    return book


def test_what_was_emitted_is_replayed() -> None:
    one = entry("a", n=2)
    assert one.replay() is one.request
    assert one.record(chunk(0, 5, 6))
    assert one.record(chunk(1, 7, end="stop"))
    assert not one.record(chunk(1, 8)), "a finished choice takes nothing more"
    assert one.replay().emitted == ((5, 6), (7,))
    assert not one.done
    assert one.record(chunk(0, end="length"))
    assert one.done


def test_all_that_wait_go_out_in_order() -> None:
    book = ledger("abc")
    assert names(book.take()) == "abc"
    assert book.take() == []
    book.add(entry("d"))
    assert names(book.take()) == "d"


def test_first_crash_replays_together_before_the_others() -> None:
    book = ledger("ab")
    book.take()
    book.add(entry("c"))
    assert book.crash() == []
    assert names(book.take()) == "abc"


def test_second_crash_replays_one_at_a_time() -> None:
    book = ledger("ab")
    book.take()
    book.crash()
    book.take()
    assert book.crash() == []
    book.add(entry("c"))
    assert names(book.take()) == "a"
    assert book.take() == []
    book.remove("a")
    assert names(book.take()) == "b"
    book.remove("b")
    assert names(book.take()) == "c"


def test_only_the_guilty_is_given_up() -> None:
    book = ledger("ab")
    for _ in range(2):
        book.take()
        assert book.crash() == []
    assert names(book.take()) == "a"
    assert book.crash() == [], "alone once: not proven yet"
    assert names(book.take()) == "a"
    assert names(book.crash()) == "a"
    assert names(book.take()) == "b"


def test_a_lone_request_is_given_up_at_its_second_crash() -> None:
    book = ledger("a")
    book.take()
    assert book.crash() == []
    book.take()
    assert names(book.crash()) == "a"
    assert len(book) == 0


def test_a_suspect_waits_for_those_that_run() -> None:
    book = ledger("a")
    suspect = entry("s")
    suspect.crashes = 2
    book.take()
    book.add(suspect)
    book.add(entry("b"))
    assert book.take() == []
    book.remove("a")
    assert names(book.take()) == "s"


def test_kills_from_outside_are_no_crashes() -> None:
    book = ledger("a")
    for _ in range(KILLS_FORGIVEN):
        book.take()
        assert book.crash(outside=True) == []
    book.add(entry("b"))
    assert names(book.take()) == "ab", "nobody is a suspect"


def test_a_token_makes_kills_forgotten() -> None:
    book = ledger("a")
    for _ in range(5 * KILLS_FORGIVEN):
        (one,) = book.take()
        one.record(chunk(0, 7))
        assert book.crash(outside=True) == []
    assert not one.suspect


def test_endless_kills_without_a_token_count_in_the_end() -> None:
    book = ledger("ab")
    for _ in range(KILLS_FORGIVEN + 2):
        assert names(book.take()) == "ab"
        assert book.crash(outside=True) == []
    for _ in range(2):
        assert names(book.take()) == "a"
        given_up = book.crash(outside=True)
    assert names(given_up) == "a"


def test_a_cause_that_was_found_clears_the_others() -> None:
    book = ledger("abp")
    for _ in range(2):
        for one in book.take():
            if one.request.id != "p":
                one.record(chunk(0, 1))
        book.crash()
    for _ in range(2):
        assert names(book.take()) == "p", "the one that gets nowhere is tried first"
        given_up = book.crash()
    assert names(given_up) == "p"
    assert names(book.take()) == "ab"


def test_what_one_did_alone_is_not_forgotten() -> None:
    book = ledger("ab")
    for _ in range(2):
        book.take()
        book.crash()
    assert names(book.take()) == "a"
    assert book.crash() == []
    book.absolve()
    assert names(book.take()) == "ab"
    assert book.crash() == []
    assert names(book.take()) == "a"
    assert names(book.crash()) == "a"


@given(st.integers(1, 8), st.data())
def test_one_poison_among_many_is_found_and_all_others_finish(
    count: int, data: st.DataObject
) -> None:
    book, finished, poison = Ledger(), set(), data.draw(st.integers(0, count - 1))
    for i in range(count):
        book.add(entry(str(i)))
    running: list[InFlight] = []
    given_up: list[InFlight] = []
    for _ in range(20 * count):
        running += book.take()
        if any(e.request.id == str(poison) for e in running) and data.draw(st.booleans()):
            given_up += book.crash()
            running = []
        elif innocent := [e for e in running if e.request.id != str(poison)]:
            book.remove(innocent[0].request.id)
            finished.add(innocent[0].request.id)
            running.remove(innocent[0])
        elif running:
            given_up += book.crash()
            running = []
        if not len(book):
            break
    assert names(given_up) == str(poison)
    assert finished == {str(i) for i in range(count)} - {str(poison)}
