"""FakeQuantizer: the module that fake-quantizes one tensor, a weight or an activation.

A method writes `qparams`, the scale and zero point it wants; the base rounds them to what the spec stores and uses
that for the forward pass *and* for the codes an exporter writes, so training and export cannot drift apart.
All state is allocated in the constructor (strict loading works before the first forward), scales are at least 1-D
(FSDP2), the bit width lives in 0-D buffers (a bit schedule does not recompile), and forward changes nothing
(activation checkpointing runs it twice).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias, get_args

import torch
from torch import Tensor, nn

from kdqat.quant import scales
from kdqat.quant.formats import Grid, decode, encode, grid_of
from kdqat.quant.functional import STE, dequantize, fake_quantize, quantize, replace_ste
from kdqat.quant.grouping import rotate, to_groups
from kdqat.quant.kernels import kernel_for
from kdqat.quant.lean import fake_quantize_lean
from kdqat.quant.ranges import choose_qparams
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class FakeQuantizer(nn.Module, ABC):
    """Fake quantization of one tensor as `spec` stores it.

    Args:
        spec: the format contract.
        shape: of the weight as a matrix [O, I], or [1, I] for activations of I features.
        ste: how gradients pass rounding; see `functional.fake_quantize`.

    Attributes:
        scale, zero_point: fp32, `spec.qparam_shape(shape)`; Parameters where learned, else buffers.
        qmin, qmax: 0-D fp32 buffers, the extreme levels.
        Minifloats and codebooks have their grid, nested scales their second level in further buffers.

    Raises:
        ValueError: if the spec does not fit the shape.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: Tensor
    qmax: Tensor
    mantissa_bits: Tensor | None
    min_exponent: Tensor | None
    levels: Tensor | None

    uses_stored_qparams: ClassVar[bool] = True  # False: ranges come from the live tensor, an initializer's are void
    reads_tensor: ClassVar[bool] = True  # False: `qparams` never looks at the groups, so that none are made for it
    live_range: ClassVar[bool] = False  # True: `qparams` is the spec's rule on the live tensor and nothing else

    def __init__(self, spec: QuantSpec, shape: torch.Size, ste: STE = "clipped") -> None:
        super().__init__()
        if ste not in get_args(STE):
            raise ValueError(f"ste {ste!r} is unknown: use {', '.join(get_args(STE))}")
        if spec.dynamic and self.uses_stored_qparams:
            raise ValueError(f"{type(self).__name__} stores scales; a spec with dynamic=True needs MinMax")
        self.spec = spec
        self.shape = torch.Size(shape)
        self.ste: STE = ste
        self.finds_range = self._declares("live_range", True)
        self.skips_groups = self._declares("reads_tensor", False)
        self.own_arithmetic = type(self).fake_quantize is not FakeQuantizer.fake_quantize
        qparam_shape = spec.qparam_shape(shape)
        self.register_buffer("scale", torch.ones(qparam_shape))
        self.register_buffer("zero_point", torch.zeros(qparam_shape))
        grid = grid_of(spec)
        self._kind, self._offset = grid.kind, grid.offset  # not read off the spec: set_format would recompile
        self.register_buffer("qmin", grid.low)
        self.register_buffer("qmax", grid.high)
        for name in ("mantissa_bits", "min_exponent", "levels"):
            self.register_buffer(name, getattr(grid, name))
        second = scales.second_level_shapes(spec.scale_dtype, qparam_shape)
        self._second_level = tuple(second)
        self.kernel = kernel_for(self)
        for name, second_shape in second.items():
            self.register_buffer(name, torch.zeros(second_shape) if name == "scale_mean" else torch.ones(second_shape))

    def _declares(self, flag: str, value: bool) -> bool:
        """Whether `flag` has this value and speaks of this very `qparams`: a subclass may have written another."""
        owner: Any = next(cls for cls in type(self).__mro__ if flag in vars(cls))
        return getattr(owner, flag) is value and type(self).qparams is owner.qparams

    @abstractmethod
    def qparams(self, groups: Tensor) -> QParams:
        """Scale and zero point for `groups` [O, N, G], before they are rounded to their stored dtypes."""

    def initial_qparams(self, groups: Tensor) -> QParams:
        """Where the RTN initializer starts for `groups` [O, N, G]: the spec's scale rule, or the method's own start."""
        return choose_qparams(groups, self.grid, self.spec)

    def learn(self, *names: str) -> None:
        """Turn buffers (scale, zero_point) into Parameters; for the constructor of a method that trains them."""
        for name in names:
            start = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(start))

    @property
    def has_second_level(self) -> bool:
        """Whether its scales are stored in a code of their own, which `second_level` explains."""
        return bool(self._second_level)

    @property
    def grid(self) -> Grid:
        """The levels, as tensors on this module's device."""
        return Grid(self._kind, self.qmin, self.qmax, self._offset, self.mantissa_bits, self.min_exponent, self.levels)

    def stored_qparams(self, tensor: Tensor) -> QParams:
        """What is stored for `tensor` [.., I]: scale and minimum as they will be read back, or a zero code."""
        return self._stored(self.groups(tensor))

    def second_level(self, tensor: Tensor) -> dict[str, Tensor]:
        """The second level of `tensor`'s scales (`scales.fit`); empty where the format has none."""
        return dict(self._second(self.qparams(self.groups(tensor))))

    def codes(self, tensor: Tensor) -> Tensor:
        """Storage codes of `tensor` as int16 in its shape (`formats.encode`): what an exporter packs."""
        groups = self.groups(tensor)
        return encode(quantize(groups, self._stored(groups), self.grid, self.spec), self.grid).reshape(tensor.shape)

    def values(self, codes: Tensor, qparams: QParams) -> Tensor:
        """What a reader makes of `codes` and stored qparams: fp32, in the shape of the codes."""
        levels = to_groups(decode(codes, self.spec), self.spec)
        return rotate(dequantize(levels, qparams, self.spec).reshape(codes.shape), self.spec.hadamard)

    def forward(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Fake-quantized `tensor` [.., I] in `dtype` (None: its own); computed in fp32, keeping nothing (`lean.py`)."""
        return fake_quantize_lean(self, tensor, tensor.dtype if dtype is None else dtype)

    def composed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """What `forward` computes, of ordinary differentiable operations: the reference."""
        groups = self.groups(tensor)
        values = self.fake_quantize(groups, self._stored(groups)).reshape(tensor.shape)
        return rotate(values, self.spec.hadamard).to(dtype)

    def fake_quantize(self, groups: Tensor, qparams: QParams) -> Tensor:
        """Values of `groups` under stored `qparams`; a quantizer with a gradient of its own overrides it."""
        return fake_quantize(groups, qparams, self.grid, self.spec, self.ste)

    @torch.no_grad()
    def load_qparams(self, qparams: QParams, second_level: Mapping[str, Tensor] | None = None) -> None:
        """Take over scale and zero point: what an initializer or a saved student brings.

        Args:
            second_level: as saved; None fits it to these scales.

        Raises:
            ValueError: for another shape, or if this quantizer reads its ranges off the live tensor.
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
        self.load_second_level(second_level)
        # the start of training is what `prepared/` would store, whether or not it went through a folder
        second = {name: getattr(self, name) for name in self._second_level}
        if self.spec.zero_point == "minimum":
            self.zero_point.copy_(scales.round_minimum(self.spec.scale_dtype, self.zero_point, second))
        self.scale.copy_(scales.round_scale(self.spec.scale_dtype, self.scale, second))

    @torch.no_grad()
    def load_second_level(self, second_level: Mapping[str, Tensor] | None = None) -> None:
        """Take over a second level, or fit one to the scales there are (None).

        Raises:
            ValueError: for another shape or a missing tensor.
        """
        if second_level is None:
            second_level = scales.fit(self.spec.scale_dtype, self.scale.detach(), self.zero_point.detach())
        for name in self._second_level:
            mine = getattr(self, name)
            if name not in second_level or second_level[name].shape != mine.shape:
                raise ValueError(
                    f"{name} of shape {tuple(mine.shape)} expected for scale_dtype {self.spec.scale_dtype}"
                )
            mine.copy_(second_level[name])

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the code range in place; the scale keeps the same real range covered, nothing is reallocated.

        Raises:
            ValueError: for a format that has one width only.
        """
        qmin, qmax = self.spec.qrange(bits)
        self._keep_range(qmin, qmax)

    @torch.no_grad()
    def set_format(self, name: str) -> None:
        """Change the split of a minifloat's bits in place (e2m1 -> e3m0); the same real range stays covered.

        Raises:
            ValueError: if this or the new format is no minifloat.
        """
        spec = replace(self.spec, format=name)
        if spec.number.kind != "float" or self.spec.number.kind != "float":
            raise ValueError(f"set_format changes one minifloat into another, not {self.spec.format} into {name}")
        assert self.mantissa_bits is not None and self.min_exponent is not None
        self.mantissa_bits.fill_(spec.number.mantissa_bits)
        self.min_exponent.fill_(spec.number.min_exponent)
        self._keep_range(*spec.qrange())
        self.spec = spec

    def _keep_range(self, qmin: float, qmax: float) -> None:
        ratio = self.qmax / qmax
        self.scale.mul_(ratio)
        if self.spec.zero_point == "integer":
            self.zero_point.div_(ratio).round_()
        self.qmin.fill_(qmin)
        self.qmax.fill_(qmax)
        if self.uses_stored_qparams:
            self.load_second_level()

    def groups(self, tensor: Tensor) -> Tensor:
        """`tensor` [.., I] as it is rounded: fp32, rotated if the spec says so, [rows, N, G]."""
        return to_groups(rotate(tensor.float(), self.spec.hadamard), self.spec)

    def as_stored(self, wanted: QParams) -> QParams:
        """`wanted` scale and zero point rounded to what the spec stores, fp32; no gradient."""
        return round_qparams(wanted, self.spec, self.qmin, self.qmax, self._second(wanted))

    def _stored(self, groups: Tensor) -> QParams:
        wanted = self.qparams(groups)
        stored = self.as_stored(wanted)
        zero_point = wanted.zero_point.float()
        if self.spec.zero_point == "integer":
            zero_point = torch.clamp(zero_point, self.qmin, self.qmax)  # no gradient beyond the codes
        return QParams(
            replace_ste(wanted.scale.float(), stored.scale),
            zero_point if self.spec.zero_point in ("none", "half") else replace_ste(zero_point, stored.zero_point),
        )

    def _second(self, wanted: QParams) -> Mapping[str, Tensor]:
        if self.uses_stored_qparams or self.spec.dynamic:  # of dynamic ranges: calibrated, as engines store it
            return {name: getattr(self, name) for name in self._second_level}
        return scales.fit(self.spec.scale_dtype, wanted.scale.detach(), wanted.zero_point.detach())

    def extra_repr(self) -> str:
        return f"{self.spec.format}, {self.spec.granularity}, group_size={self.spec.group_size}"


def round_qparams(
    wanted: QParams, spec: QuantSpec, low: Tensor, high: Tensor, second_level: Mapping[str, Tensor] | None = None
) -> QParams:
    """`wanted` scale and zero point rounded to what `spec` stores, fp32; no gradient.

    Args:
        low, high: the codes' ends, which a zero point lies between.
        second_level: of the scales; None where `spec` has none.
    """
    scale, zero_point, second = wanted.scale.detach().float(), wanted.zero_point.detach().float(), second_level or {}
    if spec.zero_point == "integer":
        zero_point = torch.clamp(zero_point, low, high).round()
    elif spec.zero_point == "minimum":
        zero_point = scales.round_minimum(spec.scale_dtype, zero_point, second)
    return QParams(scales.round_scale(spec.scale_dtype, scale, second), zero_point)


QuantizerFactory: TypeAlias = Callable[[QuantSpec, torch.Size], FakeQuantizer]
