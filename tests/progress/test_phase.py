"""A phase as one line of text, which never takes more columns than there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sartor.progress.phase import Phase, columns, shorten

MODEL = "packing smollm2:135m"


def phase(
    name: str = MODEL, total: int | None = 200, unit: str = "tensors", **more: float
) -> Phase:
    return Phase(name, total, unit, more.get("seconds"), 0.0)


def at(found: Phase, done: int, when: float) -> Phase:
    found.done, found.advanced = done, when
    return found


@given(
    st.text(max_size=120),
    st.text(max_size=40),
    st.one_of(st.none(), st.integers(0, 10**13)),
    st.sampled_from(["bytes", "weights", "tokens", ""]),
    st.one_of(st.none(), st.floats(0.1, 1e5)),
    st.integers(-5, 10**13),
    st.floats(0, 1e6),
    st.integers(1, 250),
    st.booleans(),
)
def test_it_fits_any_width(
    name: str,
    part: str,
    total: int | None,
    unit: str,
    seconds: float | None,
    done: int,
    now: float,
    width: int,
    ascii_only: bool,
) -> None:
    found = Phase(name, total, unit, seconds, 0.0)
    found.part = part
    found.look(now / 2)
    at(found, done, now / 2).look(now)
    text = found.text(width, now, ascii_only=ascii_only)
    assert columns(text) <= width
    assert all(character.isprintable() for character in text)
    assert text.isascii() or not ascii_only


def test_what_a_wide_and_a_narrow_line_say() -> None:
    found = at(phase(), 50, 10.0)
    wide = f"{MODEL}  {'━' * 7}{'─' * 23}   25%   50/200 tensors  30 s left"
    assert found.text(200, 10.0) == found.text(120, 10.0) == wide
    narrow = found.text(60, 10.0)
    assert narrow == f"{MODEL}   25%   50/200 tensors  30 s left"
    assert found.text(40, 10.0) == f"{MODEL}   25%  30 s left"
    assert found.text(30, 10.0) == "packin…2:135m   25%  30 s left"


def test_bytes_have_a_speed_that_a_resumed_part_is_no_part_of() -> None:
    found = phase("model.gguf", 100_000_000, "bytes")
    at(found, 50_000_000, 0.1)  # what an earlier pull had left
    found.look(0.3)
    at(found, 60_000_000, 2.3).look(2.3)
    assert found.speed() == pytest.approx(5e6)
    assert found.left(2.3) == pytest.approx(8)
    text = found.text(100, 2.3)
    assert text.endswith("60%   60.0/100.0 MB    5.0 MB/s  8 s left")
    assert "MB/s" not in found.text(50, 2.3)


def test_a_transfer_that_starts_over_has_no_speed() -> None:
    found = phase("model.gguf", 100, "bytes")
    at(found, 50, 1.0).look(1.0)
    at(found, 0, 2.0).look(2.0)
    assert found.speed() is None
    assert found.left(2.0) is None


def test_the_time_that_is_left_counts_down_between_steps() -> None:
    found = at(phase(), 50, 10.0)
    assert [found.left(now) for now in (10.0, 15.0, 39.0, 41.0)] == [30.0, 25.0, 1.0, None]
    assert at(found, 200, 50.0).left(50.0) is None


def test_a_time_that_was_chosen_is_what_is_left() -> None:
    measuring = Phase("measuring cpu", None, "bytes", 2.0, 0.0)
    assert measuring.share(0.5) == 0.25
    assert measuring.text(80, 0.5).endswith(" 25%  2 s left")
    assert measuring.text(80, 3.0).endswith("100%")
    tuning = at(Phase("measuring kernels", 40, "layers", 10.0, 0.0), 30, 4.0)
    assert tuning.share(4.0) == 0.75
    assert tuning.left(4.0) == 6.0


def test_what_nobody_knows_shows_the_time_that_it_took() -> None:
    loading = Phase("loading m", None, "bytes", None, 0.0)
    assert loading.text(80, 0.5) == "loading m"
    assert loading.text(80, 75.0) == "loading m  1:15"
    assert at(phase(total=3), 0, 0.0).text(40, 3725.0) == "packing smollm2:135m    0%  1:02:05"


def test_the_bar_stands_still_while_parts_come_and_go() -> None:
    found = phase("conformance of cpu", 10, "cases")
    at(found, 3, 3.0)
    begins = []
    for found.part in ("pool", "grouped_linear/int8", "add", "pool"):
        begins.append(found.text(120, 3.0).index("━"))
    assert begins[0] < begins[1] == begins[2] == begins[3]


def test_names_lose_their_middle_and_what_would_move_the_cursor() -> None:
    assert shorten("a" * 30, 30) == "a" * 30
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("abcdefghij", 7, ascii_only=True) == "ab...ij"
    assert shorten("模型模型模型", 8) == "模型…型"
    assert columns("模a\u0301") == 3
    assert "\x1b" not in Phase("a\x1b[2Jb\n", 3, "x", None, 0.0).text(80, 0.0)


def test_large_counts_are_short() -> None:
    found = at(Phase("p", 135_000_000, "weights", None, 0.0), 61_000_000, 1.0)
    assert " 61.0/135.0M weights" in found.text(100, 1.0)
    assert "2500/193000 cases" in at(Phase("p", 193_000, "cases", None, 0.0), 2500, 1.0).text(99, 1)
    files = at(Phase("p", 4_000_000_000, "bytes", None, 0.0), 1_200_000_000, 1.0)
    assert " 1.2/4.0 GB" in files.text(99, 1.0)
