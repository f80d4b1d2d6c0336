"""Fisher: how steeply the loss answers to a unit's weights, by the diagonal of the empirical Fisher information.

F_i = T * E[g_i^2] with g the gradient of a row's mean cross-entropy over its T tokens (labels from the text, hence
"empirical"); as if tokens were independent. A perturbation D of the weights then costs 1/2 sum F_i D_i^2, the quadratic
form that SqueezeLLM (https://arxiv.org/abs/2306.07629) weighs its clusters by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kdqat.importance.base import Costs, ImportanceScorer, Measured, Units, candidates, check_unit, gain, progress
from kdqat.importance.gradients import differentiable, require_language_model, row_loss, rows_of
from kdqat.importance.weights import Start, check_start, find_weights, quantized
from kdqat.models import SplitModel
from kdqat.spec import LayerScheme, Unit, scheme_names
from kdqat.types import Batch


class Fisher(ImportanceScorer):
    """With schemes: 1/2 sum F (W - Q(W))^2 for each, and importance is what the most bits save. Without: the mean of F.

    Takes one backward pass a row, and two more copies of the scored weights.

    Args:
        schemes: candidates; empty: no costs.
        start: scales of the copies: "rtn" from the range, "mse" those of least weight error.
        unit: "block" or "layer".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init__(
        self, schemes: Sequence[str | LayerScheme | dict] = (), *, start: Start = "mse", unit: Unit = "block"
    ) -> None:
        self.schemes = candidates(self, schemes)
        self.start, self.unit = check_start("Fisher", start), check_unit(self, unit)

    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        require_language_model("Fisher", split)
        weights = find_weights(split.model, [name for layers in units.values() for name in layers])
        squares = squared_gradients(split, [weight.parameter for weight in weights.values()], batches)
        fisher = dict(zip(weights, squares, strict=True))
        if not self.schemes:
            numel = {unit: sum(fisher[name].numel() for name in layers) for unit, layers in units.items()}
            sums = {unit: sum(float(fisher[n].sum(dtype=torch.float64)) for n in units[unit]) for unit in units}
            return Measured({unit: sums[unit] / numel[unit] for unit in units})
        cost: Costs = {}
        for unit, layers in units.items():
            cost[unit] = {}
            for key, scheme in scheme_names(list(self.schemes)).items():
                total = 0.0
                for name in layers:
                    error = quantized(weights[name], scheme, self.start).float() - weights[name].parameter.detach()
                    total += 0.5 * float((fisher[name] * error.square()).sum(dtype=torch.float64))
                cost[unit][key] = total
        return Measured({unit: gain(costs, self.schemes) for unit, costs in cost.items()}, cost)


def squared_gradients(
    split: SplitModel, chosen: Sequence[torch.nn.Parameter], batches: Sequence[Batch]
) -> list[Tensor]:
    """T * mean over rows of the squared gradient of the row's mean cross-entropy, fp32, for each of `chosen`."""
    rows = rows_of(batches)
    if not rows:
        raise ValueError("score: the text has no row of two tokens or more")
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in chosen]
    with torch.enable_grad(), differentiable(split, chosen):
        for row in progress(rows, "gradients"):
            loss, num = row_loss(split, row)
            for total, grad in zip(sums, torch.autograd.grad(loss, chosen), strict=True):
                total.addcmul_(grad.float(), grad.float(), value=num / len(rows))
    return sums
