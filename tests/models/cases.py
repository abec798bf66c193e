"""Every tiny model whose logits are compared with those of transformers."""

from __future__ import annotations

import tiny_experts
import tiny_hybrids
import tiny_models

TABLES = (
    tiny_models.CASES,
    tiny_experts.CASES,
    tiny_hybrids.DENSE_CASES,
    tiny_hybrids.HYBRID_CASES,
)
CASES = {name: case for table in TABLES for name, case in table.items()}
assert len(CASES) == sum(map(len, TABLES)), "two cases have one name"
