"""The loop that llama.cpp and its fork share: batches, greedy choice, contexts by batch size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from protocol import LoopDriver, Tokens

CHUNK = 512
"""Tokens of a prompt that are computed at once."""


class LlamaDriver(LoopDriver):
    """``api`` is the module of C functions. A context serves one number of sequences."""

    api: Any
    context_tokens: int
    vocab: int

    def __init__(self) -> None:
        self._context: Any = None
        self._sequences = 0
        self._tokens: list[int] = []
        self._position = 0
        self._batch: Any = None

    @abstractmethod
    def make_context(self, sequences: int) -> Any:
        """A context for this many sequences of ``context_tokens`` each; None where it fails."""

    @abstractmethod
    def clear(self, context: Any) -> None:
        """Empties the KV cache."""

    def prepare(self, sequences: int) -> None:
        if sequences == self._sequences:
            return
        if self._context is not None:
            self.api.llama_free(self._context)
        self._sequences = 0
        self._context = self.make_context(sequences)
        if not self._context:
            raise MemoryError(f"no context for {sequences} sequences")
        self._sequences = sequences
        if self._batch is None:
            self._batch = self.api.llama_batch_init(CHUNK, 0, 1)

    def start(self, prompts: Sequence[Tokens]) -> None:
        self._tokens = []
        for sequence, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), CHUNK):
                part = prompt[begin : begin + CHUNK]
                last = begin + len(part) == len(prompt)
                for i, token in enumerate(part):
                    wanted = last and i == len(part) - 1
                    self._put(i, token, begin + i, sequence, wanted)
                self._decode_batch(len(part))
            self._tokens.append(self._choose(len(part) - 1))
        self._position = len(prompts[0])

    def step(self) -> None:
        for sequence, token in enumerate(self._tokens):
            self._put(sequence, token, self._position, sequence, True)
        self._decode_batch(len(self._tokens))
        self._tokens = [self._choose(i) for i in range(len(self._tokens))]
        self._position += 1

    def end(self) -> None:
        self.clear(self._context)

    def _put(self, index: int, token: int, position: int, sequence: int, output: bool) -> None:
        batch = self._batch
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = output

    def _decode_batch(self, tokens: int) -> None:
        self._batch.n_tokens = tokens
        code = self.api.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _choose(self, row: int) -> int:
        logits = self.api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
