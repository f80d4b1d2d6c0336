"""Counting where a GPU's user would wait, on a CPU."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts numbers that the CPU reads off a tensor, and those it writes into a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.writes = 0

    @property
    def count(self) -> int:
        return self.reads + self.writes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += "local_scalar" in str(function) or "nonzero" in str(function)
        self.writes += "lift_fresh" in str(function)
        return function(*args, **(kwargs or {}))
