"""The coverage guard: which share of a model's matmul weights stays in full precision, and was that meant?

Fused 3-D experts are no nn.Linear; quantizers that walk linears skip them in silence and ship a "4-bit" model that is
mostly bf16. Here everything that is not an embedding, a norm or a bias counts as matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from kdqat.quant.kinds import matmul_weights
from kdqat.quant.swap import fake_quant_layers


@dataclass(frozen=True)
class Coverage:
    """Matmul weights by what happens to them: numbers of parameters, and the names left in full precision."""

    quantized: int
    ignored: dict[str, int]
    missed: dict[str, int]

    @property
    def share_full_precision(self) -> float:
        """Share of matmul parameters that stay in full precision, 0 to 1."""
        left = sum(self.ignored.values()) + sum(self.missed.values())
        return left / max(self.quantized + left, 1)

    def __str__(self) -> str:
        left = ", ".join(self.ignored) if len(self.ignored) <= 4 else f"{len(self.ignored)} layers"
        return (
            f"{100 * (1 - self.share_full_precision):.1f} % of the matmul weights are fake-quantized; "
            f"left in full precision: {left or 'none'}"
        )


def measure_coverage(model: nn.Module, is_ignored: Callable[[str], bool]) -> Coverage:
    """Sort every matmul weight of a swapped model into quantized, ignored and missed.

    Args:
        model: with the plan applied.
        is_ignored: whether a layer name was deliberately left out.
    """
    quantized = 0
    ignored: dict[str, int] = {}
    missed: dict[str, int] = {}
    layers = fake_quant_layers(model)
    for owner, module in model.named_modules():
        for name, shape in matmul_weights(owner, module).items():
            if name in layers and layers[name].weight_fake_quantizer is not None:
                quantized += math.prod(shape)
            else:  # a module of an unknown kind is one name for all it owns
                own = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
                numel = own if name == owner else math.prod(shape)
                (ignored if is_ignored(name) else missed)[name] = numel
    return Coverage(quantized, ignored, missed)


def require_coverage(coverage: Coverage) -> None:
    """Stop if matmul weights were missed without being ignored.

    Raises:
        ValueError: naming the first of them and what to do.
    """
    if coverage.missed:
        name, more = next(iter(coverage.missed)), len(coverage.missed) - 1
        total = coverage.quantized + sum(coverage.ignored.values()) + sum(coverage.missed.values())
        share = 100 * sum(coverage.missed.values()) / total
        raise ValueError(
            f"{share:.1f} % of the matmul weights would silently stay in full precision: {name}"
            f"{f' and {more} more' if more else ''}; put them into the plan, or into its `ignore` if that is meant"
        )
