"""Fake-quantized nn.Conv2d: a channel is an output channel, a group lies along (in, height, width)."""

from __future__ import annotations

from torch import Tensor, nn

from kdqat.quant.layer import FakeQuantLayer, autocast_dtype


class FakeQuantConv2d(FakeQuantLayer, nn.Conv2d):
    """A convolution [B, I, H, W] -> [B, O, H', W'] with the latent weight [O, I / groups, KH, KW].

    Its activations pass the fake quantizer with channels last, so that a token is one pixel and a feature a channel.
    """

    plain_class = nn.Conv2d

    @property
    def input_width(self) -> int:
        return self.in_channels

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized_input(x.movedim(-3, -1)).movedim(-1, -3)
        y = self._conv_forward(x, self.fake_quantized_weight(autocast_dtype(self.weight)), self.bias)
        return self.quantized_output(y.movedim(-3, -1)).movedim(-1, -3)
