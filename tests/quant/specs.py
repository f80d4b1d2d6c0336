"""Every grid a QuantSpec can describe, for tests that hold for all of them. All of them fit 32 inputs."""

from __future__ import annotations

import math

import torch

from kdqat.quant import FakeQuantizer, Fixed
from kdqat.spec import QuantSpec
from kdqat.types import QParams


def make_spec(
    bits: int = 4, granularity: str = "channel", *, symmetric: bool = True, group_size: int = 8, **fields
) -> QuantSpec:
    return QuantSpec(
        format=f"int{bits}",
        granularity=granularity,
        group_size=group_size if granularity == "group" else None,
        symmetric=symmetric,
        zero_point="none" if symmetric else "integer",
        **fields,
    )


def block_spec(format: str, group_size: int, **fields) -> QuantSpec:
    return QuantSpec(format=format, granularity="group", group_size=group_size, **fields)


GRANULARITIES = ("tensor", "channel", "group")
ALL_GRIDS = [
    make_spec(bits, granularity, symmetric=symmetric)
    for bits in range(1, 9)
    for granularity in GRANULARITIES
    for symmetric in (True, False)
    if bits > 1 or not symmetric
]

_MINIMUM = {"symmetric": False, "zero_point": "minimum"}
INTEGER_GRIDS = [
    make_spec(4, "tensor"),
    make_spec(8, "channel", scale_dtype="bfloat16"),
    make_spec(4, "channel", scale_rule="absmax_half"),
    make_spec(4, "group", scale_rule="signed_max", scale_dtype="float16"),
    make_spec(2, "group"),
    make_spec(3, "channel", narrow=True),
    make_spec(3, "tensor", symmetric=False),
    make_spec(4, "channel", symmetric=False, scale_dtype="float16"),
    make_spec(1, "group", symmetric=False),
    block_spec("int4", 8, **_MINIMUM, scale_dtype="float16"),
    make_spec(4, "channel", hadamard=16),
]
LOW_BIT_GRIDS = [
    QuantSpec(format="int2", zero_point="half", scale_dtype="float16"),
    block_spec("ternary", 16, scale_rule="mean", scale_dtype="float16"),
    QuantSpec(format="binary", zero_point="half", scale_rule="mean"),
]
QUEST_GRIDS = [
    QuantSpec(format="int4", zero_point="half", scale_rule="gaussian", hadamard=16),
    block_spec("int2", 16, zero_point="half", scale_rule="gaussian", scale_dtype="float16"),
]
FLOAT_GRIDS = [
    QuantSpec(format="e2m1", scale_dtype="float16"),
    QuantSpec(format="e1m2", granularity="tensor"),
    QuantSpec(format="e3m0"),
    QuantSpec(format="e4m3"),
    QuantSpec(format="e5m2", granularity="tensor"),
    block_spec("e2m3", 32, scale_rule="mx", scale_dtype="e8m0"),  # MXFP6
    block_spec("e2m1", 16, scale_rule="mx", scale_dtype="e8m0"),  # MXFP4
]
CODEBOOK_GRIDS = [
    block_spec("nf4", 16),
    block_spec("codebook", 8, levels=(-1.5, -0.25, 0.0, 0.5, 2.0)),
]
NESTED_GRIDS = [  # scales with a second level
    block_spec("e2m1", 16, scale_dtype="e4m3_global"),  # NVFP4
    block_spec("nf4", 8, scale_dtype="double"),
    block_spec("int4", 4, scale_dtype="k6", **_MINIMUM),  # Q4_K, with groups of 4 instead of 32
]
SOME_GRIDS = INTEGER_GRIDS + LOW_BIT_GRIDS + QUEST_GRIDS + FLOAT_GRIDS + CODEBOOK_GRIDS

_TOKEN = {"granularity": "token", "dynamic": True}
DYNAMIC_GRIDS = [  # of activations
    QuantSpec(format="int8", **_TOKEN),
    QuantSpec(format="int4", **_TOKEN, symmetric=False, zero_point="integer"),
    QuantSpec(format="int4", **_TOKEN, zero_point="half", scale_rule="gaussian", hadamard=16),
    QuantSpec(format="e4m3", granularity="tensor", dynamic=True),
    block_spec("e2m1", 16, scale_dtype="e4m3_global", dynamic=True),
    block_spec("e2m1", 32, scale_rule="mx", scale_dtype="e8m0", dynamic=True),
]
STATIC_GRIDS = [  # of activations
    QuantSpec(format="int8", granularity="tensor", symmetric=False, zero_point="integer"),
    QuantSpec(format="e4m3", granularity="tensor"),
    QuantSpec(format="int8", granularity="feature"),
    QuantSpec(format="e2m1", granularity="feature", scale_rule="pre_shift"),
]


def spec_id(spec: QuantSpec) -> str:
    kind = {"none": "sym", "integer": "asym"}.get(spec.zero_point, spec.zero_point)
    more = [name for name in ("narrow", "dynamic", "hadamard") if getattr(spec, name)]
    return "-".join([spec.format, spec.granularity, kind, spec.scale_rule, spec.scale_dtype, *more])


def constant_error(spec: QuantSpec) -> float:
    """By how much a constant group may miss its constant, relatively: not every rule puts a level on its range."""
    if spec.format == "codebook":
        return 0.27  # its levels reach to 2 and only to -1.5
    if spec.hadamard:  # rotated, a constant is one outlier among zeros, which who clips may clip
        return math.inf if spec.zero_point == "half" else 0.26
    # half a step; 7/7.5; 6 of just below 8 steps; the rounding of the stored scale
    return {"gaussian": 0.5, "absmax_half": 0.07, "mx": 0.25}.get(spec.scale_rule, 0.01)


def fixed(spec: QuantSpec, shape: tuple[int, ...], scale, zero_point=0.0) -> FakeQuantizer:
    """A quantizer with these qparams; numbers are spread over the whole shape."""
    quantizer = Fixed(spec, torch.Size(shape))
    full = quantizer.scale.shape
    quantizer.load_qparams(QParams(*(torch.as_tensor(x).float().expand(full) for x in (scale, zero_point))))
    return quantizer
