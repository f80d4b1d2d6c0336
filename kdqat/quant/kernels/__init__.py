"""Fused fake quantization on CUDA: the pure functions of `functional.py` as Triton kernels, picked by device.

One pass reads the latent weight, finds its range where the quantizer takes it from the data, and writes the
fake-quantized weight in the dtype that the matmul wants: about what the plain cast of autocast costs. One pass in the
backward direction gives the gradients of weight, scale and zero point. Integers, minifloats and codebooks; scales for a
channel, group, token or tensor. What does not fit takes the pure functions: `feature` scales, codebooks under "trust"
and "attenuated", groups of more than MAX_GROUP elements. Triton is imported when a CUDA tensor first asks.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kdqat.quant.functional import STE
from kdqat.types import QParams

if TYPE_CHECKING:
    from kdqat.quant.quantizer import FakeQuantizer

MAX_GROUP = 32768
DEVICES = ("cuda",)  # and "cpu" under Triton's interpreter, in tests
AVAILABLE = importlib.util.find_spec("triton") is not None
_KINDS = {"integer": 0, "float": 1, "codebook": 2}
_ZEROS = {"none": 0, "half": 0, "integer": 1, "minimum": 2}
_STES: dict[STE, int] = {"plain": 0, "clipped": 1, "trust": 2, "attenuated": 3}
_RULES = {"absmax": 1, "absmax_half": 2, "signed_max": 3, "mx": 4}
_STORED = {"float32": 0, "float16": 1, "bfloat16": 2}  # dtypes of scales that kernels round to
_ROUNDED = 3


class Kernel(NamedTuple):
    """What the kernels must know of a quantizer at compile time; made once, so that torch.compile has nothing to trace.

    `constants` in the order of `ops._launch`; `live` likewise, for a kernel that finds the range itself, if it can.
    `rounds`: the kernel rounds scale and zero point to what is stored.
    """

    constants: tuple[int, ...]
    live: tuple[int, ...] | None
    ste: int
    rounds: bool


def kernel_for(quantizer: FakeQuantizer) -> Kernel | None:
    """The kernel that computes what `quantizer` does; None: the pure functions do."""
    spec, grid = quantizer.spec, quantizer.grid
    group = spec.group_size or quantizer.shape[-1]
    if quantizer.own_arithmetic or spec.granularity == "feature" or group > MAX_GROUP:
        return None
    if grid.kind == "codebook" and quantizer.ste in ("trust", "attenuated"):
        return None
    per_tensor, levels = spec.granularity == "tensor", 0 if grid.levels is None else grid.levels.numel()
    first = (group, int(per_tensor), _KINDS[grid.kind], int(grid.offset != 0.0), levels, _ZEROS[spec.zero_point])
    last = (_STORED.get(spec.scale_dtype, _ROUNDED), int(spec.zero_point == "half"))
    rule = _RULES.get(spec.scale_rule, 0) if spec.symmetric else 5
    exact = spec.scale_dtype in _STORED or (spec.scale_dtype == "e8m0" and rule == _RULES["mx"])
    finds = quantizer.finds_range and rule and exact and not per_tensor
    live = (*first, rule, *last) if finds else None
    return Kernel((*first, 0, *last), live, _STES[quantizer.ste], spec.scale_dtype in _STORED)


def triton_runs_on(device: torch.device) -> bool:
    """Whether there is a Triton, and kernels for `device`."""
    return device.type in DEVICES and AVAILABLE


def fits(quantizer: FakeQuantizer, device: torch.device) -> bool:
    """Whether the kernels compute what `quantizer` does, on `device`."""
    return quantizer.kernel is not None and triton_runs_on(device)


def fake_quantize(x: Tensor, stored: QParams | None, quantizer: FakeQuantizer, dtype: torch.dtype) -> Tensor:
    """Fake-quantized x [.., I] in `dtype`, under `stored` qparams, or under the range of x where there are none."""
    ops, arguments = _ops(), (x, *_tensors(stored, quantizer), _constants(quantizer, stored), dtype)
    if _as_operators(x):
        return ops.fake_quantize_op(*arguments)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever holds the tensor
        return ops.fake_quantize(*arguments)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, stored: QParams | None, quantizer: FakeQuantizer, weight: bool, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, empty unless it (`weight`) wants one, and, if the quantizer `learns`, of scale and zero point, in
    the scale's shape but [groups] of a tensor's scale (None: no gradient)."""
    assert quantizer.kernel is not None
    ops, constants = _ops(), _constants(quantizer, stored)
    arguments = (grad, x, *_tensors(stored, quantizer), constants, quantizer.kernel.ste, weight, learns)
    if _as_operators(x):
        of_x, of_scale, of_zero = ops.backward_op(*arguments)
    else:
        with torch.cuda.device_of(x):
            of_x, of_scale, of_zero = ops.fake_quantize_backward(*arguments)
    if stored is None or not learns:
        return of_x, None, None
    shape = stored.scale.shape if stored.scale.numel() == of_scale.numel() else of_scale.shape
    has_zero = not quantizer.spec.symmetric and quantizer.spec.zero_point in ("integer", "minimum")
    return of_x, of_scale.reshape(shape), of_zero.reshape(shape) if has_zero else None


def _as_operators(x: Tensor) -> bool:
    """Whether there is nothing to launch on: under the compiler, and for tensors without values (the planner's)."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def _ops() -> Any:
    from kdqat.quant.kernels import ops  # triton takes a second to import, and CPUs have none

    return ops


def _tensors(stored: QParams | None, quantizer: FakeQuantizer) -> tuple[Tensor | None, ...]:
    scale, zero_point = stored if stored is not None else (None, None)
    grid = quantizer.grid
    return scale, zero_point, grid.low, grid.high, grid.mantissa_bits, grid.min_exponent, grid.levels


def _constants(quantizer: FakeQuantizer, stored: QParams | None) -> list[int]:
    assert quantizer.kernel is not None
    constants = quantizer.kernel.live if stored is None else quantizer.kernel.constants
    assert constants is not None
    return list(constants)
