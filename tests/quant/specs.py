"""Every grid a QuantSpec can describe, for tests that hold for all of them."""

from __future__ import annotations

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


GRANULARITIES = ("tensor", "channel", "group")
ALL_GRIDS = [
    make_spec(bits, granularity, symmetric=symmetric)
    for bits in range(1, 9)
    for granularity in GRANULARITIES
    for symmetric in (True, False)
    if bits > 1 or not symmetric
]
SOME_GRIDS = [
    make_spec(4, "tensor"),
    make_spec(8, "channel", scale_dtype="bfloat16"),
    make_spec(4, "channel", scale_rule="absmax_half"),
    make_spec(4, "group", scale_rule="signed_max", scale_dtype="float16"),
    make_spec(2, "group"),
    make_spec(3, "tensor", symmetric=False),
    make_spec(4, "channel", symmetric=False, scale_dtype="float16"),
    make_spec(1, "group", symmetric=False),
]


def spec_id(spec: QuantSpec) -> str:
    kind = "sym" if spec.symmetric else "asym"
    return f"{spec.format}-{spec.granularity}-{kind}-{spec.scale_rule}-{spec.scale_dtype}"


def fixed(spec: QuantSpec, shape: tuple[int, ...], scale, zero_point=0.0) -> FakeQuantizer:
    """A quantizer with these qparams; numbers are spread over the whole shape."""
    quantizer = Fixed(spec, torch.Size(shape))
    full = quantizer.scale.shape
    quantizer.load_qparams(QParams(*(torch.as_tensor(x).float().expand(full) for x in (scale, zero_point))))
    return quantizer
