"""LIM, Layer Input Modification (https://arxiv.org/abs/2406.17415): how much a block turns its input.

LIM = -cos(input, output) of a block, in [-1, 1]; higher is more important, so the score is LIM itself. How the paper
averages is not published; per token it is ShortGPT's Block Influence minus 1 (https://arxiv.org/abs/2403.03853).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kdqat.calibrate import stream_blocks
from kdqat.calibrate.capture import token_mask
from kdqat.importance.base import ImportanceScorer, Measured, Units, check_unit
from kdqat.models import SplitModel
from kdqat.spec import Unit
from kdqat.types import Batch

Aggregate = Literal["per_token", "per_sample", "flattened"]


class LIM(ImportanceScorer):
    """Negative cosine between what goes into a block and what comes out.

    Args:
        aggregate: "per_token": a cosine for each token, then the mean; "per_sample": a row's tokens are one vector;
            "flattened": all the text is one vector.
        unit: "block"; a layer's input and output are of different widths.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    units: ClassVar[tuple[Unit, ...]] = ("block",)

    def __init__(self, *, aggregate: Aggregate = "per_token", unit: Unit = "block") -> None:
        if aggregate not in get_args(Aggregate):
            raise ValueError(f"LIM: aggregate is {', '.join(get_args(Aggregate))}, not {aggregate!r}")
        self.aggregate, self.unit = aggregate, check_unit(self, unit)

    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        lengths = [token_mask(batch).sum(1).tolist() for batch in batches]
        found: dict[str, float] = {}
        for call in stream_blocks(split, batches, store=next(split.parameters()).device):
            if call.prefix in units:
                turn = Turn(self.aggregate, lengths)
                call.run(on_input={call.prefix: turn.hear_input}, on_output={call.prefix: turn.hear_output})
                found[call.prefix] = -turn.cosine()
        return Measured(found)


class Turn:
    """Mean cosine between what goes into a block and what comes out, in float64 sums.

    Args:
        aggregate: see LIM.
        lengths: of each micro-batch that will be heard, how many of its tokens belong to each row.
    """

    def __init__(self, aggregate: Aggregate, lengths: Sequence[Sequence[int]]) -> None:
        self.aggregate = aggregate
        self._lengths = iter(lengths)
        self._input: Tensor | None = None
        self._sums = torch.zeros(3, dtype=torch.float64)  # x.y, x.x, y.y of all the text
        self._cosines, self._num = 0.0, 0

    def hear_input(self, x: Tensor) -> None:
        """A micro-batch's inputs [tokens, H], before its outputs."""
        self._input = x.double()

    def hear_output(self, y: Tensor) -> None:
        """Its outputs [tokens, H]."""
        assert self._input is not None
        x, y = self._input, y.double()
        products = torch.stack([(x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)])  # [3, tokens]
        lengths = list(next(self._lengths))
        if self.aggregate == "flattened":
            self._sums += products.sum(1).cpu()
            return
        if self.aggregate == "per_sample":
            products = torch.stack([part.sum(1) for part in products.split(lengths, dim=1)], dim=1)
        self._cosines += float(_cosine(products).sum())
        self._num += products.shape[1]

    def cosine(self) -> float:
        """Of all that was heard."""
        return float(_cosine(self._sums)) if self.aggregate == "flattened" else self._cosines / self._num


def _cosine(products: Tensor) -> Tensor:
    """[3, ...] x.y, x.x, y.y -> cosines; 0 where a vector is 0."""
    return products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-300)
