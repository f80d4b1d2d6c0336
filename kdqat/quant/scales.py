"""What a scale is stored as: rounding it there, with a second level where the format has one.

`fit` chooses the second level (NVFP4's global scale, the blocks of double quantization, the super-blocks of K-quants)
once, when scales are set; `round_scale` and `round_minimum` put numbers on the grid that this second level spans. All
are plain functions of tensors without gradients; the quantizer puts `functional.replace_ste` around them.

Letters: scale [O, N, 1], [O, 1, 1] or [1]; S groups to a super-block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdqat.quant.dynamic_map import DYNAMIC_MAP
from kdqat.quant.formats import power_of_two
from kdqat.spec.scale_dtype import DOUBLE_BLOCK, SUPER_GROUPS, ScaleDtype

SecondLevel = Mapping[str, Tensor]

# Smallest magnitude a scale may have: the smallest fp16 number. A learned scale that crosses zero stays finite.
SCALE_FLOOR = 2.0**-24
_E4M3_MAX, _E4M3_MIN = 448.0, 2.0**-9
_K6_MAX = 63
_GLOBAL_FLOOR = 2.0**-100  # of a tensor of zeros: its global scale and its scales stay normal fp32 numbers


def second_level_shapes(dtype: ScaleDtype, scale_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the second level's tensors; empty for formats that have none.

    e4m3_global: global_scale [1]. double: scale_mean [1], scale_absmax [blocks of 256 scales]. k6: super_scale and
    super_minimum [O, N / 8, 1].
    """
    if dtype == "e4m3_global":
        return {"global_scale": (1,)}
    if dtype == "double":
        num_scales = torch.Size(scale_shape).numel()
        return {"scale_mean": (1,), "scale_absmax": (-(-num_scales // DOUBLE_BLOCK),)}
    if dtype == "k6":
        rows, num_groups, _ = scale_shape
        super_shape = (rows, num_groups // SUPER_GROUPS, 1)
        return {"super_scale": super_shape, "super_minimum": super_shape}
    return {}


def fit(dtype: ScaleDtype, scale: Tensor, minimum: Tensor | None = None) -> dict[str, Tensor]:
    """The second level for these scales (and minima, where the format has them)."""
    if dtype == "e4m3_global":
        # the number compressed-tensors stores: the largest scale falls on 448
        return {"global_scale": (_E4M3_MAX / scale.amax().clamp(min=_GLOBAL_FLOOR)).reshape(1)}
    if dtype == "double":
        mean = scale.mean().reshape(1)
        return {"scale_mean": mean, "scale_absmax": _blocks(scale - mean).abs().amax(1)}
    if dtype == "k6":
        assert minimum is not None
        super_scale = _super(scale).amax(2) / _K6_MAX
        super_minimum = _super(-minimum).clamp(min=0).amax(2) / _K6_MAX
        return {"super_scale": _half(super_scale), "super_minimum": _half(super_minimum)}
    return {}


def round_scale(dtype: ScaleDtype, scale: Tensor, second: SecondLevel) -> Tensor:
    """`scale` as it will be read back, fp32, never zero; no gradient."""
    if dtype in ("float32", "float16", "bfloat16"):
        return _round_to_dtype(_away_from_zero(scale), getattr(torch, dtype))
    if dtype == "e8m0":
        return power_of_two(torch.log2(scale.clamp(min=2.0**-126)).round().clamp(-126, 127).to(torch.int32))
    if dtype in ("e4m3", "e4m3_global"):
        divisor = second["global_scale"] if dtype == "e4m3_global" else scale.new_ones(1)
        return _e4m3(scale * divisor) / divisor  # divided, as compressed-tensors reads it
    if dtype == "double":
        return decode_double(encode_double(scale, second), second).reshape(scale.shape)
    assert dtype == "k6"
    codes = _k6_codes(scale, second["super_scale"], smallest=1)
    return _unsuper(codes * second["super_scale"].unsqueeze(2))


def round_minimum(dtype: ScaleDtype, minimum: Tensor, second: SecondLevel) -> Tensor:
    """The minimum of an asymmetric group as it will be read back, fp32; no gradient."""
    if dtype == "k6":
        codes = _k6_codes(-minimum, second["super_minimum"], smallest=0)
        return -_unsuper(codes * second["super_minimum"].unsqueeze(2))
    return _round_to_dtype(minimum, getattr(torch, dtype))


def encode_double(scale: Tensor, second: SecondLevel) -> Tensor:
    """Codes 0 ... 255 of double quantization, [num_scales]."""
    table = torch.tensor(DYNAMIC_MAP, device=scale.device)
    absmax = second["scale_absmax"].unsqueeze(1)
    normal = _blocks(scale - second["scale_mean"]) / torch.where(absmax == 0, 1.0, absmax)
    codes = torch.bucketize(normal.clamp(-1, 1), (table[1:] + table[:-1]) / 2)
    return codes.flatten()[: scale.numel()]


def decode_double(codes: Tensor, second: SecondLevel) -> Tensor:
    """Scales [num_scales] of the codes of double quantization."""
    table = torch.tensor(DYNAMIC_MAP, device=codes.device)
    values = _blocks(table[codes]) * second["scale_absmax"].unsqueeze(1)
    decoded = values.flatten()[: codes.numel()] + second["scale_mean"]
    return _away_from_zero(decoded)


@torch.library.custom_op("kdqat::round_to_dtype", mutates_args=())
def _opaque_round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x on the grid of `dtype`, as fp32. Opaque to torch.compile, whose inductor drops the way to fp16 and back: it
    keeps fused values in fp32, and the student would train with scales that no file stores."""
    return x.to(dtype).float()


@_opaque_round.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


def _round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return x
    largest = torch.finfo(dtype).max
    x = x.clamp(-largest, largest)  # an infinite scale would make NaN of every zero
    return _opaque_round(x, dtype) if torch.compiler.is_compiling() else x.to(dtype).float()


def _e4m3(x: Tensor) -> Tensor:
    """x on the positive numbers of e4m3, subnormals included, never 0."""
    return _round_to_dtype(x.clamp(_E4M3_MIN, _E4M3_MAX), torch.float8_e4m3fn)


def _away_from_zero(scale: Tensor) -> Tensor:
    """|scale| >= SCALE_FLOOR with its sign: signed_max scales may be negative."""
    return torch.where(scale < 0, scale.clamp(max=-SCALE_FLOOR), scale.clamp(min=SCALE_FLOOR))


def _half(x: Tensor) -> Tensor:
    return _round_to_dtype(x.clamp(min=SCALE_FLOOR), torch.float16)


def _blocks(flat: Tensor) -> Tensor:
    """Any shape -> [blocks, 256], the last block filled with zeros."""
    flat = flat.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % DOUBLE_BLOCK)).reshape(-1, DOUBLE_BLOCK)


def _super(groups: Tensor) -> Tensor:
    """[O, N, 1] -> [O, N / S, S, 1]."""
    return groups.reshape(groups.shape[0], -1, SUPER_GROUPS, 1)


def _unsuper(groups: Tensor) -> Tensor:
    return groups.reshape(groups.shape[0], -1, 1)


def _k6_codes(x: Tensor, super_scale: Tensor, *, smallest: int) -> Tensor:
    return (_super(x) / super_scale.unsqueeze(2)).round().clamp(smallest, _K6_MAX)
