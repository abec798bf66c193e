"""Sampling on the device, every output row at once: the meaning of :mod:`sartor.ops.sampling`.

What the rows of a batch ask for is known to the host, so steps that are all greedy, or that cut
nothing off, skip the work. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sartor.graph import Batch, Node

if TYPE_CHECKING:
    from sartor.backends.torch.step import Step

Array = npt.NDArray[Any]
PREFIX = "sampling."
_PARAMETERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True)
class SamplingShape:
    """What the rows of a step ask for, as far as it changes the work.

    draws      some row has a temperature
    cuts       some row has a top-k, top-p or min-p, for which rows are sorted
    history    tokens that count for penalties, over all rows; biases likewise
    reports    rows that want log probabilities, and ``alternatives`` the most that one wants
    """

    draws: bool = False
    cuts: bool = False
    history: int = 0
    biases: int = 0
    reports: int = 0
    alternatives: int = 0

    @property
    def plain(self) -> bool:
        """Whether all sizes are those of the rows, so that a graph can hold it."""
        return not (self.history or self.biases or self.reports)


@dataclass(frozen=True)
class Sampled:
    """``tokens [R]`` int64; for the rows that want them, in order, ``chosen`` log probabilities
    and the best ``alternatives``, ids and log probabilities."""

    tokens: Tensor
    chosen: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


def lay_out_sampling(batch: Batch) -> tuple[SamplingShape, dict[str, Array]]:
    """The arrays that sampling reads, and their shape."""
    rows = batch.sampling
    drawn = rows["temperature"] > 0
    cut = (rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0)
    wanting = np.flatnonzero(rows["logprobs"] >= 0)
    shape = SamplingShape(
        draws=bool(drawn.any()),
        cuts=bool((drawn & cut).any()),
        history=len(batch.history.values),
        biases=len(batch.bias_tokens.values),
        reports=len(wanting),
        alternatives=int(rows["logprobs"].max(initial=0)),
    )
    arrays: dict[str, Array] = {}
    if shape.draws:
        counter = rows["choice"].astype(np.int64) << 32 | rows["position"].astype(np.int64)
        arrays |= {"seed": rows["seed"].view(np.int64), "counter": counter}
        arrays["top_k"] = rows["top_k"].astype(np.int64)
    if shape.draws or shape.history:
        arrays |= {name: rows[name] for name in _PARAMETERS}
    if shape.history:
        arrays["seen"], own = _flat(batch.history.values, batch.history.starts)
        at = np.arange(len(own)) - batch.history.starts[own]
        arrays["written"] = (at >= rows["prompt_length"][own]).astype(np.float32)
    if shape.biases:
        arrays["biased"], _ = _flat(batch.bias_tokens.values, batch.bias_tokens.starts)
        arrays["bias"] = batch.bias_values.values.astype(np.float32)
    if shape.reports:
        arrays["reports"] = wanting
    return shape, {PREFIX + name: array for name, array in arrays.items()}


def _flat(values: Array, starts: Array) -> tuple[Array, Array]:
    """Token ids and their rows as int64 pairs ``[2, n]``, and the rows by themselves."""
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return np.stack([rows, values]).astype(np.int64), rows


def sample(step: Step, node: Node) -> Tensor:
    assert step.sampling is not None
    step.sampled = draw(step.x(node.inputs[0]), step.sampling, step.arrays)
    return step.sampled.tokens


def draw(logits: Tensor, shape: SamplingShape, arrays: Mapping[str, Tensor]) -> Sampled:
    """Samples ``logits [R, vocab]``; ``arrays`` as :func:`lay_out_sampling` names them."""
    given = {name.removeprefix(PREFIX): a for name, a in arrays.items() if name.startswith(PREFIX)}
    adjusted = _adjust(logits, shape, given)
    tokens = adjusted.argmax(dim=1)
    if shape.draws:
        drawn = _draw(adjusted, given, cuts=shape.cuts)
        tokens = torch.where(given["temperature"] > 0, drawn, tokens)
    if not shape.reports:
        return Sampled(tokens)
    rows = given["reports"]
    raw = logits.index_select(0, rows)
    shifted = raw - raw.amax(dim=1, keepdim=True)
    total = shifted.to(_exact(logits.device)).exp().sum(dim=1, keepdim=True)
    logprobs = shifted - total.log().to(shifted.dtype)
    chosen = logprobs.gather(1, tokens.index_select(0, rows)[:, None])[:, 0]
    # A stable sort: of equal ones the lower id comes first.
    values, ids = logprobs.sort(dim=1, descending=True, stable=True)
    return Sampled(tokens, chosen, ids[:, : shape.alternatives], values[:, : shape.alternatives])


def _exact(device: torch.device) -> torch.dtype:
    """What the reference computes in. Apple's GPUs have no float64: rare results differ there."""
    return torch.float32 if device.type == "mps" else torch.float64


