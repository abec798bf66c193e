"""The operator table: name, inputs, attributes and result shapes of every operator.

A shape is a tuple of integers and the symbols ``"T"`` (tokens of the step), ``"R"`` (rows that
give an output), ``"S"`` (sequences) and ``"M"`` (tokens that come as embeddings). The meaning of
each operator is the function of the same name in :mod:`sartor.ops.functions`,
:mod:`sartor.ops.experts` or :mod:`sartor.ops.recurrent`. What works on the state and the batch
has it there too: ``kv_write``, ``attention``, ``latent_write``, ``latent_attention`` and
``self_attention`` in :func:`sartor.ops.functions.attend`, ``sample`` in
:mod:`sartor.ops.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sartor.errors import UsageError
from sartor.ops.experts import GROUP_SCORES, SCORES
from sartor.ops.functions import ACTIVATIONS, GATED_ACTIVATIONS, POOLS

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
    integers    which results are int32; the others are fp32
    """

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    infer: Infer
    fused: tuple[str, ...] = ()
    integers: tuple[int, ...] = ()


def _fail(name: str, shapes: Sequence[Shape]) -> UsageError:
    return UsageError(f"operator {name}: input shapes {list(shapes)} do not fit together")


def _same(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    return (shapes[0],)


def _elementwise(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    if shapes[1] not in (shapes[0], shapes[0][1:]):
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


def _layer_norm(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    if any(weight != shapes[0][1:] for weight in shapes[1:]):
        raise _fail("layer_norm", shapes)
    return (shapes[0],)


def _add_rms_norm(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    if shapes[0] != shapes[1]:
        raise _fail("add_rms_norm", shapes)
    total = shapes[0]
    return (total, *_norm([total, shapes[2]], attributes))


def _integer(attributes: Attributes, key: str) -> int:
    value = attributes[key]
    assert isinstance(value, int)
    return value


def _width(shape: Shape) -> int:
    width = shape[1]
    assert isinstance(width, int)
    return width


def _l2_norm(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    if _width(shapes[0]) % _integer(attributes, "run"):
        raise _fail("l2_norm", shapes)
    return (shapes[0],)


def _split(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    widths, runs = attributes["widths"], _integer(attributes, "runs")
    assert isinstance(widths, tuple | list)
    if sum(widths) * runs != shapes[0][1]:
        raise _fail("split", shapes)
    return tuple((shapes[0][0], width * runs) for width in widths)


def _concat(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    widths = [_width(shape) for shape in shapes]
    uneven = any(width % _integer(attributes, "runs") for width in widths)
    if uneven or any(shape[0] != shapes[0][0] for shape in shapes):
        raise _fail("concat", shapes)
    return ((shapes[0][0], sum(widths)),)


def _replace_rows(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    x, rows, values = shapes
    if values != (rows[0], x[1]):
        raise _fail("replace_rows", shapes)
    return (x,)


def _pool(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    _known(attributes, "kind", POOLS)
    return (("S", *shapes[0][1:]),)


def _route_experts(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    _known(attributes, "score", SCORES)
    _known(attributes, "group_score", GROUP_SCORES)
    experts, groups = _width(shapes[0]), _integer(attributes, "groups")
    eligible = experts // groups * _integer(attributes, "top_groups")
    top_k = _integer(attributes, "top_k")
    biased = all(bias == shapes[0][1:] for bias in shapes[1:])
    if experts % groups or not 0 < top_k <= eligible <= experts or not biased:
        raise _fail("route_experts", shapes)
    chosen = (shapes[0][0], top_k)
    return chosen, chosen


def _grouped_linear(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    x, experts, weight = shapes[:3]
    slots = _width(experts)
    count, n, k = weight
    assert isinstance(n, int)
    assert isinstance(k, int)
    if x[1] not in (k, slots * k) or (len(shapes) > 3 and shapes[3] != (count, n)):
        raise _fail("grouped_linear", shapes)
    return ((x[0], slots * n),)


def _head_linear(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    heads, n, k = shapes[1]
    assert isinstance(heads, int)
    assert isinstance(n, int)
    assert isinstance(k, int)
    if shapes[0][1] != heads * k:
        raise _fail("head_linear", shapes)
    return ((shapes[0][0], heads * n),)


def _combine_experts(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    width, slots = _width(shapes[0]), _width(shapes[1])
    if width % slots:
        raise _fail("combine_experts", shapes)
    return ((shapes[0][0], width // slots),)


def _latent_attention(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    heads, rank, rope_dim = (_integer(attributes, k) for k in ("heads", "rank", "rope_dim"))
    if shapes[0][1] != heads * (rank + rope_dim):
        raise _fail("latent_attention", shapes)
    return ((shapes[0][0], heads * rank),)


def _short_conv(shapes: Sequence[Shape], _: Attributes) -> tuple[Shape, ...]:
    if shapes[0][1] != shapes[1][0] or (len(shapes) > 2 and shapes[2] != shapes[0][1:]):
        raise _fail("short_conv", shapes)
    return (shapes[0],)


def _recurrent_scan(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    q, k, v, decay, beta = shapes
    heads, key_heads, key_dim = (_integer(attributes, a) for a in ("heads", "key_heads", "key_dim"))
    keys, values = (q[0], key_heads * key_dim), (q[0], heads * _integer(attributes, "value_dim"))
    if (q, k, v, decay, beta) != (keys, keys, values, (q[0], heads), (q[0], heads)):
        raise _fail("recurrent_scan", shapes)
    if heads % key_heads:
        raise _fail("recurrent_scan", shapes)
    return (v,)


def _known(attributes: Attributes, key: str, values: Sequence[str]) -> None:
    if attributes[key] not in values:
        raise UsageError(f"{key} {attributes[key]!r} is unknown; known are {', '.join(values)}")


def _attention(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    heads = _integer(attributes, "heads")
    if shapes[0][1] != heads * _integer(attributes, "head_dim"):
        raise _fail("attention", shapes)
    return ((shapes[0][0], heads * _integer(attributes, "value_dim")),)


def _self_attention(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    kv_heads, head_dim = _integer(attributes, "kv_heads"), _integer(attributes, "head_dim")
    widths = (kv_heads * head_dim, kv_heads * _integer(attributes, "value_dim"))
    if (_width(shapes[1]), _width(shapes[2])) != widths:
        raise _fail("self_attention", shapes)
    return _attention(shapes[:1], attributes)


def _activation(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    _known(attributes, "kind", tuple(ACTIVATIONS))
    return _same(shapes, attributes)


def _gated_activation(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    _known(attributes, "kind", GATED_ACTIVATIONS)
    if shapes[0] != shapes[1]:
        raise _fail("gated_activation", shapes)
    return (shapes[0],)


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
    Operator("layer_norm", ("x", "weight", "bias?"), ("eps",), _layer_norm),
    Operator("rope", ("x",), ("rope", "head_dim"), _same),
    Operator("kv_write", ("k", "v"), ("state",), _nothing),
    Operator(
        "attention",
        ("q", "sinks?"),
        ("state", "heads", "kv_heads", "head_dim", "value_dim", "scale", "window", "softcap"),
        _attention,
    ),
    Operator(
        "self_attention",
        ("q", "k", "v"),
        ("heads", "kv_heads", "head_dim", "value_dim", "scale", "window"),
        _self_attention,
    ),
    Operator("latent_write", ("latent", "rope"), ("state",), _nothing),
    Operator(
        "latent_attention",
        ("q",),
        ("state", "heads", "rank", "rope_dim", "scale"),
        _latent_attention,
    ),
    Operator("short_conv", ("x", "weight", "bias?"), ("state",), _short_conv),
    Operator(
        "recurrent_scan",
        ("q", "k", "v", "decay", "beta"),
        ("state", "heads", "key_heads", "key_dim", "value_dim", "scale", "delta"),
        _recurrent_scan,
    ),
    Operator(
        "route_experts",
        ("logits", "bias?"),
        ("top_k", "score", "normalize", "scale", "groups", "top_groups", "group_score"),
        _route_experts,
        integers=(0,),
    ),
    Operator("grouped_linear", ("x", "experts", "weight", "bias?"), (), _grouped_linear),
    Operator("head_linear", ("x", "weight"), (), _head_linear),
    Operator("combine_experts", ("x", "weights"), (), _combine_experts),
    Operator("l2_norm", ("x",), ("run", "eps"), _l2_norm),
    Operator("split", ("x",), ("widths", "runs"), _split),
    Operator("concat", ("parts*",), ("runs",), _concat),
    Operator("replace_rows", ("x", "rows", "values"), (), _replace_rows),
    Operator("pool", ("x",), ("kind",), _pool),
    Operator("activation", ("x",), ("kind",), _activation),
    Operator("gated_activation", ("gate", "up"), ("kind",), _gated_activation),
    Operator("add", ("x", "y"), (), _elementwise),
    Operator("mul", ("x", "y"), (), _elementwise),
    Operator("scale", ("x",), ("factor",), _same),
    Operator("softcap", ("x",), ("cap",), _same),
    Operator("gather_rows", ("x", "rows"), (), _gather),
    Operator("sample", ("logits",), (), _sample, integers=(0,)),
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
