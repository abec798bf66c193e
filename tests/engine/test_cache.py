from __future__ import annotations

import pytest
from engine_helpers import byte_tokenizer, prompt, request

from sartor.engine.cache import StateCache
from sartor.engine.output import OutputStream
from sartor.engine.sequence import Sequence
from sartor.errors import CapacityError
from sartor.graph import StateGroup

BLOCK = 16


RECURRENT = -1
"""Stands for a recurrent group among windows."""


def make_cache(*windows: int, blocks: int | list[int] = 20, sequences: int = 4) -> StateCache:
    groups = [
        StateGroup(i, 2, (i,), "recurrent") if w == RECURRENT else StateGroup(i, w, (i,))
        for i, w in enumerate(windows)
    ]
    return StateCache(
        groups,
        [blocks] * len(windows) if isinstance(blocks, int) else blocks,
        block_size=BLOCK,
        max_sequences=sequences,
        max_context=512,
        prefix_cache=True,
    )


def sequence(ids: tuple[int, ...], root: str = "") -> Sequence:
    r = request("r", ids)
    return Sequence(r, OutputStream(r, 0, byte_tokenizer(), 512), 0, 512, root)


def compute(cache: StateCache, s: Sequence, *, chunk: int = 512) -> int:
    """Admits a sequence and computes all of it; the tokens that came from the cache."""
    prefix = cache.match(s)
    cache.admit(s, prefix)
    while s.computed < s.length:
        step = min(chunk, s.length - s.computed)
        cache.extend(s, s.computed + step)
        s.computed += step
        cache.commit(s, s.computed)
        cache.check([s])
    return prefix.tokens


def table(cache: StateCache, s: Sequence, group: int = 0) -> list[int]:
    row: list[int] = cache.tables[group][s.slot].tolist()
    return row


def test_whole_blocks_are_found_again_and_the_last_token_is_not() -> None:
    cache = make_cache(0)
    ids = prompt(1, 64)
    first = sequence(ids)
    assert compute(cache, first) == 0
    cache.release(first)
    assert compute(cache, sequence(ids)) == 48
    assert cache.match(sequence((*ids, 1))).tokens == 64
    assert cache.match(sequence((*ids[:20], 0, *ids[21:]))).tokens == 16
    assert cache.match(sequence(ids, root="another tenant")).tokens == 0


def test_live_sequences_share_blocks() -> None:
    cache = make_cache(0)
    ids = prompt(1, 64)
    one, two = sequence((*ids, 1)), sequence((*ids, 2))
    compute(cache, one)
    cache.admit(two, cache.match(two))
    assert table(cache, one)[:4] == table(cache, two)[:4]
    cache.check([one, two])
    assert cache.available() == (20 - 5,)
    cache.release(one)
    cache.check([two])
    cache.release(two)
    assert cache.available() == (20,)


def test_equal_blocks_computed_twice_become_one() -> None:
    cache = make_cache(0, 40)
    ids = prompt(1, 64)
    one, two = sequence(ids), sequence(ids)
    for s in (one, two):
        cache.admit(s, cache.match(s))
        cache.extend(s, 64)
    assert cache.available() == (12, 12)
    for s in (one, two):
        s.computed = 64
        cache.commit(s, s.computed)
    cache.check([one, two])
    assert table(cache, one) == table(cache, two)
    assert cache.available() == (16, 17)


def test_the_longest_unused_blocks_are_evicted_leaves_first() -> None:
    cache = make_cache(0, blocks=8)
    old, new = prompt(1, 65), prompt(2, 49)
    for ids in (old, new):
        s = sequence(ids)
        compute(cache, s)
        cache.release(s)
    cache.check([])
    assert cache.match(sequence(new)).tokens == 48
    s = sequence(prompt(3, 40))
    compute(cache, s)
    # Three blocks were needed and one was free: the old prompt lost its two deepest.
    assert cache.match(sequence(old)).tokens == 32
    assert cache.match(sequence(new)).tokens == 48


def test_blocks_that_slid_out_of_a_window_are_given_back() -> None:
    cache = make_cache(0, 20)
    s = sequence(prompt(1, 200))
    compute(cache, s, chunk=16)
    # Position 200 sees 181 to 199: blocks 11 and 12 of 13.
    assert [b >= 0 for b in table(cache, s, 1)[:13]] == [False] * 11 + [True] * 2
    assert cache.available() == (20 - 13, 20 - 2)
    assert cache.pools[1].cached == 11


def test_a_prefix_counts_only_where_its_window_is_there() -> None:
    cache = make_cache(0, 20, blocks=[20, 8])
    ids = prompt(1, 100)
    s = sequence(ids)
    compute(cache, s, chunk=16)
    cache.release(s)
    assert cache.match(sequence(ids[:65])).tokens == 64
    # What slid out first goes first: of blocks 0 to 5 the window group keeps 3 to 5.
    other = sequence(prompt(2, 80))
    cache.admit(other, cache.match(other))
    cache.extend(other, 80)
    cache.check([other])
    assert cache.match(sequence(ids)).tokens == 96
    assert cache.match(sequence(ids[:81])).tokens == 80
    assert cache.match(sequence(ids[:65])).tokens == 0


