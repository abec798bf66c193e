"""What an adapter adds to one linear layer: the optional low-rank input of the operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LowRank:
    """``y += (x @ down.T) @ up.T`` (LoRA, arXiv:2106.09685).

    ``down`` float32 ``[r, K]``, ``up`` float32 ``[N, r]`` with the adapter's scale folded in.
    """

    down: npt.NDArray[np.float32]
    up: npt.NDArray[np.float32]

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes
