"""Fake quantization that keeps nothing for the backward pass but its inputs.

Composed of ordinary operations, fake quantization makes autograd keep several fp32 tensors of the weight's size
(rounded steps, masks): three times the memory of the bf16 weight. Here the backward pass computes them again from the
latent weight and the scale, which exist anyway. What a layer keeps is then what `nn.Linear` keeps under autocast: its
input, and one copy of the weight in the autocast dtype, which is the fake-quantized one.

Three ways, by what the quantizer is and where the tensor lies (`way_of`):

    fused       Triton kernels: one pass over the weight forward, one backward (`kernels/`)
    closed form pure torch; `functional.fake_quantize_backward`
    recomputed  quantizers with arithmetic of their own (`fake_quantize` overridden): run again under grad in backward
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdqat.quant import kernels
from kdqat.quant.functional import dequantize, fake_quantize_backward, quantize
from kdqat.quant.grouping import rotate
from kdqat.types import QParams

if TYPE_CHECKING:
    from kdqat.quant.quantizer import FakeQuantizer


def way_of(quantizer: FakeQuantizer, device: torch.device) -> str:
    """How `quantizer` computes on `device`: "fused", "closed form" or "recomputed"."""
    if quantizer.own_arithmetic:
        return "recomputed"
    return "fused" if kernels.fits(quantizer, device) else "closed form"


def describe_ways(model: nn.Module, device: torch.device) -> str:
    """One line for the log: how many fake quantizers of `model` compute in which way on `device`."""
    quantizers: list[Any] = [module for module in model.modules() if hasattr(module, "qparams")]
    ways = Counter(way_of(quantizer, device) for quantizer in quantizers)
    said = {"fused": "fused Triton kernels", "closed form": "pure torch", "recomputed": "running again in backward"}
    return "fake quantization: " + ", ".join(f"{count} by {said[way]}" for way, count in ways.items())


def fake_quantize_lean(quantizer: FakeQuantizer, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Fake-quantized `tensor` [.., I] in `dtype`, with gradients for the tensor and for what `quantizer` learns."""
    if quantizer.own_arithmetic:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the compiler recomputes by itself
            return quantizer.composed(tensor, dtype)
        return checkpoint(quantizer.composed, tensor, dtype, use_reentrant=False, preserve_rng_state=False)
    if quantizer.finds_range:
        return _FakeQuantize.apply(tensor, None, None, quantizer, dtype)
    scale, zero_point = quantizer.qparams(tensor if quantizer.skips_groups else quantizer.groups(tensor))
    return _FakeQuantize.apply(tensor, scale, zero_point, quantizer, dtype)


class _FakeQuantize(torch.autograd.Function):
    """Of a tensor [.., I] and scale and zero point as the method wants them, before they are rounded to be stored.

    Without a scale the range is read off the tensor, forward and backward; it is a constant for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        quantizer: FakeQuantizer,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.quantizer = quantizer
        ctx.learns = scale is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        # a plain STE on a range that learns nothing hands the gradient on: then nothing is kept at all
        keeps = ctx.learns or quantizer.ste != "plain"
        ctx.save_for_backward(*((tensor, scale, zero_point) if keeps else (None, None, None)))
        ctx.dtype = tensor.dtype
        fused, stored = kernels.fits(quantizer, tensor.device), _stored(quantizer, tensor, scale, zero_point)
        if fused:
            x, out_dtype = _rotated(tensor, quantizer), dtype if quantizer.spec.hadamard is None else torch.float32
            values = kernels.fake_quantize(x, stored, quantizer, out_dtype)
        else:
            assert stored is not None
            levels = quantize(quantizer.groups(tensor), stored, quantizer.grid, quantizer.spec)
            values = dequantize(levels, stored, quantizer.spec).reshape(tensor.shape)
        values = rotate(values, quantizer.spec.hadamard)
        # never a cast to the dtype there is: compiled by torch 2.11, a Function that ends in one has no gradient
        return values if values.dtype == dtype else values.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensor, scale, zero_point = ctx.saved_tensors
        quantizer: FakeQuantizer = ctx.quantizer
        if tensor is None:
            return grad.to(ctx.dtype), None, None, None, None
        spec = quantizer.spec
        stored = _stored(quantizer, tensor, scale, zero_point)
        if kernels.fits(quantizer, tensor.device):
            given = grad if spec.hadamard is None else rotate(grad.float(), spec.hadamard)
            x = _rotated(tensor, quantizer)
            wants = (ctx.needs_input_grad[0], ctx.learns)
            of_tensor, of_scale, of_zero = kernels.fake_quantize_backward(given, x, stored, quantizer, *wants)
        else:
            assert stored is not None
            found = fake_quantize_backward(
                quantizer.groups(grad), quantizer.groups(tensor), stored, quantizer.grid, spec, quantizer.ste
            )
            of_tensor, of_scale, of_zero = found[0].reshape(tensor.shape), found[1], found[2]
        wanted = None  # a frozen weight's
        if ctx.needs_input_grad[0]:
            wanted = rotate(of_tensor, spec.hadamard).to(tensor.dtype)  # the rotation is symmetric
        if not ctx.learns:
            return wanted, None, None, None, None
        if of_zero is not None and spec.zero_point == "integer":
            inside = (zero_point >= quantizer.qmin) & (zero_point <= quantizer.qmax)  # codes end there
            of_zero = of_zero * inside
        return wanted, _sum_to(of_scale, scale), _sum_to(of_zero, zero_point), None, None


def _stored(
    quantizer: FakeQuantizer, tensor: Tensor, scale: Tensor | None, zero_point: Tensor | None
) -> QParams | None:
    """Scale and zero point as they are stored, or as a kernel takes them that rounds them; None where it finds them."""
    kernel = quantizer.kernel if kernels.fits(quantizer, tensor.device) else None
    if scale is None or zero_point is None:
        if kernel is not None and kernel.live is not None:
            return None
        return quantizer.as_stored(quantizer.qparams(quantizer.groups(tensor)))
    if kernel is not None and kernel.rounds:
        return QParams(scale.float(), zero_point.float())
    return quantizer.as_stored(QParams(scale, zero_point))


def _rotated(tensor: Tensor, quantizer: FakeQuantizer) -> Tensor:
    return tensor if quantizer.spec.hadamard is None else rotate(tensor.float(), quantizer.spec.hadamard)


def _sum_to(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """`grad` [rows, N, G] summed to the shape of what was broadcast to it."""
    if grad is None or grad.shape == like.shape:
        return grad
    return grad.sum().reshape(like.shape) if like.numel() == 1 else grad.sum_to_size(like.shape)