def test_a_prefix_without_its_full_blocks_is_forgotten() -> None:
    cache = make_cache(0, 20, blocks=14)
    ids = prompt(1, 100)
    s = sequence(ids)
    compute(cache, s, chunk=16)
    cache.release(s)
    other = sequence(prompt(2, 200))
    cache.admit(other, cache.match(other))
    for blocks, tokens in ((8, 96), (10, 64), (12, 32), (14, 0)):
        cache.extend(other, blocks * BLOCK)
        assert cache.match(sequence(ids)).tokens == tokens
        cache.check([other])


def test_a_window_only_model_shares_too() -> None:
    cache = make_cache(20)
    ids = prompt(1, 100)
    s = sequence(ids)
    compute(cache, s, chunk=16)
    cache.release(s)
    again = sequence(ids)
    assert compute(cache, again) == 96
    assert table(cache, again)[:4] == [-1] * 4


def test_a_recurrent_group_holds_blocks_only_where_steps_end() -> None:
    cache = make_cache(0, RECURRENT)
    s = sequence(prompt(1, 100))
    cache.admit(s, cache.match(s))
    for stop, before, after in (
        (70, [4], [4]),
        (74, [4], [4]),
        (96, [4, 5], [5]),
        (97, [5, 6], [6]),
    ):
        cache.extend(s, stop)
        cache.check([s])
        row = table(cache, s, 1)
        assert [i for i, block in enumerate(row) if block >= 0] == before
        s.computed = stop
        cache.commit(s, s.computed)
        cache.check([s])
        assert [i for i, block in enumerate(table(cache, s, 1)) if block >= 0] == after
    # Only the step that ended with its run left a snapshot.
    assert cache.pools[1].cached == 1
    assert cache.available() == (20 - 7, 20 - 1)


def test_a_recurrent_prefix_needs_its_last_state_alone() -> None:
    cache = make_cache(0, RECURRENT, 40)
    ids = prompt(1, 200)
    s = sequence(ids)
    compute(cache, s, chunk=64)
    cache.release(s)
    assert cache.match(sequence(ids)).tokens == 192
    assert cache.match(sequence(ids[:192])).tokens == 128
    assert cache.match(sequence(ids[:64])).tokens == 0
    again = sequence(ids[:190])
    prefix = cache.match(again)
    assert prefix.cost == (8, 1, 3)
    cache.admit(again, prefix)
    cache.check([again])
    assert [i for i, block in enumerate(table(cache, again, 1)) if block >= 0] == [7]
    cache.extend(again, 190)
    assert table(cache, again, 1)[7] != table(cache, again, 1)[11]
    again.computed = 190
    cache.commit(again, again.computed)
    cache.check([again])


def test_a_recurrent_model_without_attention_shares_too() -> None:
    cache = make_cache(RECURRENT, blocks=3)
    ids = prompt(1, 100)
    s = sequence(ids)
    compute(cache, s, chunk=32)
    cache.release(s)
    # The tree keeps nodes without blocks as the way to those that have one.
    assert cache.match(sequence(ids)).tokens == 96
    other = sequence(prompt(2, 200))
    compute(cache, other, chunk=48)
    cache.check([other])
    assert cache.match(sequence(ids)).tokens == 0


def test_equal_snapshots_become_one() -> None:
    cache = make_cache(0, RECURRENT)
    ids = prompt(1, 64)
    one, two = sequence(ids), sequence(ids)
    for s in (one, two):
        cache.admit(s, cache.match(s))
        cache.extend(s, 64)
    for s in (one, two):
        s.computed = 64
        cache.commit(s, s.computed)
    cache.check([one, two])
    assert table(cache, one, 1) == table(cache, two, 1)
    assert cache.available() == (16, 19)
    # Going on writes elsewhere.
    for s in (one, two):
        cache.extend(s, 65)
    assert table(cache, one, 1)[4] != table(cache, two, 1)[4]
    cache.check([one, two])


def test_running_out_leaves_the_books_in_order() -> None:
    cache = make_cache(0, 20, blocks=3)
    s = sequence(prompt(1, 100))
    cache.admit(s, cache.match(s))
    with pytest.raises(CapacityError, match="state_bytes"):
        cache.extend(s, 100)
    cache.check([s])
    cache.release(s)
    cache.check([])
    assert cache.available() == (3, 3)


def test_the_check_notices_mistakes() -> None:
    cache = make_cache(0)
    s = sequence(prompt(1, 40))
    compute(cache, s)
    cache.tables[0][s.slot, 1] = cache.tables[0][s.slot, 0]
    with pytest.raises(AssertionError):
        cache.check([s])
