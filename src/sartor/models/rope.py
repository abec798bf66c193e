"""Rotary embeddings as checkpoints describe them, turned into :class:`RopeSpec`.

Sources: the ``rope_parameters`` of transformers (and ``rope_theta`` with ``rope_scaling``, its
older form); the ``rope.*`` keys of GGUF, with llama.cpp's meaning of them.
"""

from __future__ import annotations

import dataclasses
import math

from sartor.errors import FormatError, UnsupportedError
from sartor.models.options import Options
from sartor.ops.rope import ROPE_KINDS, RopeSpec, attention_factor

_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}
"""Options of each rope type; ``finetuned`` is a note of older YaRN checkpoints, not an option."""
GGUF_TRUNCATE = "rope.scaling.yarn_truncate"
"""Whether YaRN's ramp begins and ends at whole pairs. No published converter writes it yet."""
_OLDER_NAMES = {"su": "longrope"}
_ABSURD = 1e9  # far above any stretch or number of rotations that a model could mean


def hf_rope(
    options: Options,
    head_dim: int,
    default_theta: float = 10000.0,
    *,
    partial: float | None = None,
) -> RopeSpec:
    """The rope of a model whose layers all share one; ``options`` are those of config.json.

    ``partial`` is the default of ``partial_rotary_factor``, the share of a head that is rotated;
    None where the architecture rotates all of it.
    """
    key = "rope_parameters" if options.raw("rope_parameters") is not None else "rope_scaling"
    if partial is None:
        options.require("partial_rotary_factor", 1.0)
    else:
        partial = options.positive("partial_rotary_factor", partial)
    theta = options.positive("rope_theta", default_theta)
    context = options.size("max_position_embeddings")
    original = options.integer("original_max_position_embeddings", 0)
    return hf_rope_table(options.table(key), head_dim, theta, context, original, partial)


def hf_rope_table(
    table: Options,
    head_dim: int,
    theta: float,
    context: int,
    original: int = 0,
    partial: float | None = None,
) -> RopeSpec:
    """The rope of one table of rope parameters.

    ``theta`` and ``context`` (``max_position_embeddings``) are used where the table leaves
    them open, and so is ``partial``, the share of a head that is rotated (None: all of it, and
    the table may not say otherwise); ``original`` is the configuration's own original context,
    which overrides the table's (as in transformers).
    """
    if partial is None:
        table.require("partial_rotary_factor", 1.0)
    else:
        share = table.positive("partial_rotary_factor", partial)
        rotated = int(head_dim * min(share, 2.0))
        if not 0 < rotated <= head_dim or rotated % 2:
            raise table.refusal("partial_rotary_factor", share)
        head_dim = rotated
    return _sound(_hf_spec(table, head_dim, theta, context, original), table.where)


def _hf_spec(table: Options, dim: int, theta: float, context: int, original: int) -> RopeSpec:
    kind = table.text("rope_type", table.text("type", "default"))
    kind = _OLDER_NAMES.get(kind, kind)
    if kind not in _KEYS:
        raise UnsupportedError(
            f"{table.where}: rope type {kind!r} is not implemented; implemented are "
            f"{', '.join(ROPE_KINDS)}"
        )
    for key in table.present():
        if key not in _COMMON + _KEYS[kind]:
            raise UnsupportedError(
                f"{table.where}: option {key} = {table.raw(key)!r} is not implemented for rope "
                f"type {kind!r}"
            )
    spec = RopeSpec(dim=dim, theta=table.positive("rope_theta", theta))
    if kind == "default":
        return spec
    if kind == "linear":
        return dataclasses.replace(spec, kind="linear", factor=table.positive("factor"))
    if kind == "dynamic":
        # The length from which the base grows is the configured context, not an "original" one.
        return dataclasses.replace(
            spec, kind="dynamic", factor=table.positive("factor"), original_context=context
        )
    original = original or table.size("original_max_position_embeddings", context)
    if kind == "llama3":
        return dataclasses.replace(
            spec,
            kind="llama3",
            factor=table.positive("factor"),
            original_context=original,
            low_freq_factor=table.number("low_freq_factor"),
            high_freq_factor=table.number("high_freq_factor"),
        )
    given = table.raw("attention_factor") is not None
    attention = table.positive("attention_factor") if given else 0.0
    if kind == "longrope":
        return dataclasses.replace(
            spec,
            kind="longrope",
            factor=table.positive("factor", context / original),
            original_context=original,
            attention_factor=attention,
            short_factors=table.numbers("short_factor"),
            long_factors=table.numbers("long_factor"),
        )
    return dataclasses.replace(
        spec,
        kind="yarn",
        factor=table.positive("factor", context / original),
        original_context=original,
        attention_factor=attention,
        beta_fast=table.number("beta_fast", 0) or 32.0,
        beta_slow=table.number("beta_slow", 0) or 1.0,
        mscale=table.number("mscale", 0.0),
        mscale_all_dim=table.number("mscale_all_dim", 0.0),
        truncate=table.flag("truncate", True),
    )


