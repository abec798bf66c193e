"""Sampling the output rows of a batch: the reference for every backend."""

from __future__ import annotations

import numpy as np

from sartor.graph import Batch, Ragged, StepOutput
from sartor.ops.sampling import SampleRow, log_softmax, sample_row
from sartor.ops.weights import F32


def sample(logits: F32, batch: Batch) -> StepOutput:
    """Samples every output row of a batch and reports log probabilities."""
    tokens, chosen, top_ids, top_values = [], [], [], []
    for r, row in enumerate(batch.sampling):
        history = batch.history.values[batch.history.starts[r] : batch.history.starts[r + 1]]
        span = slice(batch.bias_tokens.starts[r], batch.bias_tokens.starts[r + 1])
        token = sample_row(
            logits[r],
            SampleRow(
                temperature=float(row["temperature"]),
                top_k=int(row["top_k"]),
                top_p=float(row["top_p"]),
                min_p=float(row["min_p"]),
                repetition_penalty=float(row["repetition_penalty"]),
                presence_penalty=float(row["presence_penalty"]),
                frequency_penalty=float(row["frequency_penalty"]),
                seed=int(row["seed"]),
                choice=int(row["choice"]),
                position=int(row["position"]),
                prompt_length=int(row["prompt_length"]),
                history=tuple(int(t) for t in history),
                bias=tuple(
                    zip(
                        (int(t) for t in batch.bias_tokens.values[span]),
                        (float(b) for b in batch.bias_values.values[span]),
                        strict=True,
                    )
                ),
            ),
        )
        tokens.append(token)
        wanted = int(row["logprobs"])
        if wanted < 0:
            chosen.append(0.0)
            top_ids.append(np.zeros(0, np.int32))
            top_values.append(np.zeros(0, np.float32))
            continue
        logprobs = log_softmax(logits[r])
        order = np.lexsort((np.arange(len(logprobs)), -logprobs))[:wanted]
        chosen.append(float(logprobs[token]))
        top_ids.append(order.astype(np.int32))
        top_values.append(logprobs[order])
    return StepOutput(
        np.asarray(tokens, np.int32),
        np.asarray(chosen, np.float32),
        Ragged.of(list(top_ids), np.int32),
        Ragged.of(list(top_values), np.float32),
    )
