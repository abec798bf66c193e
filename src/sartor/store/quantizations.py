"""Weight types of GGUF files by their names, and which one is taken where there are several.

The rule: what the user names. Else, of the types that Sartor reads, the first in the order of the
catalogue's entry and then of ``ORDER`` that fits: its size and a tenth more in three quarters of
the memory that is available, which leaves a quarter for the state of conversations. Where none
fits, the smallest. Several files of one type are several models: the user names one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sartor.errors import UsageError

ORDER = (
    # Four bits with six-bit scales: close to the original, at half the memory and twice the speed
    # of eight bits.
    *("Q4_K_M", "Q4_K_XL", "Q4_K_L", "MXFP4", "MXFP4_MOE"),
    # Then by quality, the best first.
    *("Q8_0", "Q8_K_XL", "Q6_K_XL", "Q6_K_L", "Q6_K", "Q5_K_XL", "Q5_K_L", "Q5_K_M", "Q5_K_S"),
    *("Q5_1", "Q5_0", "Q5_K", "Q4_K", "Q4_K_S", "Q4_1", "IQ4_NL", "Q4_0", "IQ4_XS"),
    *("Q3_K_XL", "Q3_K_L", "Q3_K_M", "Q3_K", "Q3_K_S", "Q2_K_XL", "Q2_K_L", "Q2_K", "Q2_K_S"),
    # Not quantised: only where nothing else is offered.
    *("BF16", "F16", "F32"),
)
"""The order in which weight types are taken from a repository that offers several."""

PACKING = 1.1  # memory of weights over their size in the file: wider scales
STATE_SHARE = 0.25  # of the available memory, left for the state; as engine/sizing.py takes it

_QUANT = re.compile(
    r"(?<![A-Z0-9])(?P<ud>UD[-_])?"
    r"(?P<kind>I?Q\d(?:_(?:K|KS|KSS|KT|KL|0|1|4|8|NL|XXS|XS|S|M|L|XL|R4|R8))+|TQ\d_\d|MXFP4(?:_MOE)?"
    r"|NVFP4|BF16|FP?16|FP?32)(?![A-Z0-9])"
)
_UNREAD = re.compile(r"(UD-)?(IQ(?!4_(NL|XS)$).*|Q1_.*|TQ.*|NVFP4|Q\d_\d_\d.*|Q\d_K[ST].*|.*_R\d)")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def quantization(name: str) -> str | None:
    """The weight type that a file's name (or, where that has none, its folder's) tells: the last
    one in it, like Q4_K_M or UD-Q4_K_XL."""
    path = PurePosixPath(name)
    for part in (path.name, path.parent.name):
        found = list(_QUANT.finditer(part.upper()))
        if found:
            kind = found[-1]["kind"].replace("FP16", "F16").replace("FP32", "F32")
            # (BF16 is written with one F only.)
            return f"UD-{kind}" if found[-1]["ud"] else kind
    return None


def is_read(quant: str) -> bool:
    """Whether files of this type hold only what ``formats/gguf_blocks.py`` decodes."""
    return _UNREAD.fullmatch(quant) is None


@dataclass(frozen=True, slots=True)
class Offer:
    """One model of a repository: a file, or those of a split set. ``size`` in bytes, if told."""

    label: str
    files: tuple[str, ...]
    quant: str | None
    size: int | None


def offers(sizes: Mapping[str, int | None]) -> list[Offer]:
    """GGUF files by model, in the order of their names."""
    groups: dict[str, list[str]] = {}
    for name in sorted(sizes):
        shard = _SHARD.fullmatch(name)
        groups.setdefault(shard["stem"] if shard else name, []).append(name)
    found = []
    for label, files in groups.items():
        known = [size for size in map(sizes.__getitem__, files) if size is not None]
        size = sum(known) if len(known) == len(files) else None
        quant = quantization(label if label.lower().endswith(".gguf") else f"{label}.gguf")
        found.append(Offer(label, tuple(files), quant, size))
    return found


def choose(
    offered: Sequence[Offer],
    where: str,
    *,
    prefer: Sequence[str] = (),
    quant: str | None = None,
    room: Callable[[], int | None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Offer:
    """One of several offers, by the rule above; ``say`` is told which and why.

    ``room`` gives the bytes of available memory, None where that is unknown. Raises UsageError
    where the choice is the user's, naming what there is.
    """
    if quant is not None:
        chosen = _named(offered, where, quant)
        _warn(chosen, room(), say)
        return chosen
    if len(offered) == 1:
        _warn(offered[0], room(), say)
        return offered[0]
    ranked = _ranked(offered, prefer)
    if not ranked:
        labels = ", ".join(offer.label for offer in offered)
        raise UsageError(f"{where} has several GGUF files; name one of them: {labels}")
    free = room()
    fitting = [offer for offer in ranked if _fits(offer, free)]
    chosen = fitting[0] if fitting else min(ranked, key=lambda offer: offer.size or 0)
    same = [offer for offer in offered if offer.quant == chosen.quant]
    if len(same) > 1:
        raise UsageError(
            f"{where} has {len(same)} models of type {chosen.quant}; name the file: "
            + ", ".join(f"{where}/{offer.files[0]}" for offer in same)
        )
    _tell(chosen, ranked, offered, where, free, bool(fitting), say)
    return chosen


def _named(offered: Sequence[Offer], where: str, quant: str) -> Offer:
    wanted = quant.replace("FP16", "F16").replace("FP32", "F32")
    found = [offer for offer in offered if offer.quant == wanted]
    if not found and not wanted.startswith("UD-"):
        found = [offer for offer in offered if offer.quant == f"UD-{wanted}"]
    if not found:
        raise UsageError(f"{where} offers no {quant}; it offers {_listed(offered)}")
    if len(found) > 1:
        raise UsageError(
            f"{where} has {len(found)} models of type {quant}; name the file: "
            + ", ".join(f"{where}/{offer.files[0]}" for offer in found)
        )
    if not is_read(wanted):
        readable = [offer for offer in offered if offer.quant and is_read(offer.quant)]
        raise UsageError(
            f"{where}: {quant} is a weight type that Sartor does not read; "
            + (f"it also offers {_listed(readable)}" if readable else "choose another repository")
        )
    return found[0]


def _ranked(offered: Sequence[Offer], prefer: Sequence[str]) -> list[Offer]:
    """Offers of types that are read, in the order in which they are taken."""
    by_rank: dict[str, Offer] = {}
    for kind in (*prefer, *ORDER):
        for offer in offered:
            if offer.quant in (kind, f"UD-{kind}"):
                by_rank.setdefault(offer.label, offer)
    return list(by_rank.values())


def _fits(offer: Offer, free: int | None) -> bool:
    if offer.size is None or free is None:
        return True
    return offer.size * PACKING <= free * (1 - STATE_SHARE)


def _warn(offer: Offer, free: int | None, say: Callable[[str], None]) -> None:
    if not _fits(offer, free):
        say(
            f"{offer.label} has {in_bytes(offer.size or 0)}, and {in_bytes(free or 0)} of memory "
            "are free: it may not load here"
        )


def _tell(
    chosen: Offer,
    ranked: Sequence[Offer],
    offered: Sequence[Offer],
    where: str,
    free: int | None,
    fits: bool,
    say: Callable[[str], None],
) -> None:
    if not fits:
        why = f"the smallest, and {in_bytes(free or 0)} of memory are free: it may not load here"
    elif chosen is ranked[0] or free is None:
        why = "the first by preference"
    else:
        why = f"the first by preference that fits into {in_bytes(free)} of free memory"
    size = "" if chosen.size is None else f" ({in_bytes(chosen.size)})"
    other = next((offer.quant for offer in ranked if offer is not chosen), "")
    # A wheel has no such names: what it carries is one model.
    another = f"; {where}:{other} takes another" if other and "/" in where else ""
    say(f"{where} offers {_listed(offered)}: {chosen.quant}{size} is taken, {why}{another}")


def _listed(offered: Iterable[Offer]) -> str:
    return ", ".join(dict.fromkeys(offer.quant or offer.label for offer in offered))


def in_bytes(count: int) -> str:
    """Bytes for people, in decimal units."""
    if count < 999_500:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 999_500_000 else f"{count / 1e6:.0f} MB"