def gguf_rope(
    options: Options,
    head_dim: int,
    context: int,
    frequencies: tuple[float, ...] = (),
    *,
    partial: bool = False,
) -> RopeSpec:
    """The rope of a GGUF file, over halves (interleaved rows are put in order at load).

    ``frequencies`` is the tensor ``rope_freqs.weight``: a divisor a pair. ``partial`` allows
    that less than a head is rotated.
    """
    dim = options.even_size("rope.dimension_count", head_dim)
    if dim != head_dim and not (partial and dim < head_dim):
        raise options.refusal("rope.dimension_count", dim)
    return _sound(_gguf_spec(options, dim, context, frequencies), options.where)


def gguf_longrope(
    spec: RopeSpec,
    context: int,
    original: int,
    short: tuple[float, ...],
    long: tuple[float, ...],
    where: str,
) -> RopeSpec:
    """``spec`` with the divisors of the tensors ``rope_factors_short`` and ``_long``.

    Files state the attention factor in ``rope.scaling.attn_factor``; without it it is 1.
    """
    scaled = dataclasses.replace(
        spec,
        kind="longrope",
        factor=context / original,
        original_context=original,
        attention_factor=spec.attention_factor or 1.0,
        short_factors=short,
        long_factors=long,
    )
    return _sound(scaled, where)


def _gguf_spec(
    options: Options, dim: int, context: int, frequencies: tuple[float, ...]
) -> RopeSpec:
    if frequencies and len(frequencies) != dim // 2:
        raise FormatError(
            f"{options.where}: rope_freqs.weight has {len(frequencies)} entries, a rope over "
            f"{dim} features needs {dim // 2}"
        )
    spec = RopeSpec(
        dim=dim, theta=options.positive("rope.freq_base", 10000.0), frequencies=frequencies
    )
    kind = options.text("rope.scaling.type", "linear")
    factor = options.number("rope.scaling.factor", options.number("rope.scale_linear", 0.0))
    factor = factor or 1.0  # 0 is "not set"
    original = options.size("rope.scaling.original_context_length", context)
    extra = options.positive("rope.scaling.attn_factor", 1.0)
    if kind in ("none", "linear"):
        # llama.cpp's attn_factor holds for every type, and its factor for all but "none".
        spec = dataclasses.replace(spec, attention_factor=0.0 if extra == 1 else extra)
        if kind == "none" or factor == 1:
            return spec
        return dataclasses.replace(spec, kind="linear", factor=factor)
    if kind != "yarn":
        raise UnsupportedError(
            f"{options.where}: {options.prefix}rope.scaling.type = {kind!r} is not implemented; "
            "implemented are none, linear, yarn"
        )
    options.require("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    options.require("rope.scaling.yarn_attn_factor", 1.0, -1.0)
    if not options.has_read("rope.scaling.yarn_log_multiplier"):  # DeepSeek's own business
        options.require("rope.scaling.yarn_log_multiplier", 0.0)
    spec = dataclasses.replace(
        spec,
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=options.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=options.number("rope.scaling.yarn_beta_slow", 1.0),
        truncate=options.flag(GGUF_TRUNCATE, True),  # llama.cpp always does
    )
    # llama.cpp multiplies the factor that it derives by the stored one.
    return dataclasses.replace(spec, attention_factor=attention_factor(spec) * extra)


def _sound(spec: RopeSpec, where: str) -> RopeSpec:
    """The spec, unless its numbers would divide by zero or take a logarithm of nothing."""
    faults = {
        "the base of its frequencies is not above 1": not 1 < spec.theta < math.inf,
        "its factor is not above 0, or absurd": not 0 < spec.factor < _ABSURD,
        "its attention factor is negative": not 0 <= spec.attention_factor < math.inf,
        "low_freq_factor must be above 0 and below high_freq_factor": spec.kind == "llama3"
        and not 0 < spec.low_freq_factor < spec.high_freq_factor < math.inf,
        "beta_slow must be above 0, and beta_fast not below it": spec.kind == "yarn"
        and not 0 < spec.beta_slow <= spec.beta_fast < _ABSURD,
        "mscale must be a number from 0": not 0 <= spec.mscale < math.inf
        or not 0 <= spec.mscale_all_dim < math.inf,
        "dynamic scaling needs more than one pair": spec.kind == "dynamic" and spec.dim == 2,
        "a divisor in rope_freqs.weight is not above 0": not all(
            0 < divisor < math.inf for divisor in spec.frequencies
        ),
        "a longrope factor is not above 0": not all(
            0 < divisor < math.inf for divisor in spec.short_factors + spec.long_factors
        ),
        "longrope needs an original context of more than one token": spec.kind == "longrope"
        and spec.original_context < 2,
    }
    for fault, found in faults.items():
        if found:
            raise FormatError(f"{where}: the rope cannot be computed: {fault}")
    return spec
