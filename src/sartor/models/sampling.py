"""How a model's makers would have its tokens drawn: ``generation_config.json``, or GGUF's keys.

Source: transformers' ``GenerationConfig`` and the ``general.sampling.*`` keys of llama.cpp. An
answer is possible without these values, so that what is wrong with one costs a note and no more.
``max_new_tokens`` and ``max_length`` are no limits here: how long an answer may be is for the
request to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sartor.errors import SartorError, UsageError
from sartor.formats import Checkpoint
from sartor.graph.sampling import SAMPLING_LIMITS, UNSAID, SamplingDefaults, check_sampling

FILE = "generation_config.json"
_GGUF = "general.sampling."
_GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_OTHERS: Mapping[str, tuple[object, ...]] = {
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "penalty_alpha": (0,),
    "num_beams": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
}
"""What of ``generation_config.json`` changes answers too and is not taken, unless it says nothing:
null, or one of these."""

_GGUF_OTHERS: Mapping[str, tuple[object, ...]] = {
    "mirostat": (0,),
    "xtc_probability": (0,),
    "penalty_last_n": (-1,),
}


def own_sampling(checkpoint: Checkpoint) -> SamplingDefaults:
    """A checkpoint's own values of the parameters in ``SAMPLING_LIMITS``; raises nothing."""
    if checkpoint.kind == "gguf":
        return _from_gguf(checkpoint.metadata)
    return _from_folder(checkpoint.path)


def _from_gguf(metadata: Mapping[str, object]) -> SamplingDefaults:
    given = {  # without a look at other values: arrays are decoded when asked for
        name.removeprefix(_GGUF): metadata[name] for name in metadata if name.startswith(_GGUF)
    }
    found, notes = _taken({ours: given.get(theirs) for theirs, ours in _GGUF_NAMES.items()})
    others = dict(_GGUF_OTHERS)
    if found.get("repetition_penalty", 1) == 1:
        del others["penalty_last_n"]  # of no penalty
    notes += _left_out(given, others)
    return _defaults(found, "the file's sampling keys", [f"{_GGUF}*: {note}" for note in notes])


def _from_folder(folder: Path) -> SamplingDefaults:
    from sartor.formats.safetensors import read_json

    if not (folder / FILE).exists():
        return UNSAID
    try:
        given = read_json(folder / FILE)
    except SartorError as error:
        return SamplingDefaults(notes=(f"{error}; the default sampling is used",))
    found, notes = _taken({name: given.get(name) for name in SAMPLING_LIMITS})
    match given.get("do_sample"):
        case False:
            found["temperature"] = 0.0
        case None | True:
            pass
        case other:
            notes.append(f"do_sample is {other!r}; it must be true or false")
    notes += _left_out(given, _OTHERS)
    return _defaults(found, FILE, [f"{FILE}: {note}" for note in notes])


def _taken(given: Mapping[str, object]) -> tuple[dict[str, float], list[str]]:
    """What of the values can be taken, and a line for each that cannot."""
    found: dict[str, float] = {}
    notes = []
    for name, value in given.items():
        if value is None:
            continue
        if name == "top_k" and isinstance(value, int | float) and not isinstance(value, bool):
            # Some write 50.0; all negative numbers keep every token, as 0 does.
            value = 0 if value < 0 else int(value) if value == value // 1 else value
        try:
            check_sampling(name, value)
        except UsageError as error:
            notes.append(f"{error}; it is ignored")
            continue
        assert isinstance(value, int | float)
        found[name] = value
    return found, notes


def _left_out(given: Mapping[str, object], known: Mapping[str, tuple[object, ...]]) -> list[str]:
    return [
        f"{name} = {_short(given[name])} is not supported, and ignored"
        for name, neutral in known.items()
        if not _says_nothing(given.get(name), neutral)
    ]


def _says_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    # Not by == alone: arrays of a GGUF file compare element by element.
    plain = isinstance(value, int | float | list | dict)
    return value is None or (plain and value in neutral)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _defaults(found: dict[str, float], origin: str, notes: list[str]) -> SamplingDefaults:
    return SamplingDefaults(
        **found,  # type: ignore[arg-type]
        origin=origin if found else "",
        notes=tuple(notes),
    )
