"""Bytes of optimizer state and of a step's temporaries: counted on a small parameter that takes a real step.

Low-bit optimizers are the exception: theirs compile their step or need a GPU, so their sizes are a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.training.stochastic import BUCKET, AdamWSR

# bytes a parameter: both moments, and their scales for each block of so many elements
_LOW_BIT = {"AdamW8bit": (2.0, 256), "Adam8bit": (2.0, 256), "PagedAdamW8bit": (2.0, 256), "AdamWFp8": (2.0, 256),
            "AdamFp8": (2.0, 256), "AdamW4bit": (1.0, 128), "Adam4bit": (1.0, 128)}  # fmt: skip
_TWO_SCALES = 8.0
_KEPT_FULL = 4096  # elements below which these libraries keep full-precision state
_UNKNOWN = 8.0
_PROBE = (64, 128)


@dataclass(frozen=True)
class OptimizerCost:
    """What an optimizer holds, and makes for a moment in its step."""

    name: str
    state: int
    temporaries: int
    note: str = ""


def optimizer_cost(
    factory: Callable[[Iterable], torch.optim.Optimizer], parameters: list[nn.Parameter], *, device: str, fp16: bool
) -> OptimizerCost:
    """Of the optimizer that `factory` makes, for trainable `parameters` (on any device, meta included)."""
    dtypes = {p.dtype for p in parameters}
    probes = {dtype: nn.Parameter(torch.zeros(_PROBE, dtype=dtype)) for dtype in dtypes}
    optimizer = factory([{"name": "weights", "params": list(probes.values())}])
    name = type(optimizer).__name__
    sizes = [p.numel() * p.element_size() for p in parameters]
    temporaries = sum(sizes) if device == "cuda" and not _fused(optimizer, fp16) else 0
    if isinstance(optimizer, AdamWSR):  # a bucket of parameters at a time, or the largest: five fp32 copies and noise
        numels = [p.numel() for p in parameters]
        temporaries = 24 * max(min(BUCKET, sum(numels)), max(numels, default=0))
    temporaries = 2 * max(sizes, default=0) if device == "cpu" else temporaries  # one parameter after the other
    if name in _LOW_BIT:
        per, block = _LOW_BIT[name]
        small = [p.numel() < _KEPT_FULL or p.numel() % block != 0 for p in parameters]
        full = sum(2 * size for size, is_small in zip(sizes, small, strict=True) if is_small)
        numel = sum(p.numel() for p, is_small in zip(parameters, small, strict=True) if not is_small)
        return OptimizerCost(name, full + round(numel * (per + _TWO_SCALES / block)), temporaries)
    try:
        per_dtype = _count(optimizer, probes)
    except Exception:  # anybody's class: whatever it raises, a plan must come out
        note = f"{name}: state unknown, {_UNKNOWN:.0f} bytes a parameter assumed"
        return OptimizerCost(name, round(_UNKNOWN * sum(p.numel() for p in parameters)), temporaries, note)
    return OptimizerCost(name, round(sum(per_dtype[p.dtype] * p.numel() for p in parameters)), temporaries)


def _count(optimizer: Any, probes: dict[torch.dtype, nn.Parameter]) -> dict[torch.dtype, float]:
    """Bytes of state a parameter after one step; step counters and the like do not grow with it."""
    for probe in probes.values():
        probe.grad = torch.zeros_like(probe)
    optimizer.step()
    found = {}
    for dtype, probe in probes.items():
        tensors = [t for t in optimizer.state[probe].values() if isinstance(t, Tensor) and t.numel() > 1]
        found[dtype] = sum(t.numel() * t.element_size() for t in tensors) / probe.numel()
    return found


def _fused(optimizer: Any, fp16: bool) -> bool:
    """Whether its step makes no copies of the parameters; Adam and AdamW are fused on CUDA unless told otherwise."""
    chosen = optimizer.defaults
    if chosen.get("fused") or type(optimizer).__name__ in _LOW_BIT:
        return True
    automatic = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and not fp16
    return automatic and chosen.get("fused") is None and chosen.get("foreach") is None
