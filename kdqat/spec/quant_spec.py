"""How one tensor is stored (`QuantSpec`) and what one layer does (`LayerScheme`)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Granularity = Literal["tensor", "channel", "group"]
ScaleRule = Literal["absmax", "absmax_half", "signed_max"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]
ZeroPoint = Literal["none", "integer"]

_DTYPE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor is stored: number format, grid, who shares a scale, and what the scale itself is.

    Args:
        format: "int1" ... "int8".
        granularity: who shares a scale: the whole tensor, an output channel, or a group of inputs.
        group_size: inputs that share a scale; with granularity="group", and only with it.
        symmetric: codes -2^(b-1) ... 2^(b-1)-1 around zero; otherwise 0 ... 2^b-1 with a zero point.
        scale_rule: how a range becomes a scale. Symmetric: "absmax" absmax/qmax (RTN in most papers),
            "absmax_half" absmax/(qmax+1/2) (torchao, compressed-tensors), "signed_max" the value of largest
            magnitude falls on -2^(b-1) (llama.cpp). Asymmetric: "absmax" (max-min)/(2^b-1), the range widened
            to hold zero (GPTQ); the other two are for symmetric grids.
        scale_dtype: dtype of the stored scale; training rounds to it in the forward pass.
        zero_point: "none" (symmetric) or "integer" (one of the codes).

    Raises:
        ValueError: for an unknown value or a combination no file format holds; the message names the remedy.
    """

    format: str
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    scale_rule: ScaleRule = "absmax"
    scale_dtype: ScaleDtype = "float32"
    zero_point: ZeroPoint = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or not re.fullmatch(r"int[1-8]", self.format):
            raise ValueError(f"format {self.format!r} is unknown: use int1 ... int8")
        _one_of("granularity", self.granularity, get_args(Granularity))
        _one_of("scale_rule", self.scale_rule, get_args(ScaleRule))
        _one_of("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        _one_of("zero_point", self.zero_point, get_args(ZeroPoint))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity='group', and only with it")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise ValueError(f"group_size must be a whole number of at least 1, not {self.group_size!r}")
        if self.symmetric != (self.zero_point == "none"):
            raise ValueError("symmetric=True goes with zero_point='none', symmetric=False with zero_point='integer'")
        if not self.symmetric and self.scale_rule != "absmax":
            raise ValueError(f"scale_rule={self.scale_rule!r} needs symmetric=True")
        self.qrange()  # refuses a symmetric int1

    @property
    def bits(self) -> int:
        """Width of one stored code."""
        return int(self.format.removeprefix("int"))

    def qrange(self, bits: int | None = None) -> tuple[int, int]:
        """Lowest and highest code, for this spec or for another width of it (a bit schedule).

        Raises:
            ValueError: for a width that no format of this kind has.
        """
        b = self.bits if bits is None else bits
        if not 1 <= b <= 8:
            raise ValueError(f"bits must be 1 to 8, not {b}")
        if self.symmetric and b == 1:
            raise ValueError("int1 has no symmetric grid: use symmetric=False with zero_point='integer'")
        return (-(2 ** (b - 1)), 2 ** (b - 1) - 1) if self.symmetric else (0, 2**b - 1)

    def qparam_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of scale and zero point for a tensor of `shape` [O, I]: [O, N, 1], [O, 1, 1] or [1].

        Raises:
            ValueError: if group_size does not divide I.
        """
        if self.granularity == "tensor":
            return (1,)  # never 0-D: FSDP2 refuses scalar parameters
        out_features, in_features = shape
        if self.group_size is None:
            return (out_features, 1, 1)
        if in_features % self.group_size:
            fits = [g for g in (32, 64, 128, 16, 8) if in_features % g == 0]
            remedy = f"use group_size {' or '.join(map(str, fits))}" if fits else "use granularity='channel'"
            raise ValueError(f"group_size {self.group_size} does not divide input width {in_features}: {remedy}")
        return (out_features, in_features // self.group_size, 1)

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Bits a tensor of `shape` takes: its codes, its scales and its zero points."""
        num_qparams = math.prod(self.qparam_shape(shape))
        scale_bits = _DTYPE_BITS[self.scale_dtype]
        zero_bits = 0 if self.symmetric else self.bits
        return math.prod(shape) * self.bits + num_qparams * (scale_bits + zero_bits)


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """What one layer does. `weight=None` leaves the layer in full precision."""

    weight: QuantSpec | None = None


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} {value!r} is unknown: use {', '.join(allowed)}")