def _adjust(logits: Tensor, shape: SamplingShape, given: Mapping[str, Tensor]) -> Tensor:
    """Penalties and bias."""
    if shape.history:
        rows, ids = given["seen"]
        flat = rows * logits.shape[1] + ids
        nothing = torch.zeros(logits.numel(), device=logits.device)
        seen = nothing.scatter_add(0, flat, torch.ones_like(given["written"])).view_as(logits)
        counts = nothing.scatter_add(0, flat, given["written"]).view_as(logits)
        penalty = given["repetition_penalty"][:, None]
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen > 0, penalised, logits)
        presence = torch.where(counts > 0, given["presence_penalty"][:, None], 0.0)
        logits = logits - presence - given["frequency_penalty"][:, None] * counts
    if shape.biases:
        rows, ids = given["biased"]
        flat = rows * logits.shape[1] + ids
        logits = logits.reshape(-1).scatter_add(0, flat, given["bias"]).view_as(logits)
    return logits


def _draw(logits: Tensor, given: Mapping[str, Tensor], *, cuts: bool) -> Tensor:
    """One token of each row by its temperature, top-k, top-p, min-p and random number."""
    exact = _exact(logits.device)
    temperature = torch.where(given["temperature"] > 0, given["temperature"], 1.0).to(exact)
    scaled = logits.to(exact) / temperature[:, None]
    weights = (scaled - scaled.amax(dim=1, keepdim=True)).exp()
    if cuts:
        order = logits.sort(dim=1, descending=True, stable=True).indices
        top_k = given["top_k"][:, None]
        ranks = torch.arange(logits.shape[1], device=logits.device)
        ordered = weights.gather(1, order)
        ordered = torch.where((top_k <= 0) | (ranks < top_k), ordered, 0.0)
        shares = ordered / ordered.sum(dim=1, keepdim=True)
        before = shares.cumsum(dim=1) - shares
        keep = (before < given["top_p"][:, None]) & (ordered > 0)
        keep = keep & (shares >= given["min_p"][:, None] * shares[:, :1]) | (ranks == 0)
        weights = torch.where(torch.zeros_like(keep).scatter(1, order, keep), weights, 0.0)
    sums = weights.cumsum(dim=1)
    target = uniform(given["seed"], given["counter"]).to(exact)[:, None] * sums[:, -1:]
    index = torch.searchsorted(sums, target, right=True)[:, 0]
    # Rounding may put the target at the end of the sum: the last token that counts is meant.
    last = (weights > 0).to(torch.int64).cumsum(dim=1).argmax(dim=1)
    return torch.minimum(index, last)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """:func:`sartor.ops.sampling.uniform` over int64 tensors, whose products wrap as unsigned
    ones do; ``counter`` is choice * 2**32 + position."""
    bits = _shifted(_mix64(_mix64(seed) ^ counter), 11)
    exact = _exact(seed.device)
    return bits.to(exact) * 2.0**-53


def _mix64(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, count: int) -> Tensor:
    """A logical shift to the right: what comes in from the left is 0."""
    return (x >> count) & ((1 << (64 - count)) - 1)
