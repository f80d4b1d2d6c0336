"""Fake-quantized nn.Linear, and the transposed linear of GPT-2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdqat.quant.layer import FakeQuantLayer, autocast_dtype


class FakeQuantLinear(FakeQuantLayer, nn.Linear):
    """A linear layer [.., I] -> [.., O] with the latent weight [O, I]."""

    plain_class = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fake_quantized_weight(autocast_dtype(self.weight))
        return self.quantized_output(self._with_branch(F.linear(self.quantized_input(x), weight, self.bias), x))


class FakeQuantConv1D(FakeQuantLayer):
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [I, O]."""

    plain_class = nn.Module
    bias: nn.Parameter

    @classmethod
    def wraps(cls, module: nn.Module) -> bool:
        kind = type(module)  # by its full name: this package imports no transformers
        return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fake_quantized_weight(autocast_dtype(self.weight))
        return self.quantized_output(self._with_branch(F.linear(self.quantized_input(x), weight.t(), self.bias), x))
