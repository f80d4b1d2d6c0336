"""ZD, Z-score Distribution (https://arxiv.org/abs/2406.17415): which share of the weights is much larger than average.

ZD = #{z > 1} / N with z = (w - mean) / std over a block's weights; *lower* is more important in the paper, so the score
is -ZD. Normal weights have 0.1587 (two-sided 0.3173); heavy tails give less, so it finds tails. It needs no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kdqat.importance.base import ImportanceScorer, Measured, Units, check_unit
from kdqat.importance.weights import find_weights
from kdqat.models import SplitModel
from kdqat.spec import Unit
from kdqat.types import Batch

Sides = Literal["one_sided", "two_sided"]


class ZD(ImportanceScorer):
    """Minus the share of weights more than one standard deviation above the mean.

    Args:
        sides: "one_sided" counts z > 1, as the paper; "two_sided" |z| > 1.
        pooled: mean and deviation over all the weights of a block; False: of each layer, and the mean of their shares.
        unit: "block" or "layer".
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, sides: Sides = "one_sided", pooled: bool = True, unit: Unit = "block") -> None:
        if sides not in get_args(Sides):
            raise ValueError(f"ZD: sides is {' or '.join(get_args(Sides))}, not {sides!r}")
        self.sides, self.pooled, self.unit = sides, pooled, check_unit(self, unit)

    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        found = {}
        for name, layers in units.items():
            weights = [weight.matrix for weight in find_weights(split.model, layers).values()]
            pools = [weights] if self.pooled else [[weight] for weight in weights]
            shares = [share_of_large(pool, two_sided=self.sides == "two_sided") for pool in pools]
            found[name] = -sum(shares) / len(shares)
        return Measured(found)


def share_of_large(weights: Sequence[Tensor], *, two_sided: bool = False) -> float:
    """#{z > 1} / N over all `weights`, sample standard deviation, sums in float64; two-sided: #{|z| > 1} / N."""
    num = sum(weight.numel() for weight in weights)
    mean = sum(float(weight.sum(dtype=torch.float64)) for weight in weights) / num
    square = sum(float((weight.double() - mean).square().sum()) for weight in weights)
    std = (square / max(num - 1, 1)) ** 0.5
    count = 0
    for weight in weights:
        above = weight.double() - mean
        count += int(((above.abs() if two_sided else above) > std).sum())
    return count / num
