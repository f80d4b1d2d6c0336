"""Schemes as Hugging Face's optimum-quanto chooses them: the group size depends on the width of a layer.

A plan fixes the group size of every layer, so the choice is made while planning: one scheme for each input width.
"""

from __future__ import annotations

from kdqat.spec.layer_scheme import LayerScheme
from kdqat.spec.quant_spec import QuantSpec
from kdqat.spec.scale_dtype import ScaleDtype

LARGEST_GROUP, GROUP_STEP = 128, 32


def quanto_group_size(width: int) -> int | None:
    """128, or as many times 32 less as it takes to divide `width`; None: not even 32 does, a scale for each output."""
    for group_size in range(LARGEST_GROUP, 0, -GROUP_STEP):
        if width % group_size == 0:
            return group_size
    return None


def quanto_scheme(bits: int, width: int, *, scale_dtype: ScaleDtype = "float16") -> LayerScheme:
    """What quanto stores for a layer with `width` inputs: int2 and int4 with a minimum for each group, int8 symmetric
    by channel. Go with the initializer `QuantoMax`.

    Args:
        scale_dtype: of scale and minimum; quanto keeps the dtype of the model.

    Raises:
        ValueError: for other bits.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"quanto has 2, 4 and 8 bits, not {bits}")
    if bits == 8:
        return LayerScheme(weight=QuantSpec(format="int8", scale_dtype=scale_dtype))
    group_size = quanto_group_size(width)
    return LayerScheme(
        weight=QuantSpec(
            format=f"int{bits}",
            granularity="channel" if group_size is None else "group",
            group_size=group_size,
            symmetric=False,
            zero_point="minimum",
            scale_dtype=scale_dtype,
        )
    )
