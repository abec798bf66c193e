"""How the command line spells what Python calls otherwise: errors name what the user wrote."""

from __future__ import annotations

_PLAN = {
    "max_context": "--context",
    "threads": "--threads",
    "backend": "--backend",
    "device": "--device",
    "kv": "--kv",
    "activation": "--activation",
    "head_bits": "--head-bits",
    "isa": "--isa",
}
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "stop",
)
_OWN = {
    "run": {name: f"--{name.replace('_', '-')}" for name in _SAMPLING},
    "serve": {
        "max_sequences": "--max-sequences",
        "request_seconds": "--max-seconds",
        "prompt_tokens": "--max-prompt-tokens",
        "max_tokens": "--max-tokens",
        "body_bytes": "--max-body-bytes",
        "connections": "--max-connections",
    },
    "bench": {"repeats": "--repeats", "batches": "--batch"},
    "eval": {"positions": "--positions"},
}


def spelling(command: str) -> dict[str, str]:
    """Options of a command by the names that fields have in Python."""
    return _PLAN | _OWN.get(command, {})
