"""The torch backend: any device that torch drives, behind the contract.

Every operator has a plain implementation, so it runs wherever torch does, also where Sartor's
native module is not built. Arithmetic is float32 on every device (torch keeps TF32 off unless a
program turns it on); keys and values are stored as the plan says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sartor.backends.base import Device, PackedWeights, WeightSource
from sartor.backends.torch.devices import list_devices, torch_device
from sartor.backends.torch.executable import TorchExecutable
from sartor.backends.torch.weights import TorchWeights, pack
from sartor.errors import UsageError
from sartor.graph import Capabilities, Program
from sartor.hardware import available_cores
from sartor.ops import CORE_OPERATORS, FUSED_OPERATORS
from sartor.plan import ExecutionPlan


class TorchBackend:
    """Every operator and format, on CUDA, XPU, MPS or torch's CPU."""

    name = "torch"

    def devices(self) -> list[Device]:
        return list_devices(self.name)

    def capabilities(self, device: str) -> Capabilities:
        place = torch_device(device, self.devices())
        return Capabilities(
            operators=frozenset(CORE_OPERATORS),
            fused=frozenset(FUSED_OPERATORS),
            weight_formats=frozenset({"dense", "affine", "lookup", "fp8"}),
            activations=frozenset({"fp32", "int8"}),
            kv_formats=frozenset({"bf16", "fp16", "fp32", "int8"}),
            adapters=True,
            copies=True,
            asynchronous=place.type == "cuda",
        )

    def pack(
        self, program: Program, source: WeightSource, plan: ExecutionPlan, cache: Path | None
    ) -> TorchWeights:
        """Copies the weights to ``plan.device``, the first one where it is "auto".

        ``cache`` is not used: packed files hold the layout of the CPU's kernels, and here the
        checkpoint's own is kept.
        """
        return pack(program, source, torch_device(plan.device, self.devices()))

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> TorchExecutable:
        assert isinstance(weights, TorchWeights)
        place = torch_device(device, self.devices())
        if place != weights.device:
            raise UsageError(
                f"torch backend: the weights lie on {weights.device}, not on {device}; pack them "
                "with that device in the plan"
            )
        plan = plan.replace(
            backend=self.name, device=device, threads=plan.threads or available_cores()
        )
        return TorchExecutable(program, weights, plan, taps)
