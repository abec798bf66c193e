"""What a backend says of itself on one device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """Facts that passes, the engine and the plan read; nothing else tells backends apart.

    operators        core operators that it runs
    fused            optional fused operators that it wants the fusion pass to use
    weight_formats   names of weight families that it keeps packed: "dense", "affine", "lookup"
    activations      arithmetic of quantised linear layers: "fp32", "int8"
    kv_formats       storage of keys and values
    block_sizes      tokens a state block that its attention supports
    adapters         linear layers take low-rank adapters
    asynchronous     ``submit`` returns before the step is done, and a batch may name outputs of
                     the one before it: the engine prepares a step while another runs
    copies           steps copy blocks of paged state (``Batch.copies``): choices of one request
                     go on from a prompt that was computed once
    bitwise          results do not depend on company, chunking or threads
    row_tile         rows that linear layers multiply together: the engine fills whole tiles
    """

    operators: frozenset[str]
    fused: frozenset[str] = frozenset()
    weight_formats: frozenset[str] = frozenset({"dense"})
    activations: frozenset[str] = frozenset({"fp32"})
    kv_formats: frozenset[str] = frozenset({"fp32"})
    block_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)
    adapters: bool = False
    asynchronous: bool = False
    copies: bool = False
    bitwise: bool = False
    row_tile: int = 1
