"""WeightSQNR: how much of the weight's signal its low-bit copy keeps. Data-free.

SQNR = 10 log10(|W|^2 / |W - Q(W)|^2) in dB. A low one says that the weights do not fit the grid, so the score is -SQNR
at the candidate with the fewest bits. It says nothing of what the model makes of the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from kdqat.importance.base import Costs, ImportanceScorer, Measured, Units, candidates, check_unit, progress
from kdqat.importance.weights import Start, check_start, find_weights, quantized
from kdqat.models import SplitModel
from kdqat.spec import LayerScheme, Unit, scheme_names
from kdqat.types import Batch

_NO_NOISE = 1e-30  # as a share: 300 dB stand for a weight that the grid holds exactly


class WeightSQNR(ImportanceScorer):
    """Minus the SQNR in dB at the fewest bits; costs are noise as a share of the signal, |W - Q(W)|^2 / |W|^2.

    Args:
        schemes: candidates, one or more.
        start: scales of the copies: "rtn" from the range, "mse" those of least weight error.
        unit: "block" or "layer".
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, schemes: Sequence[str | LayerScheme | dict], *, start: Start = "mse", unit: Unit = "block"
    ) -> None:
        if not schemes:
            raise ValueError("WeightSQNR: give schemes to measure, e.g. [W4A16_G64, W2A16_ASYM_G64]")
        self.schemes = candidates(self, schemes)
        self.start, self.unit = check_start("WeightSQNR", start), check_unit(self, unit)

    @torch.no_grad()
    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        cost: Costs = {}
        names = scheme_names(list(self.schemes))
        for unit in progress(list(units), "weights"):
            weights = find_weights(split.model, units[unit]).values()
            signal = sum(float(weight.parameter.double().square().sum()) for weight in weights)
            cost[unit] = {}
            for name, scheme in names.items():
                noise = 0.0
                for weight in weights:
                    error = quantized(weight, scheme, self.start).double() - weight.parameter.double()
                    noise += float(error.square().sum())
                cost[unit][name] = noise / signal if signal else 0.0
        fewest = list(names)[-1]
        return Measured({unit: 10 * math.log10(max(costs[fewest], _NO_NOISE)) for unit, costs in cost.items()}, cost)
