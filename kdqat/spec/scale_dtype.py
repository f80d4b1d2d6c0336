"""What a scale is stored as, and how many bits that takes.

float32, float16, bfloat16   a plain number
e8m0         a power of two in one byte (OCP MX v1.0): 2^-127 ... 2^127
e4m3         an FP8 number without a second level (GGUF's NVFP4)
e4m3_global  FP8 e4m3 times one fp32 number for the whole tensor (NVFP4): scale = e4m3 / global_scale, with
             global_scale = 448 * 6 / absmax as compressed-tensors and vLLM store it
double       double quantization of QLoRA (arXiv 2305.14314): scale - mean in blocks of 256, each with an fp32
             absmax, on the signed 8-bit dynamic map of bitsandbytes
k6           llama.cpp's K-quants: 6-bit scales and minima, eight groups to a super-block with two fp16 numbers
"""

from __future__ import annotations

import math
from typing import Literal

ScaleDtype = Literal["float32", "float16", "bfloat16", "e8m0", "e4m3", "e4m3_global", "double", "k6"]

NESTED = ("e4m3_global", "double", "k6")  # these have a second level
PLAIN_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "e8m0": 8, "e4m3": 8}
DOUBLE_BLOCK = 256  # scales to a block of double quantization
SUPER_GROUPS = 8  # groups to a super-block of a K-quant


def scale_bits(dtype: ScaleDtype, num_scales: int, *, with_minimum: bool) -> int:
    """Bits that `num_scales` scales (and as many minima) take, the second level included."""
    count = num_scales * (2 if with_minimum else 1)
    if dtype == "e4m3_global":
        return 8 * count + 32
    if dtype == "double":
        return 8 * count + 32 * math.ceil(num_scales / DOUBLE_BLOCK) + 32
    if dtype == "k6":
        return 6 * count + 32 * (num_scales // SUPER_GROUPS)
    return PLAIN_BITS[dtype] * count
