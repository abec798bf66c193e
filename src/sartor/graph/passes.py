"""Passes over programs: fusion now; sharding and placement have their place here.

A pass takes a program and returns a new one that means the same.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from sartor.graph.program import Node, Program, Value, WeightSpec


def fuse(program: Program, wanted: frozenset[str], taps: frozenset[str] = frozenset()) -> Program:
    """Uses the fused operators that a backend names in its capabilities.

    A node that is tapped keeps its own result and is left as it is.
    """
    if "linear_group" in wanted:
        program = _group_linears(program, taps)
    if "add_rms_norm" in wanted:
        program = _fuse_add_norm(program, taps)
    return program


def _group_linears(program: Program, taps: frozenset[str]) -> Program:
    """Neighbouring linears of one input become one node: one pass over the input."""
    nodes: list[Node] = []
    for node in program.nodes:
        last = nodes[-1] if nodes else None
        joins = (
            last is not None
            and node.op == "linear"
            and last.op in ("linear", "linear_group")
            and node.inputs[0] == last.inputs[0]
            and node.name not in taps
            and last.name not in taps
        )
        if not joins:
            nodes.append(node)
            continue
        assert last is not None
        biases = last.attributes.get("biases", [len(last.inputs) > 2])
        nodes[-1] = Node(
            f"{last.name}+{node.name.rpartition('.')[2]}",
            "linear_group",
            last.inputs + node.inputs[1:],
            last.outputs + node.outputs,
            {"biases": [*biases, len(node.inputs) > 2]},
        )
    return dataclasses.replace(program, nodes=tuple(nodes))


def _fuse_add_norm(program: Program, taps: frozenset[str]) -> Program:
    """``add`` directly followed by the ``rms_norm`` of its sum becomes one node."""
    nodes: list[Node] = []
    for node in program.nodes:
        last = nodes[-1] if nodes else None
        if (
            last is not None
            and last.op == "add"
            and program.values[last.inputs[1]].source == "node"  # else one row for all
            and node.op == "rms_norm"
            and node.inputs[0] == last.outputs[0]
            and node.name not in taps
            and last.name not in taps
        ):
            nodes[-1] = Node(
                node.name,
                "add_rms_norm",
                (*last.inputs, node.inputs[1]),
                (last.outputs[0], node.outputs[0]),
                dict(node.attributes),
            )
        else:
            nodes.append(node)
    return dataclasses.replace(program, nodes=tuple(nodes))


def logits_linear(program: Program) -> int:
    """The result of the linear that makes the logits (before a softcap or scale), or -1.

    It keeps 16 bits of all its inputs where others do so for outliers only: nothing after it
    averages its errors, and it runs for the output rows alone.
    """
    made_by = {value: node for node in program.nodes for value in node.outputs}
    logits = program.outputs.get("logits", -1)
    while logits in made_by and made_by[logits].op in ("softcap", "scale"):
        logits = made_by[logits].inputs[0]
    return logits if logits in made_by and made_by[logits].op == "linear" else -1


def head_weight(program: Program) -> WeightSpec | None:
    """The weight of the linear that makes the logits; None where there is no such linear."""
    made = logits_linear(program)
    for node in program.nodes:
        if made in node.outputs:
            return program.weight_values()[node.inputs[1]]
    return None


def untie_head(program: Program) -> Program:
    """The linear that makes the logits reads a weight that nothing else reads.

    Where it shares one (a tied embedding) it gets another, of its own name and the same shape;
    its source must know both. Other programs stay as they are.
    """
    shared = head_weight(program)
    if shared is None or sum(shared.value in node.inputs for node in program.nodes) == 1:
        return program
    made = logits_linear(program)
    head = next(node for node in program.nodes if made in node.outputs)
    own = Value(len(program.values), f"{head.name}.weight", shared.shape, source="weight")
    inputs = (head.inputs[0], own.id, *head.inputs[2:])
    return dataclasses.replace(
        program,
        values=(*program.values, own),
        weights=(*program.weights, dataclasses.replace(shared, name=own.name, value=own.id)),
        nodes=tuple(
            dataclasses.replace(node, inputs=inputs) if node is head else node
            for node in program.nodes
        ),
    )


def last_uses(program: Program) -> dict[int, int]:
    """Index of the node after which each value is dead; outputs live to the end."""
    uses = {value: index for index, node in enumerate(program.nodes) for value in node.inputs}
    for value in program.outputs.values():
        uses[value] = len(program.nodes)
    return uses


def operator_counts(program: Program) -> Counter[str]:
    """How many nodes of each operator a program has."""
    return Counter(node.op for node in program.nodes)
