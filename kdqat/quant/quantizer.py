"""FakeQuantizer: the module that fake-quantizes one weight.

A method writes `qparams`, the scale and zero point it wants; the base rounds them to what the spec stores and uses
that for the forward pass *and* for the codes an exporter writes, so training and export cannot drift apart.
All state is allocated in the constructor (strict loading works before the first forward), scales are at least 1-D
(FSDP2), the bit width lives in 0-D buffers (a bit schedule does not recompile), and forward changes nothing
(activation checkpointing runs it twice).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from kdqat.quant.functional import STE, fake_quantize, floor_magnitude_ste, quantize, round_ste, round_to_dtype_ste
from kdqat.quant.grouping import from_groups, to_groups
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class FakeQuantizer(nn.Module, ABC):
    """Fake quantization of one weight of `shape` [O, I] as `spec` stores it.

    Attributes:
        scale, zero_point: fp32, `spec.qparam_shape(shape)`; Parameters where learned, else buffers.
        qmin, qmax: 0-D fp32 buffers, the codes' range.

    Raises:
        ValueError: if the spec does not fit the shape.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: Tensor
    qmax: Tensor

    ste: ClassVar[STE] = "clipped"
    uses_stored_qparams: ClassVar[bool] = True  # False: ranges come from the live weight, an initializer's are void

    def __init__(self, spec: QuantSpec, shape: torch.Size) -> None:
        super().__init__()
        self.spec = spec
        self.shape = torch.Size(shape)
        qparam_shape = spec.qparam_shape(shape)
        qmin, qmax = spec.qrange()
        self.register_buffer("scale", torch.ones(qparam_shape))
        self.register_buffer("zero_point", torch.zeros(qparam_shape))
        self.register_buffer("qmin", torch.tensor(float(qmin)))
        self.register_buffer("qmax", torch.tensor(float(qmax)))

    @abstractmethod
    def qparams(self, groups: Tensor) -> QParams:
        """Scale and zero point for `groups` [O, N, G], before they are rounded to their stored dtypes."""

    def stored_qparams(self, weight: Tensor) -> QParams:
        """What is stored for `weight` [O, I]: the scale on scale_dtype's grid, the zero point a code; still fp32."""
        scale, zero_point = self.qparams(to_groups(weight.float(), self.spec))
        dtype = getattr(torch, self.spec.scale_dtype)
        scale = round_to_dtype_ste(floor_magnitude_ste(scale.float()), dtype)
        if not self.spec.symmetric:
            zero_point = round_ste(torch.clamp(zero_point.float(), self.qmin, self.qmax))
        return QParams(scale, zero_point)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes of `weight` [O, I] as int16 [O, I]: what an exporter packs."""
        scale, zero_point = self.stored_qparams(weight)
        groups = to_groups(weight.float(), self.spec)
        return from_groups(quantize(groups, scale, zero_point, self.qmin, self.qmax)).to(torch.int16)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantized `weight` [O, I], in its own dtype; computed in fp32."""
        scale, zero_point = self.stored_qparams(weight)
        groups = to_groups(weight.float(), self.spec)
        values = fake_quantize(groups, scale, zero_point, self.qmin, self.qmax, self.ste)
        return from_groups(values).to(weight.dtype)

    @torch.no_grad()
    def load_qparams(self, qparams: QParams) -> None:
        """Take over scale and zero point: what an initializer or a saved student brings.

        Raises:
            ValueError: for another shape, or if this quantizer reads its ranges off the live weight.
        """
        if not self.uses_stored_qparams:
            raise ValueError(
                f"{type(self).__name__} recomputes its ranges from the live weight and cannot take scales: "
                "use the RTN initializer with it, or the LSQ quantizer"
            )
        for name, given in qparams._asdict().items():
            if given.shape != self.scale.shape:
                raise ValueError(f"{name} of shape {tuple(given.shape)} given, {tuple(self.scale.shape)} expected")
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the code range in place; the scale keeps the same real range covered, nothing is reallocated."""
        qmin, qmax = self.spec.qrange(bits)
        ratio = self.qmax / qmax
        self.scale.mul_(ratio)
        self.zero_point.div_(ratio).round_()
        self.qmin.fill_(qmin)
        self.qmax.fill_(qmax)

    def extra_repr(self) -> str:
        return f"{self.spec.format}, {self.spec.granularity}, group_size={self.spec.group_size}"


QuantizerFactory: TypeAlias = Callable[[QuantSpec, torch.Size], FakeQuantizer]
