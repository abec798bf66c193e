"""The operator table: name, inputs, attributes and result shapes of every operator.

A shape is a tuple of integers and the symbols ``"T"`` (tokens of the step) and ``"R"``
(rows that give an output). The meaning of each operator is the function of the same name in
:mod:`sartor.ops.functions`; ``kv_write``, ``attention`` and ``sample`` work on the state and
the batch, and their meaning is in :mod:`sartor.ops.functions` (``attend``) and
:mod:`sartor.ops.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sartor.errors import UsageError
from sartor.ops.functions import ACTIVATIONS

Dim = int | str
Shape = tuple[Dim, ...]
Attributes = Mapping[str, object]
Infer = Callable[[Sequence[Shape], Attributes], tuple[Shape, ...]]


@dataclass(frozen=True)
class Operator:
    """One entry of the contract.

    inputs      names of the inputs; a trailing ``?`` marks an optional one, ``*`` any number
    attributes  names of the attributes that a node must carry
    infer       result shapes from input shapes; raises UsageError where they do not fit
    fused       the operators that it equals, for optional fused forms; empty otherwise
    """

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    infer: Infer
    fused: tuple[str, ...] = ()


def _fail(name: str, shapes: Sequence[Shape]) -> UsageError:
    return UsageError(f"operator {name}: input shapes {list(shapes)} do not fit together")


def _same(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    return (shapes[0],)


def _elementwise(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    if shapes[0] != shapes[1]:
        raise _fail("elementwise", shapes)
    return (shapes[0],)


def _embedding(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    return ((shapes[0][0], shapes[1][1]),)


def _linear(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    x, weight = shapes[0], shapes[1]
    if x[1] != weight[1] or (len(shapes) > 2 and shapes[2] != (weight[0],)):
        raise _fail("linear", shapes)
    return ((x[0], weight[0]),)


def _linear_group(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    x, rest = shapes[0], list(shapes[1:])
    biases = attributes["biases"]
    assert isinstance(biases, tuple | list)
    out: list[Shape] = []
    for has_bias in biases:
        members = [x, rest.pop(0)] + ([rest.pop(0)] if has_bias else [])
        out += _linear(members, attributes)
    if rest:
        raise _fail("linear_group", shapes)
    return tuple(out)


def _norm(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    width, run = shapes[0][1], shapes[1][0]
    if not isinstance(width, int) or not isinstance(run, int) or width % run:
        raise _fail("norm", shapes)
    return (shapes[0],)


def _add_rms_norm(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    total = _elementwise(shapes[:2], attributes)[0]
    return (total, *_norm([total, shapes[2]], attributes))


def _attention(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    heads, value_dim, head_dim = (attributes[k] for k in ("heads", "value_dim", "head_dim"))
    assert isinstance(heads, int)
    assert isinstance(value_dim, int)
    assert isinstance(head_dim, int)
    if shapes[0][1] != heads * head_dim:
        raise _fail("attention", shapes)
    return ((shapes[0][0], heads * value_dim),)


def _activation(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    if attributes["kind"] not in ACTIVATIONS:
        raise UsageError(
            f"activation {attributes['kind']!r} is unknown; known are {', '.join(ACTIVATIONS)}"
        )
    return _elementwise(shapes, attributes) if len(shapes) == 2 else _same(shapes, attributes)


def _gather(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    return ((shapes[1][0], *shapes[0][1:]),)


def _nothing(_: Sequence[Shape], __: Attributes) -> tuple[Shape, ...]:
    return ()


def _sample(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    return ((shapes[0][0],),)


_ALL = (
    Operator("embedding", ("ids", "table"), ("scale",), _embedding),
    Operator("linear", ("x", "weight", "bias?"), (), _linear),
    Operator("rms_norm", ("x", "weight"), ("eps", "weight_offset"), _norm),
    Operator("layer_norm", ("x", "weight", "bias?"), ("eps",), _norm),
    Operator("rope", ("x",), ("rope", "head_dim"), _same),
    Operator("kv_write", ("k", "v"), ("state",), _nothing),
    Operator(
        "attention",
        ("q", "sinks?"),
        ("state", "heads", "kv_heads", "head_dim", "value_dim", "scale", "window", "softcap"),
        _attention,
    ),
    Operator("activation", ("x",), ("kind",), _activation),
    Operator("gated_activation", ("gate", "up"), ("kind",), _activation),
    Operator("add", ("x", "y"), (), _elementwise),
    Operator("mul", ("x", "y"), (), _elementwise),
    Operator("scale", ("x",), ("factor",), _same),
    Operator("softcap", ("x",), ("cap",), _same),
    Operator("gather_rows", ("x", "rows"), (), _gather),
    Operator("sample", ("logits",), (), _sample),
    Operator(
        "linear_group", ("x", "weights*"), ("biases",), _linear_group, fused=("linear", "linear")
    ),
    Operator(
        "add_rms_norm",
        ("x", "y", "weight"),
        ("eps", "weight_offset"),
        _add_rms_norm,
        fused=("add", "rms_norm"),
    ),
)

OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in _ALL}

CORE_OPERATORS: tuple[str, ...] = tuple(o.name for o in _ALL if not o.fused)
FUSED_OPERATORS: tuple[str, ...] = tuple(o.name for o in _ALL if o.fused)


def operator(name: str) -> Operator:
    """The entry of an operator; an unknown name is an error that lists the known ones."""
    try:
        return OPERATORS[name]
    except KeyError:
        known = ", ".join(OPERATORS)
        raise UsageError(f"operator {name!r} is unknown; known are {known}") from None
