"""Number formats: what the codes of a tensor mean, in units of their scale. Plain data, no torch.

Three kinds, one contract: value = scale * level, and a format says which levels there are.

    integer    int1 ... int8, ternary, binary: whole numbers, or halves without a zero (`QuantSpec.zero_point="half"`)
    float      eXmY minifloats: sign, X exponent bits, Y mantissa bits, bias 2^(X-1)-1, subnormals. Every code is a
               number, but in the two OCP FP8 formats: e4m3 has one NaN per sign (largest 448), e5m2 Inf and NaN (57344)
    codebook   nf4 (QLoRA, arXiv 2305.14314), or the levels that a spec lists itself

Sources: OCP Microscaling Formats (MX) v1.0 for E2M1, E2M3, E3M2, E4M3, E5M2 and E8M0; LLM-FP4 (arXiv 2310.16836,
eqs. 1-3) for any split of the bits without Inf and NaN codes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

Kind = Literal["integer", "float", "codebook"]

# Normal quantiles, in the fp32 numbers that bitsandbytes stores (functional.get_4bit_type).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NumberFormat:
    """One number format.

    Attributes:
        name: as in `QuantSpec.format`.
        kind: integer, float or codebook.
        bits: width of a code; the information in it for ternary (log2 3).
        storage_bits: bits a code takes in the densest common packing (ternary: five to a byte).
        exponent_bits, mantissa_bits, bias, max_value: of a float.
        levels: of a codebook, ascending; the code is the index.
    """

    name: str
    kind: Kind
    bits: float
    storage_bits: float
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    max_value: float = 0.0
    levels: tuple[float, ...] = ()

    @cached_property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number of a float; subnormals share its step."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number: emax of the MX specification."""
        return math.frexp(self.max_value)[1] - 1

    def code_values(self) -> tuple[float, ...]:
        """Value of every storage code, in code order; NaN and infinities where a float has them.

        Floats: sign, exponent and mantissa from the highest bit down. Codebooks: the levels. Integers: see
        `QuantSpec.qrange`, their codes are the numbers themselves.
        """
        if self.kind == "codebook":
            return self.levels
        if self.kind == "integer":
            raise ValueError(f"{self.name}: the codes of an integer format are its numbers")
        half = [self._magnitude(code) for code in range(2 ** (self.exponent_bits + self.mantissa_bits))]
        return (*half, *(-value for value in half))

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        fraction = mantissa / 2**self.mantissa_bits
        if exponent == 0:
            return math.ldexp(fraction, self.min_exponent)
        value = math.ldexp(1 + fraction, exponent - self.bias)
        if value <= self.max_value:
            return value
        return math.inf if self.name == "e5m2" and mantissa == 0 else math.nan


@lru_cache(maxsize=256)
def number_format(name: str, levels: tuple[float, ...] | None = None) -> NumberFormat:
    """The format called `name`: int1 ... int8, ternary, binary, eXmY, nf4, or codebook with `levels`.

    eXmY has 1 + X + Y <= 8 bits and X >= 1; "e4m3_finite" and "e5m2_finite" use all codes as numbers (LLM-FP4).

    Raises:
        ValueError: for an unknown name, or levels that are none.
    """
    if name == "codebook":
        return NumberFormat(name, "codebook", *_codebook_bits(levels), levels=levels or ())
    if levels is not None:
        raise ValueError(f"levels go with format 'codebook', not with {name!r}")
    if match := re.fullmatch(r"int([1-8])", name):
        return NumberFormat(name, "integer", int(match[1]), int(match[1]))
    if name == "binary":
        return NumberFormat(name, "integer", 1, 1)
    if name == "ternary":
        return NumberFormat(name, "integer", math.log2(3), 8 / 5)
    if name == "nf4":
        return NumberFormat(name, "codebook", 4, 4, levels=NF4)
    if match := re.fullmatch(r"e([1-7])m([0-6])(_finite)?", name):
        exponent_bits, mantissa_bits = int(match[1]), int(match[2])
        if 1 + exponent_bits + mantissa_bits <= 8:
            return _minifloat(name, exponent_bits, mantissa_bits, finite=match[3] is not None)
    raise ValueError(
        f"format {name!r} is unknown: use int1 ... int8, ternary, binary, nf4, a minifloat such as e2m1, e4m3 or e3m2 "
        "(at most 8 bits, the sign included), or codebook with levels"
    )


def _minifloat(name: str, exponent_bits: int, mantissa_bits: int, *, finite: bool) -> NumberFormat:
    bits = 1 + exponent_bits + mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    top = 2**exponent_bits - 1 - bias  # exponent of the last binade
    largest = math.ldexp(2 - 2.0**-mantissa_bits, top)
    if name == "e4m3":
        largest = 448.0
    elif name == "e5m2":
        largest = 57344.0
    elif finite and (exponent_bits, mantissa_bits) not in ((4, 3), (5, 2)):
        raise ValueError(f"format {name!r}: only e4m3 and e5m2 have codes that are no numbers; leave _finite out")
    return NumberFormat(name, "float", bits, bits, exponent_bits, mantissa_bits, bias, largest)


def _codebook_bits(levels: tuple[float, ...] | None) -> tuple[int, int]:
    if not levels or len(levels) < 2 or len(levels) > 256 or list(levels) != sorted(set(levels)):
        raise ValueError("format 'codebook' needs levels: 2 to 256 different numbers in ascending order")
    if not all(math.isfinite(level) for level in levels):
        raise ValueError("format 'codebook': levels must be finite")
    bits = math.ceil(math.log2(len(levels)))
    return bits, bits
