"""One running choice of a request: its tokens, and how far its state is computed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np

from sartor.engine.adapter import Adapter
from sartor.engine.embedding import EmbeddedRows
from sartor.engine.output import OutputStream
from sartor.engine.prefix import Node
from sartor.engine.request import Request
from sartor.graph.batch import I32


class Sequence:
    """Tokens known so far, of which the state holds the first ``computed`` (or will, when the
    steps submitted so far are done).

    Everything else follows: what is left to compute is prompt, replayed tokens or the token
    drawn last, whichever; after a preemption ``computed`` is 0 and the rest goes by itself.

    The cache writes the fields from ``slot`` on. The sequence holds blocks ``[first[g], end)``
    of each state group g, in row ``slot`` of that group's table; the first ``shared`` of them
    are in the prefix tree, and ``node`` is the last of these. ``start`` tokens were computed
    when it got the slot. ``copied`` has the block of each group whose content goes into the first
    block of its own before its first step; empty where it starts with whole blocks.
    """

    __slots__ = (
        "_tokens",
        "adapter",
        "bias_tokens",
        "bias_values",
        "computed",
        "copied",
        "embedded",
        "end",
        "first",
        "key",
        "length",
        "limit",
        "needs_history",
        "node",
        "order",
        "priority",
        "request",
        "root",
        "share",
        "shared",
        "slot",
        "start",
        "stream",
        "tenant",
        "waits_for",
    )

    def __init__(
        self,
        request: Request,
        stream: OutputStream,
        order: int,
        limit: int,
        root: Hashable,
        embedded: EmbeddedRows | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """``limit`` is the longest that prompt and output may get, ``root`` the prefix key,
        ``embedded`` the vectors among the prompt."""
        self.request = request
        self.stream = stream
        self.order = order
        self.priority = request.priority
        self.tenant = request.tenant
        self.share = request.share
        self.key = (-request.priority, order)
        self.limit = limit
        self.root = root
        self.embedded = embedded
        self.adapter = adapter
        emitted = request.emitted[stream.choice] if request.emitted else ()
        self.length = len(request.prompt) + len(emitted)
        self._tokens = np.empty(min(limit, self.length + 256), np.int32)
        self._tokens[: self.length] = request.prompt + emitted
        self.computed = 0
        params = request.params
        self.needs_history = params.needs_history
        self.bias_tokens = np.array(list(params.logit_bias.keys()), np.int32)
        self.bias_values = np.array(list(params.logit_bias.values()), np.float32)
        self.waits_for: tuple[Sequence, int] | None = None
        """Who computes the next block of its prefix, and how long that one is then shared."""
        self.slot = -1
        self.start = 0
        self.end = 0
        self.first: list[int] = []
        self.shared = 0
        self.copied: tuple[int, ...] = ()
        self.node: Node | None = None

    @property
    def tokens(self) -> I32:
        """All known tokens, int32 ``[length]``; a view."""
        return self._tokens[: self.length]

    def put(self, position: int, token: int) -> None:
        """A drawn token: a new one, or one that was expected."""
        if position < self.length:
            self._tokens[position] = token
            return
        if self.length == len(self._tokens):
            self._tokens = np.resize(self._tokens, min(self.limit, 2 * self.length))
        self._tokens[self.length] = token
        self.length += 1

    def expect(self, row: int) -> None:
        """The next token will be output ``row`` of the step in flight, and until it is known it
        goes by this name (see :class:`~sartor.graph.batch.Batch`), so that a step can be built
        upon it. Not where the host needs the token first, nor where it is the last by length.
        """
        if not self.needs_history and self.length + 1 < self.limit:
            self.put(self.length, -1 - row)

    def block_key(self, index: int, block_size: int) -> bytes:
        """The tokens of one whole block, as the prefix tree compares them, and a digest of the
        vectors among them."""
        start, stop = index * block_size, (index + 1) * block_size
        key = self._tokens[start:stop].tobytes()
        return key if self.embedded is None else key + self.embedded.digest(start, stop)

    def begins_like(self, other: Sequence, length: int, block_size: int) -> bool:
        """Whether the first ``length`` tokens (whole blocks) of both are the same."""
        if self.embedded is None and other.embedded is None:
            # The last block first: what begins alike mostly differs there.
            last = length - block_size
            one, two = self._tokens, other._tokens
            return np.array_equal(one[last:length], two[last:length]) and np.array_equal(
                one[:last], two[:last]
            )
        return all(
            self.block_key(index, block_size) == other.block_key(index, block_size)
            for index in reversed(range(length // block_size))
        )

    def block_keys(self, block_size: int) -> Iterator[bytes]:
        """Keys of the blocks whose state may come from elsewhere: the last token is always
        computed, because its logits are wanted."""
        for index in range((self.length - 1) // block_size):
            yield self.block_key(index, block_size)
