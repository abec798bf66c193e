"""Sartor, measured by the code of ``sartor bench`` itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from protocol import Answer, Driver, Load, Tokens, serve

from sartor import __version__
from sartor.bench import phases
from sartor.bench.ceiling import measure_ceilings, phase_work
from sartor.bench.profile import profiled
from sartor.engine.engine import Engine
from sartor.engine.load import load, make_engine
from sartor.errors import SartorError
from sartor.plan import ExecutionPlan
from sartor.store import sartor_home


class SartorDriver(Driver):
    def load(self, request: Load) -> Answer:
        plan = ExecutionPlan(
            threads=request.threads,
            prefix_cache=False,
            max_sequences=request.sequences,
            # Twice: while some of a batch decode, the prompts of the others must go on.
            max_batch_tokens=max(phases.PROMPT_TOKENS, 2 * request.sequences),
            max_context=request.context,
        ).replace(**request.plan)
        path = Path(request.model)
        loaded = load(path, plan, path.stem, sartor_home() / "packed")
        self._engine: Engine = make_engine(loaded)
        used = loaded.plan
        settings = [f"{used.backend} {used.isa}, {used.activation} x {used.kv} state"]
        settings += [f"{field}={getattr(used, field)}" for field in request.plan]
        return {
            "version": __version__,
            "settings": ", ".join(settings),
            "bits_per_weight": loaded.bits_per_weight,
        }

    def single(self, seed: int, prompt: Tokens, steps: int) -> Answer:
        self._check([prompt], seed, phases.PROMPT_TOKENS, steps, phases.DECODE_TOKENS)
        found = phases.single(self._engine, seed)
        return {
            "prompt_seconds": phases.PROMPT_TOKENS / found.prompt,
            "decode_seconds": phases.DECODE_TOKENS / found.decode,
        }

    def batch(self, seed: int, prompts: Sequence[Tokens], steps: int) -> Answer:
        self._check(prompts, seed, phases.BATCH_PROMPT_TOKENS, steps, phases.BATCH_DECODE_TOKENS)
        rate = phases.batch(self._engine, len(prompts), seed)
        return {"decode_seconds": len(prompts) * phases.BATCH_DECODE_TOKENS / rate}

    def ceilings(self, seconds: float) -> Answer:
        found = measure_ceilings(self._engine.executable, seconds)
        if found is None:
            raise SartorError("this backend has no way to measure ceilings")
        return dataclasses.asdict(found)

    def work(self, batches: Sequence[int]) -> Answer:
        executable = self._engine.executable
        found = phase_work(profiled(executable).work(), batches, executable.plan.max_batch_tokens)
        return {name: dataclasses.asdict(phase) for name, phase in found.items()}

    def _check(
        self, prompts: Sequence[Tokens], seed: int, length: int, steps: int, own_steps: int
    ) -> None:
        """The phases make their prompts from the seed: they must be those that the peers get."""
        tokenizer = self._engine.tokenizer
        vocab = min(self._engine.executable.program.vocab, tokenizer.vocab_size)
        special = tokenizer.special_ids | tokenizer.eos_ids
        for i, prompt in enumerate(prompts):
            if tuple(prompt) != phases.synthetic_prompt(seed + i, length, vocab, special):
                raise SartorError("the prompts are not those of sartor bench for this seed")
        if steps != own_steps:
            raise SartorError(f"sartor bench decodes {own_steps} steps here, not {steps}")


if __name__ == "__main__":
    serve(SartorDriver())
