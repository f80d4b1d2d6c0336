"""HessianTrace: how curved the loss is in a unit's weights, as HAWQ measures it (https://arxiv.org/abs/1911.03852).

Hutchinson's estimate at the level of weights: with v of random signs, v^T H v is tr(H) on average, and H v comes from a
second backward pass through g . v. One v for all weights at once: what other units add to a unit's estimate has mean 0,
and is noise that more probes take away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdqat.importance.base import Costs, ImportanceScorer, Measured, Units, candidates, check_unit, gain, progress
from kdqat.importance.gradients import differentiable, require_language_model, row_loss, rows_of
from kdqat.importance.weights import Start, check_start, find_weights, quantized
from kdqat.models import SplitModel
from kdqat.spec import LayerScheme, Unit, scheme_names
from kdqat.types import Batch


class HessianTrace(ImportanceScorer):
    """With schemes: 1/2 mean trace * |W - Q(W)|^2 for each, and importance is what the most bits save.

    Without: the mean trace, tr(H) / number of weights, of the cross-entropy of the text.

    Takes `num_probes` double backward passes a row: short rows, and a small model.

    Args:
        schemes: candidates; empty: no costs.
        num_probes: random vectors a row.
        seed: of the vectors.
        start: scales of the copies: "rtn" from the range, "mse" those of least weight error.
        unit: "block" or "layer".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init__(
        self,
        schemes: Sequence[str | LayerScheme | dict] = (),
        *,
        num_probes: int = 4,
        seed: int = 0,
        start: Start = "mse",
        unit: Unit = "block",
    ) -> None:
        if num_probes < 1:
            raise ValueError(f"HessianTrace: num_probes must be at least 1, not {num_probes}")
        self.schemes, self.num_probes, self.seed = candidates(self, schemes), num_probes, seed
        self.start, self.unit = check_start("HessianTrace", start), check_unit(self, unit)

    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        require_language_model("HessianTrace", split)
        weights = find_weights(split.model, [name for layers in units.values() for name in layers])
        chosen = [weight.parameter for weight in weights.values()]
        traces = dict(zip(weights, hutchinson(split, chosen, batches, self.num_probes, self.seed), strict=True))
        numel = {unit: sum(weights[name].parameter.numel() for name in layers) for unit, layers in units.items()}
        mean = {unit: sum(traces[name] for name in layers) / numel[unit] for unit, layers in units.items()}
        if not self.schemes:
            return Measured(mean)
        cost: Costs = {}
        for unit, layers in units.items():
            cost[unit] = {}
            for key, scheme in scheme_names(list(self.schemes)).items():
                copies = ((quantized(weights[name], scheme, self.start), weights[name].parameter) for name in layers)
                error = sum(float((copy.double() - weight.detach().double()).square().sum()) for copy, weight in copies)
                cost[unit][key] = 0.5 * mean[unit] * error
        return Measured({unit: gain(costs, self.schemes) for unit, costs in cost.items()}, cost)


def hutchinson(
    split: SplitModel, chosen: Sequence[torch.nn.Parameter], batches: Sequence[Batch], num_probes: int, seed: int
) -> list[float]:
    """Estimates of tr(d2 loss / dW2) for each of `chosen`; the loss is the mean over rows of their cross-entropy."""
    rows = rows_of(batches)
    if not rows:
        raise ValueError("score: the text has no row of two tokens or more")
    generator = torch.Generator().manual_seed(seed)
    sums = [0.0] * len(chosen)
    # the fused attention kernels have no second derivative
    with torch.enable_grad(), differentiable(split, chosen), sdpa_kernel(SDPBackend.MATH):
        for row in progress(rows, "Hessian"):
            loss, _ = row_loss(split, row)
            grads = torch.autograd.grad(loss, chosen, create_graph=True)
            for probe in range(num_probes):
                signs = [_signs(parameter, generator) for parameter in chosen]
                product = sum((g * v).sum() for g, v in zip(grads, signs, strict=True))
                last = probe == num_probes - 1
                curved = torch.autograd.grad(product, chosen, retain_graph=not last)  # type: ignore[arg-type]
                for i, (v, hv) in enumerate(zip(signs, curved, strict=True)):
                    sums[i] += float((v * hv).sum(dtype=torch.float64))
    return [total / (len(rows) * num_probes) for total in sums]


def _signs(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """-1 and 1, the same on every device."""
    signs = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(parameter.device, parameter.dtype)
