"""The linear layers of a model by the names that Hugging Face gives to its modules.

Adapters are made with these names, and with the rows of these modules, whatever file the model is
read from: a GGUF file names its tensors and orders its rows in its own way, and programs keep
apart what some modules hold together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sartor.graph import Program
from sartor.graph.program import Node
from sartor.models.model import Model

Rows = npt.NDArray[np.int64] | slice | None

_WRAPPERS = ("language_model", "_orig_mod")
"""Parts of a module's path that say how the model was wrapped, and not which layer it is."""

_REASONS: Mapping[str, str] = {
    "embedding": "it is an embedding, and only linear layers can be adapted",
    "grouped_linear": "it is a layer of experts, which are run together and cannot be adapted",
    "head_linear": (
        "the model runs it in two parts, taken into the queries and the results of attention, and "
        "these cannot be adapted"
    ),
    "short_conv": "it is a convolution, and only linear layers can be adapted",
    "linear": "its weight is changed when it is read, and an adapter of it would have to be too",
}
"""Why the weights of an operator take no adapter; "linear" where its place converts it."""

_NO_LAYER = "it is no linear layer, and only these can be adapted"
_OTHER_PARTS = ("vision", "multi_modal", "audio", "image")


@dataclass(frozen=True)
class Part:
    """A linear node of the program that a module is, or is a part of.

    ``node`` is its name, ``weight`` that of its weight; ``rows`` are those of the module that it
    has, in this order.
    """

    node: str
    weight: str
    rows: Rows


class LinearModules:
    """Which modules of a model can be adapted, and why others cannot."""

    def __init__(self, model: Model) -> None:
        program = model.program
        names = {spec.value: spec.name for spec in program.weights}
        looked_up = {names[n.inputs[1]] for n in program.nodes if n.op == "embedding"}
        self._parts: dict[str, list[Part]] = {}
        self._reasons: dict[str, str] = {}
        own: dict[str, list[Part]] = {}
        for node in program.nodes:
            for name in (names[value] for value in node.inputs if value in names):
                if node.op != "linear" or name != names[node.inputs[1]]:
                    self._refuse(model, node, name)
                    continue
                # A head that is tied to the embedding is a module of its own.
                if name in looked_up:
                    self._parts[plain(node.name)] = [Part(node.name, name, None)]
                    continue
                place = model.source.hf_place(name)
                module = plain(place.tensors[0].removesuffix(".weight"))
                if place.convert is not None or not isinstance(place.tensor, str):
                    self._reasons[module] = self._reasons[plain(node.name)] = _REASONS["linear"]
                    continue
                self._parts.setdefault(module, []).append(Part(node.name, name, place.rows))
                own[plain(node.name)] = [Part(node.name, name, None)]
        # Names of the program are those of models that keep apart what this one fuses.
        for module, parts in own.items():
            self._parts.setdefault(module, parts)

    def find(self, module: str) -> list[Part]:
        """What a module is in the program; nothing where it cannot be adapted."""
        return self._parts.get(plain(module), [])

    def refusal(self, module: str) -> str:
        """Why a module cannot be adapted, and what to do about it."""
        name = plain(module)
        merge = "merge the adapter into the model (merge_and_unload of PEFT) and use that"
        if name in self._reasons:
            return f"{self._reasons[name]}; {merge}"
        if "experts" in name.split("."):
            return f"{_REASONS['grouped_linear']}; {merge}"
        if any(part in name for part in _OTHER_PARTS):
            return "it is not in the part of the model that reads and writes text; leave it out"
        shown = next(iter(self._parts), "none")
        return (
            f"the model has no layer of this name (they are named like {shown}); check that the "
            "adapter was made for this model"
        )

    def _refuse(self, model: Model, node: Node, name: str) -> None:
        if node.op == "grouped_linear":  # many tensors, which are told by their names
            return
        place = model.source.hf_place(name)
        for tensor in (*place.tensors, name):
            module = plain(tensor.removesuffix(".weight"))
            self._reasons[module] = _REASONS.get(node.op, _NO_LAYER)


def plain(module: str) -> str:
    """A module's path without what differs between versions of transformers."""
    parts = [part for part in module.split(".") if part not in _WRAPPERS]
    if parts[0] in ("layers", "embed_tokens"):  # of a model without its head
        parts.insert(0, "model")
    return ".".join("mlp" if part == "block_sparse_moe" else part for part in parts)


def running(program: Program, parts: list[Part]) -> list[tuple[str, Rows]]:
    """Weights of ``program``, which has the nodes of the model's but perhaps a head of its own."""
    names = {spec.value: spec.name for spec in program.weights}
    return [(names[program.node(part.node).inputs[1]], part.rows) for part in parts]
