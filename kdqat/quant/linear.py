"""FakeQuantLinear: an nn.Linear whose weight passes a fake quantizer on its way into the matmul.

A subclass that keeps the name `weight`, not a parametrization or a tensor subclass: the student's keys stay the
HF keys plus `weight_fake_quantizer.*`, peft attaches, `save_pretrained` reloads in plain transformers
(docs/architecture.md, decision 3).
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdqat.quant.quantizer import FakeQuantizer, QuantizerFactory
from kdqat.spec import LayerScheme


class FakeQuantLinear(nn.Linear):
    """A linear layer [.., I] -> [.., O] with the latent weight [O, I] and its fake quantizer.

    Attributes:
        weight_fake_quantizer: None where the scheme leaves the weight alone.
        fake_quantize: False switches the layer to full precision (see `swap.full_precision`).
    """

    weight_fake_quantizer: FakeQuantizer | None
    fake_quantize: bool

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: LayerScheme, quantizer: QuantizerFactory) -> Self:
        """Wrap `linear`, reusing its Parameter objects, so that tied weights stay tied."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.fake_quantize = True
        layer.weight_fake_quantizer = None
        if scheme.weight is not None:
            with torch.device(linear.weight.device):
                layer.weight_fake_quantizer = quantizer(scheme.weight, linear.weight.shape)
        layer.train(linear.training)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear that holds the fake-quantized weight."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = nn.Parameter(self.fake_quantized_weight().detach().clone())
        linear.bias = self.bias
        return linear.train(self.training)

    def fake_quantized_weight(self) -> Tensor:
        """The weight [O, I] as the matmul sees it, differentiable."""
        if self.weight_fake_quantizer is None or not self.fake_quantize:
            return self.weight
        return self.weight_fake_quantizer(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fake_quantized_weight(), self.bias)
