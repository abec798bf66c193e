"""A phase as one line of text: its name, a bar, counts and the time that is left.

Nothing here touches a terminal: ``line.py`` does.
"""

from __future__ import annotations

from collections import deque

BAR = 30  # columns at most
_LEAST_BAR = 8
_LEAST_NAME = 32
_WINDOW = 60  # looks at the bytes; a speed is taken from the first to the last of them
_GAP = "  "


class Phase:
    """What :meth:`Progress.begin` was told, and how far it is; times are seconds of one clock.

    ``advanced`` is when it was told so last. No dataclass: making one is the most that
    this module would cost a start.
    """

    def __init__(
        self, name: str, total: int | None, unit: str, seconds: float | None, started: float
    ) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.seconds = seconds
        self.started = self.advanced = started
        self.done = 0
        self.part = ""
        self._widest = 0
        self._looks: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def look(self, now: float) -> None:
        """Remembers how far it is now, for the speed."""
        self._looks.append((now, self.done))

    def share(self, now: float) -> float | None:
        """0 to 1, or None where nobody knows."""
        if self.total:
            return min(1.0, max(0.0, self.done / self.total))
        if self.seconds and self.total is None:
            return min(1.0, (now - self.started) / self.seconds)
        return None

    def speed(self) -> float | None:
        """Units a second over the last looks: what a resumed file had before does not count."""
        if len(self._looks) < 2:
            return None
        (start, before), (end, done) = self._looks[0], self._looks[-1]
        return (done - before) / (end - start) if end - start > 0.2 and done > before else None

    def left(self, now: float) -> float | None:
        """Seconds until the end by estimate, where there is one."""
        if self.seconds is not None:
            left = self.started + self.seconds - now
            return left if left > 0 else None
        if not self.total or not 0 < self.done < self.total:
            return None
        if self.unit == "bytes":
            speed = self.speed()
            return None if speed is None else (self.total - self.done) / speed
        # From one step to the next the estimate counts down.
        each = (self.advanced - self.started) / self.done
        left = each * (self.total - self.done) - (now - self.advanced)
        return left if left > 0 else None

    def text(self, width: int, now: float, *, ascii_only: bool = False) -> str:
        """The line, in ``width`` columns at most."""
        name = self.name + (f": {self.part}" if self.part else "")
        name = "".join(c if c.isprintable() else "?" for c in name)
        share = self.share(now)
        percent = "" if share is None else f"{share:4.0%}"
        count, speed = self._count(), self._speed()
        left = self._time(now)
        if share is not None:
            left = left.ljust(len("10 s left"))  # the bar does not grow while nothing is known
        # A narrow line does without the speed, then without the count.
        for fields in ((percent, count, speed, left), (percent, count, left), (percent, left)):
            tail = _GAP.join(part for part in fields if part)
            room = width - len(tail) - len(_GAP)
            if room >= min(columns(name), _LEAST_NAME):
                break
        if not tail:
            return shorten(name, width, ascii_only=ascii_only)
        # The bar stands still while parts of different lengths come and go.
        self._widest = max(self._widest, columns(name))
        column = min(self._widest, max(room, 0))
        name = shorten(name, column, ascii_only=ascii_only)
        name += " " * (column - columns(name))
        bar = min(BAR, room - column - len(_GAP))
        if share is not None and bar >= _LEAST_BAR:
            full, rest = ("#", ".") if ascii_only else ("━", "─")
            filled = int(bar * share)
            tail = full * filled + rest * (bar - filled) + _GAP + tail
        return shorten(f"{name}{_GAP}{tail}".rstrip(), width, ascii_only=ascii_only)

    def _count(self) -> str:
        if not self.unit or (self.total is None and not self.done):
            return ""
        top = self.total or self.done
        if self.unit == "bytes":
            scale, sign = _scale(top, (("", 1), ("k", 10**3), ("M", 10**6), ("G", 10**9)))
            unit = f" {sign}B"
        else:
            scale, sign = _scale(top, (("", 1), ("M", 10**6), ("G", 10**9)))
            unit = f"{sign} {self.unit}"
        done = _number(self.done / scale, scale)
        if self.total is None:
            return done + unit
        total = _number(self.total / scale, scale)
        return f"{done:>{len(total)}}/{total}{unit}"

    def _speed(self) -> str:
        if self.unit != "bytes":
            return ""
        speed = self.speed()
        return "" if speed is None else f"{speed / 1e6:5.1f} MB/s"

    def _time(self, now: float) -> str:
        left = self.left(now)
        if left is not None:
            return f"{_clock(left)} left"
        elapsed = now - self.started
        unknown = self.seconds is None and (not self.total or not self.done)
        return _clock(elapsed) if unknown and elapsed >= 1 else ""


def columns(text: str) -> int:
    """Of a terminal: wide characters take two, those that combine with the one before none."""
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def shorten(text: str, width: int, *, ascii_only: bool = False) -> str:
    """Text of at most so many columns; what is too long loses its middle."""
    if ascii_only:
        text = text.encode("ascii", "replace").decode()
    if columns(text) <= width:
        return text
    mark = "..." if ascii_only else "…"
    room = width - len(mark)
    if room < 2:
        return text[: max(width, 0)] if text.isascii() else mark[: max(width, 0)]
    tail = _fitting(text[::-1], room // 2)[::-1]
    return _fitting(text, room - columns(tail)) + mark + tail


def _fitting(text: str, width: int) -> str:
    """The beginning of a text that takes at most so many columns."""
    used = 0
    for at, character in enumerate(text):
        used += _width(character)
        if used > width:
            return text[:at]
    return text


def _width(character: str) -> int:
    import unicodedata  # most names need none

    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _scale(value: int, scales: tuple[tuple[str, int], ...]) -> tuple[int, str]:
    """The largest unit of which there is at least one."""
    sign, scale = [(s, n) for s, n in scales if n == 1 or value >= n][-1]
    return scale, sign


def _number(value: float, scale: int) -> str:
    return f"{value:.0f}" if scale == 1 or value >= 1000 else f"{value:.1f}"


def _clock(seconds: float) -> str:
    """12 s, 3:05 or 1:02:03."""
    whole = int(seconds + 0.999)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
