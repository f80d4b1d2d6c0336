"""How one tensor is stored: the format contract (`QuantSpec`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kdqat.spec.formats import NumberFormat, number_format
from kdqat.spec.scale_dtype import SUPER_GROUPS, ScaleDtype, scale_bits

Granularity = Literal["tensor", "channel", "group", "token", "feature"]
ScaleRule = Literal["absmax", "absmax_half", "signed_max", "mean", "mx", "gaussian", "pre_shift"]
ZeroPoint = Literal["none", "half", "integer", "minimum"]

_INTEGER_RULES = ("absmax_half", "signed_max", "gaussian")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor is stored: number format, grid, who shares a scale, and what the scale itself is.

    Args:
        format: see `spec/formats.py`: "int4", "e2m1", "nf4", "ternary" ...
        granularity: who shares a scale. Weights: the whole tensor, an output channel, a group of inputs. Activations:
            the whole tensor, a token, a group of a token's features, or a feature across tokens.
        group_size: elements that share a scale; with granularity="group", and only with it.
        symmetric: a grid around zero; otherwise codes 0 ... 2^b-1 with a zero point.
        scale_rule: how a range becomes a scale, before any learning or search.
            "absmax": absmax/qmax (RTN in most papers; floats and codebooks: absmax on the largest number); asymmetric:
            (max-min)/(2^b-1), with zero_point="integer" the range is widened to hold zero (GPTQ).
            "absmax_half": absmax/(qmax+1/2) (torchao, compressed-tensors). "signed_max": the value of largest
            magnitude falls on -2^(b-1) (llama.cpp). "mean": mean magnitude on the outermost level (binary, ternary).
            "mx": 2^(floor(log2 absmax) - emax), the OCP MX rule. "gaussian": c_b * RMS, least error for normal
            numbers (QuEST). "pre_shift": a power-of-two shift for each feature under one scale (LLM-FP4, eq. 15).
        scale_dtype: what a scale is stored as (`spec/scale_dtype.py`); training rounds to it in the forward pass.
        zero_point: "none"; "half": levels code + 1/2, symmetric without a zero (SEQ, QuEST, binary); "integer": one of
            the codes; "minimum": value = scale * code + minimum, stored like a scale (GGUF Q4_1, Q4_K).
        narrow: leave out the lowest code of a symmetric integer, -7 ... 7 for int4.
        dynamic: the range comes from the live tensor and no scale is stored; activations only.
        hadamard: rotate blocks of so many inputs by a Hadamard matrix before rounding, and back after it (QuEST);
            whoever serves the codes rotates the activations.
        levels: of format "codebook".

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
    narrow: bool = False
    dynamic: bool = False
    hadamard: int | None = None
    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))  # JSON and YAML give lists
        if not isinstance(self.format, str):
            raise ValueError(f"format {self.format!r} is unknown: use a name such as int4")
        integer = self.number.kind == "integer"
        _one_of("granularity", self.granularity, get_args(Granularity))
        _one_of("scale_rule", self.scale_rule, get_args(ScaleRule))
        _one_of("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        _one_of("zero_point", self.zero_point, get_args(ZeroPoint))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity='group', and only with it")
        for key in ("group_size", "hadamard"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{key} must be a whole number of at least 1, not {value!r}")
        if self.hadamard is not None and self.hadamard & (self.hadamard - 1):
            raise ValueError(f"hadamard {self.hadamard}: blocks are powers of two, e.g. 64")
        if not integer and (not self.symmetric or self.zero_point != "none" or self.narrow):
            raise ValueError(
                f"format {self.format} is symmetric: leave symmetric, zero_point and narrow at their defaults"
            )
        if self.symmetric != (self.zero_point in ("none", "half")):
            raise ValueError(
                "symmetric=True goes with zero_point 'none' or 'half', symmetric=False with 'integer' or 'minimum'"
            )
        if self.narrow and (not self.symmetric or self.zero_point != "none" or self.format == "ternary"):
            raise ValueError("narrow=True is for symmetric integers with zero_point='none', e.g. int4: -7 ... 7")
        self._check_scale(integer)
        if integer:
            self.qrange()  # refuses a symmetric int1

    def _check_scale(self, integer: bool) -> None:
        if not self.symmetric and self.scale_rule != "absmax":
            raise ValueError(f"scale_rule={self.scale_rule!r} needs symmetric=True")
        if self.scale_rule in _INTEGER_RULES and not integer:
            raise ValueError(
                f"scale_rule={self.scale_rule!r} is for integers; floats and codebooks use 'absmax' or 'mx'"
            )
        if self.scale_rule == "gaussian" and self.zero_point != "half":
            raise ValueError("scale_rule='gaussian' goes with zero_point='half' (QuEST)")
        if self.scale_rule in ("mx", "pre_shift") and self.number.kind != "float":
            raise ValueError(f"scale_rule={self.scale_rule!r} is for minifloats such as e2m1")
        if self.scale_rule == "pre_shift" and self.granularity != "feature":
            raise ValueError("scale_rule='pre_shift' shifts features against each other: use granularity='feature'")
        if self.scale_rule == "signed_max" and self.scale_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"scale_rule='signed_max' gives negative scales, which {self.scale_dtype} does not hold")
        if self.scale_dtype == "k6" and (self.zero_point != "minimum" or self.granularity != "group"):
            raise ValueError("scale_dtype='k6' goes with granularity='group' and zero_point='minimum' (GGUF Q4_K)")
        if self.zero_point == "minimum" and self.scale_dtype not in ("float32", "float16", "bfloat16", "k6"):
            raise ValueError(
                f"zero_point='minimum' is stored like a scale, which {self.scale_dtype} cannot: use float16"
            )
        if self.dynamic and self.granularity not in ("tensor", "token", "group"):
            raise ValueError(f"dynamic=True goes with granularity tensor, token or group, not {self.granularity!r}")
        if self.dynamic and self.scale_dtype in ("double", "k6"):
            raise ValueError(f"scale_dtype={self.scale_dtype!r} needs stored scales, dynamic=True has none")

    @property
    def number(self) -> NumberFormat:
        """The number format behind the name."""
        return number_format(self.format, self.levels)

    @property
    def bits(self) -> float:
        """Width of one code; log2(3) for ternary."""
        return self.number.bits

    def qrange(self, bits: int | None = None) -> tuple[float, float]:
        """Lowest and highest level, for this spec or for another width of it (a bit schedule).

        Integers: the codes, or code + 1/2 with zero_point="half". Floats and codebooks: their extreme numbers.

        Raises:
            ValueError: for a width that no format of this kind has.
        """
        number = self.number
        if number.kind == "integer" and number.name.startswith("int"):
            return self._integer_range(int(number.bits) if bits is None else bits)
        if bits is not None and bits != math.ceil(number.bits):
            raise ValueError(f"format {self.format} has one width, {math.ceil(number.bits)} bits; only intN changes it")
        if number.kind == "float":
            return (-number.max_value, number.max_value)
        if number.kind == "codebook":
            return (number.levels[0], number.levels[-1])
        if (number.name == "binary") != (self.zero_point == "half") or not self.symmetric:
            raise ValueError("binary goes with zero_point='half', ternary with zero_point='none', both symmetric")
        return (-0.5, 0.5) if number.name == "binary" else (-1, 1)

    def _integer_range(self, bits: int) -> tuple[float, float]:
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {bits}")
        if not self.symmetric:
            return (0, 2**bits - 1)
        if self.zero_point == "half":
            return (0.5 - 2 ** (bits - 1), 2 ** (bits - 1) - 0.5)
        if bits == 1:
            raise ValueError("int1 has no symmetric grid with a zero: use format binary, or symmetric=False")
        return (int(self.narrow) - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    def qparam_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of scale and zero point for a tensor of `shape` [rows, I].

        [O, N, 1] group, [O, 1, 1] channel, [1] tensor; activations: [1, 1, I] feature, and a placeholder [1] for
        dynamic ranges, which store none.

        Raises:
            ValueError: if group_size (or hadamard) does not divide I.
        """
        rows, width = shape
        if self.hadamard is not None and width % self.hadamard:
            raise ValueError(
                f"hadamard {self.hadamard} does not divide input width {width}: use {width & -width} or less"
            )
        if self.group_size is not None and width % self.group_size:
            fits = [g for g in (32, 64, 128, 16, 8) if width % g == 0]
            remedy = f"use group_size {' or '.join(map(str, fits))}" if fits else "use granularity='channel'"
            raise ValueError(f"group_size {self.group_size} does not divide input width {width}: {remedy}")
        if self.dynamic or self.granularity in ("tensor", "token"):
            return (1,)  # never 0-D: FSDP2 refuses scalar parameters
        if self.granularity == "feature":
            return (1, 1, width)
        if self.group_size is None:
            return (rows, 1, 1)
        num_groups = width // self.group_size
        if self.scale_dtype == "k6" and num_groups % SUPER_GROUPS:
            raise ValueError(
                f"scale_dtype 'k6' holds super-blocks of {SUPER_GROUPS} groups = {SUPER_GROUPS * self.group_size} "
                f"inputs, which do not divide input width {width}: use GGUF_Q4_1 or GGUF_Q4_0 there"
            )
        return (rows, num_groups, 1)

    def storage_bits(self, shape: Sequence[int]) -> float:
        """Bits a weight of `shape` takes: its codes, its scales with their second level, its zero points."""
        num_qparams = math.prod(self.qparam_shape(shape))
        scales = scale_bits(self.scale_dtype, num_qparams, with_minimum=self.zero_point == "minimum")
        zeros = num_qparams * self.number.storage_bits if self.zero_point == "integer" else 0
        return math.prod(shape) * self.number.storage_bits + scales + zeros


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} {value!r} is unknown: use {', '.join(allowed)}")
