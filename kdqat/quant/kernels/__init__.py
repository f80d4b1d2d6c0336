"""Fused fake quantization on CUDA: the pure functions of `functional.py` as Triton kernels, picked by device.

One pass reads the latent weight, finds its range where the quantizer takes it from the data, and writes the
fake-quantized weight in the dtype that the matmul wants: about what the plain cast of autocast costs. One pass in the
backward direction gives the gradients of weight, scale and zero point. Integers, minifloats and codebooks; scales for a
channel, group, token or tensor. What does not fit takes the pure functions: `feature` scales, codebooks under "trust"
and "attenuated", groups of more than MAX_GROUP elements. Triton is imported when a CUDA tensor first asks.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdqat.quant.functional import STE
from kdqat.types import QParams

if TYPE_CHECKING:
    from kdqat.quant.quantizer import FakeQuantizer

MAX_GROUP = 32768
DEVICES = ("cuda",)  # and "cpu" under Triton's interpreter, in tests
_KINDS = {"integer": 0, "float": 1, "codebook": 2}
_ZEROS = {"none": 0, "half": 0, "integer": 1, "minimum": 2}
_STES: dict[STE, int] = {"plain": 0, "clipped": 1, "trust": 2, "attenuated": 3}
_RULES = {"absmax": 1, "absmax_half": 2, "signed_max": 3, "mx": 4}
_STORED = {"float32": 0, "float16": 1, "bfloat16": 2, "e8m0": 3}


def fits(quantizer: FakeQuantizer, device: torch.device) -> bool:
    """Whether the kernels compute what `quantizer` does, on `device`."""
    spec = quantizer.spec
    if device.type not in DEVICES or quantizer.own_arithmetic or spec.granularity == "feature" or not available():
        return False
    if spec.number.kind == "codebook" and quantizer.ste in ("trust", "attenuated"):
        return False
    return _group(quantizer) <= MAX_GROUP


def finds_range(quantizer: FakeQuantizer) -> bool:
    """Whether a kernel that fits also finds the range of a live tensor, as the spec's rule and storage want it."""
    spec = quantizer.spec
    if not quantizer.live_range or spec.granularity == "tensor" or spec.scale_dtype not in _STORED:
        return False
    if not spec.symmetric:
        return spec.scale_dtype != "e8m0"
    return spec.scale_rule in _RULES and (spec.scale_dtype == "e8m0") == (spec.scale_rule == "mx")


def fake_quantize(x: Tensor, stored: QParams | None, quantizer: FakeQuantizer, dtype: torch.dtype) -> Tensor:
    """Fake-quantized x [.., I] in `dtype`, under `stored` qparams, or under the range of x where there are none."""
    return _ops().fake_quantize(x, *_tensors(stored, quantizer), _constants(quantizer, stored is None), dtype)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, stored: QParams | None, quantizer: FakeQuantizer, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, and, if the quantizer `learns`, of scale and zero point, in the scale's shape but [groups] of a
    tensor's scale (None: no gradient)."""
    of_x, of_scale, of_zero = _ops().fake_quantize_backward(
        grad, x, *_tensors(stored, quantizer), _constants(quantizer, stored is None), _STES[quantizer.ste], learns
    )
    if stored is None or not learns:
        return of_x, None, None
    shape = stored.scale.shape if stored.scale.numel() == of_scale.numel() else of_scale.shape
    has_zero = not quantizer.spec.symmetric and quantizer.spec.zero_point in ("integer", "minimum")
    return of_x, of_scale.reshape(shape), of_zero.reshape(shape) if has_zero else None


@cache
def available() -> bool:
    """Whether there is a Triton to import."""
    return importlib.util.find_spec("triton") is not None


def _ops() -> Any:
    from kdqat.quant.kernels import ops  # triton takes a second to import, and CPUs have none

    return ops


def _group(quantizer: FakeQuantizer) -> int:
    return quantizer.spec.group_size or quantizer.shape[-1]


def _tensors(stored: QParams | None, quantizer: FakeQuantizer) -> tuple[Tensor | None, ...]:
    scale, zero_point = stored if stored is not None else (None, None)
    grid = quantizer.grid
    return scale, zero_point, grid.low, grid.high, grid.mantissa_bits, grid.min_exponent, grid.levels


def _constants(quantizer: FakeQuantizer, live: bool) -> list[int]:
    """The compile-time constants of the kernels, in the order of `ops._launch`."""
    spec, grid = quantizer.spec, quantizer.grid
    rule = 0 if not live else _RULES[spec.scale_rule] if spec.symmetric else 5
    return [
        _group(quantizer),
        int(spec.granularity == "tensor"),
        _KINDS[grid.kind],
        int(grid.offset != 0.0),
        0 if grid.levels is None else grid.levels.numel(),
        _ZEROS[spec.zero_point],
        rule,
        _STORED.get(spec.scale_dtype, 0),
        int(spec.zero_point == "half"),
    ]
