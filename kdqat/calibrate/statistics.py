"""What a calibration remembers of a layer's inputs: sums, ends and samples that grow micro-batch by micro-batch.

Each has `update(x)` for inputs x [tokens, I] of any float dtype, and keeps its result in fp32 on the device of `x`:
half precision has neither the range for a sum of squares nor, in bf16, the digits for a maximum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Statistic(ABC):
    """Something that grows with every micro-batch and can be put down and taken up again (`kept.py`).

    Attributes:
        fields: the attributes that are all of it.
    """

    fields: ClassVar[tuple[str, ...]]

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Count inputs x [tokens, I]."""

    def state(self) -> dict[str, Tensor]:
        """`fields` as tensors.

        Raises:
            ValueError: if nothing has been seen.
        """
        return {field: torch.as_tensor(_seen(getattr(self, field))) for field in self.fields}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        for field in self.fields:
            counts = isinstance(getattr(self, field), int)
            setattr(self, field, int(state[field]) if counts else state[field])


class AbsMax(Statistic):
    """The largest magnitude of every feature: what scales that move between weights and activations come from
    (SmoothQuant, https://arxiv.org/abs/2211.10438).

    Attributes:
        per_feature: [I]; None before the first update.
    """

    fields = ("per_feature",)

    def __init__(self) -> None:
        self.per_feature: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if len(x):
            new = x.abs().amax(0).float()
            self.per_feature = new if self.per_feature is None else torch.maximum(self.per_feature, new)

    @property
    def overall(self) -> Tensor:
        """0-D: the largest of all.

        Raises:
            ValueError: if nothing has been seen.
        """
        return _seen(self.per_feature).amax()


class AbsMean(Statistic):
    """The mean magnitude of every feature: how much AWQ protects it (https://arxiv.org/abs/2306.00978).

    Attributes:
        sum: [I]; None before the first update.
        num_tokens: the rows it is summed over.
    """

    fields = ("sum", "num_tokens")

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.num_tokens = 0

    def update(self, x: Tensor) -> None:
        new = x.float().abs().sum(0)
        self.sum = new if self.sum is None else self.sum + new
        self.num_tokens += len(x)

    @property
    def mean(self) -> Tensor:
        """[I].

        Raises:
            ValueError: if nothing has been seen.
        """
        return _seen(self.sum if self.num_tokens else None) / self.num_tokens


class Range(Statistic):
    """The smallest and the largest input of all features: what a static activation scale has to cover.

    Attributes:
        min, max: 0-D; None before the first update.
    """

    fields = ("min", "max")

    def __init__(self) -> None:
        self.min: Tensor | None = None
        self.max: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if len(x):
            low, high = (end.float() for end in x.aminmax())
            self.min = low if self.min is None else torch.minimum(self.min, low)
            self.max = high if self.max is None else torch.maximum(self.max, high)


class InputSample:
    """Some of a layer's inputs, chosen evenly over all the text: what a search for the least output error computes on.

    Evenly, because the first tokens of a text are one document. The choice depends on positions only, so layers of
    one block keep the same tokens.

    Args:
        max_tokens: how many to keep; all, if there are no more.
        num_tokens: how many will come (`BlockCall.num_tokens`).

    Raises:
        ValueError: for numbers below 1.
    """

    def __init__(self, max_tokens: int, num_tokens: int) -> None:
        if max_tokens < 1 or num_tokens < 1:
            raise ValueError(f"a sample needs max_tokens >= 1 and num_tokens >= 1, not {max_tokens} and {num_tokens}")
        size = min(max_tokens, num_tokens)
        self._chosen = torch.arange(size) * num_tokens // size
        self._num_seen = 0
        self._rows: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        here = self._chosen - self._num_seen
        here = here[(here >= 0) & (here < len(x))]
        if len(here):
            self._rows.append(x[here.to(x.device)].float())  # a copy: x itself dies with its micro-batch
        self._num_seen += len(x)

    @property
    def rows(self) -> Tensor:
        """[tokens, I] fp32.

        Raises:
            ValueError: if nothing has been seen.
        """
        return torch.cat(self._rows) if self._rows else _seen(None)


class Hessian(Statistic):
    """X^T X, half the Hessian of a layer's squared output error: what GPTQ solves with
    (https://arxiv.org/abs/2210.17323).

    Attributes:
        sum: [I, I] fp32; None before the first update.
        num_tokens: the rows it is summed over.
    """

    fields = ("sum", "num_tokens")

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.num_tokens = 0

    def update(self, x: Tensor) -> None:
        x = x.float()
        if self.sum is None:
            self.sum = x.new_zeros(x.shape[1], x.shape[1])
        self.sum.addmm_(x.T, x)  # in place: autocast would take `x.T @ x` to bf16
        self.num_tokens += len(x)

    @property
    def matrix(self) -> Tensor:
        """`sum`, where there is one.

        Raises:
            ValueError: if nothing has been seen.
        """
        return _seen(self.sum if self.num_tokens else None)


def _seen(result: T | None) -> T:
    if result is None:
        raise ValueError("this layer has seen no input: give more calibration text, or leave the layer out of the plan")
    return result
