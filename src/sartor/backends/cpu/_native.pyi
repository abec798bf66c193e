"""Types of the native module (src/sartor/native/binding*.cpp)."""

from collections.abc import Sequence
from typing import Any

CHUNK: int
LANES: int
ROW_TOPS: list[int]
TASK_ROWS: int
_Peak = tuple[float, float, float]
_Variant = tuple[int, bool, int, int]

def most_blocks(rows: int) -> int: ...
def linear_traits(isa: str) -> tuple[int, int, bool]: ...
def usable_paths() -> list[str]: ...
def pack_codes(
    pool: ThreadPool, codes: Any, n: int, k: int, k_padded: int, bits: int, zero: int, out: Any
) -> None: ...
def pack_scales(
    values: Any, n: int, groups: int, padded_groups: int, factor: float, out: Any
) -> int: ...
def pack_dense(
    pool: ThreadPool, values: Any, n: int, k: int, k_padded: int, element_bytes: int, out: Any
) -> None: ...
def matrix(
    storage: str,
    n: int,
    k: int,
    k_padded: int,
    codes: Any,
    scales: Any | None,
    offsets: Any | None,
    bits: int,
    group: int,
    zero: int,
    scale_multiplier: float,
    offset_multiplier: float,
    table: Sequence[int],
    experts: int = 1,
    permutation: Any | None = None,
) -> Matrix: ...
def measure_ceilings(
    pool: ThreadPool, isa: str, own_cores: bool, seconds: float
) -> tuple[float, _Peak, _Peak, _Peak]: ...
def uniform(seed: int, choice: int, position: int) -> float: ...

class Matrix: ...

class ThreadPool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

class Program:
    def __init__(
        self,
        *,
        vocab: int,
        block_size: int,
        int8_activations: bool,
        taps: Sequence[str],
        embedding: int = -1,
    ) -> None: ...
    def add_value(self, width: int, rows: str) -> None: ...
    def add_matrix(self, matrix: Matrix) -> int: ...
    def add_vector(self, vector: Any) -> int: ...
    def add_rope(
        self, dim: int, interleaved: bool, factor: float, inverse_frequencies: Any
    ) -> None: ...
    def add_state(
        self, kv: str, kv_heads: int, head_dim: int, value_dim: int, group: int
    ) -> None: ...
    def add_recurrent_state(self, floats: int, group: int) -> None: ...
    def add_instruction(
        self,
        op: int,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        matrices: Sequence[int],
        vectors: Sequence[int],
        fields: dict[str, Any],
    ) -> None: ...

class Sampler:
    """The sampler alone; it may write to ``logits``, but leaves them as they were."""

    def __init__(self, isa: str) -> None: ...
    def run(
        self,
        logits: Any,
        sampling: Any,
        history: Any,
        history_starts: Any,
        bias_tokens: Any,
        bias_starts: Any,
        bias_values: Any,
        repeats: int = 1,
    ) -> tuple[tuple[Any, Any, Any, Any, Any], Any]:
        """Samples every row ``repeats`` times, in turns.

        Tokens, their log probabilities, alternatives, theirs, where those of a row start; and
        the least seconds of the thread's clock that each row took.
        """

class Executor:
    def __init__(self, program: Program, pool: ThreadPool, isa: str) -> None: ...
    def block_bytes(self, group: int) -> int: ...
    def allocate_state(self, blocks: Sequence[int]) -> None: ...
    def load_adapter(self, number: int, layers: Sequence[tuple[int, Matrix, Matrix]]) -> None: ...
    def drop_adapter(self, number: int) -> None: ...
    def run(self, *arrays: Any) -> tuple[Any, Any, Any, Any, Any, list[Any], Any]: ...
    def record(self, name: str, tolerance: float, expected: Any, *arrays: Any) -> bytes: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    def set_variant(self, instruction: int, bucket: int, variant: _Variant) -> None: ...
    def time_linears(
        self, instructions: Sequence[int], rows: int, variant: _Variant
    ) -> list[float]: ...
    def profile(self, on: bool) -> None: ...
    def seconds(self) -> list[tuple[str, float]]: ...
