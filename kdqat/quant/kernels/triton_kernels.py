"""The arithmetic of `functional.py` in Triton: one pass over a tensor forward, one backward.

A program handles GROUPS groups of G elements, each padded to PAD lanes, in fp32. Ranges of live tensors are found in
the same pass. Results are those of the pure functions bit for bit: divisions round to nearest, ties go to even, and a
product is not fused with a sum that follows it.

Constants: KIND 0 integer, 1 minifloat, 2 codebook. ZERO 0 none, 1 integer, 2 minimum. STE 0 plain, 1 clipped, 2 trust,
3 attenuated. RULE 0 scale given, 1 absmax, 2 absmax_half, 3 signed_max, 4 mx, 5 least and largest. STORED 0 fp32,
1 fp16, 2 bf16, 3 rounded already (by pure torch; scales of rule mx are powers of two).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _round(x):
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left rounds to even; |x| < 2^22


@triton.jit
def _clamp(x, low, high):
    """torch.clamp: what is not a number stays none."""
    up = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(up, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _binade(x):
    return ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _float_step(x, mantissa_ptr, exponent_ptr):
    return _power_of_two(tl.maximum(_binade(x), tl.load(exponent_ptr)) - tl.load(mantissa_ptr))


@triton.jit
def _nearest(x, mantissa_ptr, exponent_ptr, levels_ptr, KIND: tl.constexpr, HALF: tl.constexpr, LEVELS: tl.constexpr):
    if KIND == 0:
        if HALF:
            return _round(x - 0.5) + 0.5
        else:
            return _round(x)
    elif KIND == 1:
        step = _float_step(x, mantissa_ptr, exponent_ptr)
        return _round(x / step) * step  # powers of two: any division is exact
    else:
        code = tl.zeros(x.shape, dtype=tl.int32)
        for i in tl.static_range(LEVELS - 1):
            middle = (tl.load(levels_ptr + i + 1) + tl.load(levels_ptr + i)) / 2
            code += (x > middle).to(tl.int32)
        return tl.load(levels_ptr + code)


@triton.jit
def _in_dtype(x, STORED: tl.constexpr):
    """Rounded to fp16 or bf16, an infinite number to the largest."""
    if STORED == 1:
        return _clamp(x, -65504.0, 65504.0).to(tl.float16).to(tl.float32)
    elif STORED == 2:
        return _clamp(x, -3.3895313892515355e38, 3.3895313892515355e38).to(tl.bfloat16).to(tl.float32)
    else:
        return x


@triton.jit
def _as_stored(scale, zero, ZERO: tl.constexpr, STORED: tl.constexpr):
    """`FakeQuantizer.as_stored`: away from zero, then in the stored dtype."""
    if STORED != 3:
        floor = 5.960464477539063e-08  # scales.SCALE_FLOOR
        scale = _in_dtype(tl.where(scale < 0, _clamp(scale, scale, -floor), _clamp(scale, floor, float("inf"))), STORED)
        if ZERO == 2:
            zero = _in_dtype(zero, STORED)
    return scale, zero


@triton.jit
def _live_range(x, inside, low, high, RULE: tl.constexpr, ZERO: tl.constexpr, TINY: tl.constexpr):
    """Scale and zero point [GROUPS, 1] that the spec's rule gives x: `ranges.choose_qparams`."""
    zero = tl.zeros([x.shape[0], 1], dtype=tl.float32)
    if RULE == 5 or RULE == 3:
        least = tl.min(tl.where(inside, x, float("inf")), axis=1, keep_dims=True)
        largest = tl.max(tl.where(inside, x, float("-inf")), axis=1, keep_dims=True)
        if RULE == 3:
            scale = tl.div_rn(tl.where(-least >= largest, least, largest), low + tl.zeros_like(least))
        else:
            if ZERO == 1:
                least, largest = tl.minimum(least, 0.0), tl.maximum(largest, 0.0)
            scale = tl.div_rn(largest - least, (high - low) + tl.zeros_like(least))
            zero = least
            if ZERO == 1:
                zero = _round(low - tl.div_rn(least, tl.where(scale == 0, 1.0, scale)))
                zero = tl.minimum(tl.maximum(zero, low), high)
    else:
        absmax = tl.max(tl.where(inside, tl.abs(x), 0.0), axis=1, keep_dims=True)
        if RULE == 4:
            exponent = tl.minimum(tl.maximum(_binade(absmax) - _binade(high), -126), 127)
            scale = tl.where(absmax == 0, 0.0, _power_of_two(exponent))
        elif RULE == 2:
            scale = tl.div_rn(absmax, (high + 0.5) + tl.zeros_like(absmax))
        else:
            scale = tl.div_rn(absmax, high + tl.zeros_like(absmax))
    scale = tl.where(scale == 0, 1.1754943508222875e-38 if TINY else 1.0, scale)
    return scale, zero


@triton.jit
def _qparams(
    x, inside, group, num_groups, scale_ptr, zero_ptr, low, high, PER_TENSOR: tl.constexpr, RULE: tl.constexpr,
    ZERO: tl.constexpr, TINY: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Scale and zero point [GROUPS, 1] as they are stored, given or found in x."""
    if RULE == 0:
        at = group * 0 if PER_TENSOR else group
        scale = tl.load(scale_ptr + at, mask=group < num_groups, other=1.0)
        zero = tl.load(zero_ptr + at, mask=group < num_groups, other=0.0)
        if ZERO == 1:
            zero = _round(_clamp(zero, low, high))
    else:
        scale, zero = _live_range(x, inside, low, high, RULE, ZERO, TINY)
    return _as_stored(scale, zero, ZERO, STORED)


@triton.jit
def _tile(num_groups, G: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr):
    """Numbers of this program's groups [GROUPS, 1], element offsets and mask [GROUPS, PAD]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, PAD)[None, :]
    return group, group * G + lane, (group < num_groups) & (lane < G)


@triton.jit
def fake_quantize_kernel(
    x_ptr, out_ptr, scale_ptr, zero_ptr, low_ptr, high_ptr, mantissa_ptr, exponent_ptr, levels_ptr, num_groups,
    G: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr, PER_TENSOR: tl.constexpr, KIND: tl.constexpr,
    HALF: tl.constexpr, LEVELS: tl.constexpr, ZERO: tl.constexpr, RULE: tl.constexpr, STORED: tl.constexpr,
    TINY: tl.constexpr,
):  # fmt: skip
    group, offset, inside = _tile(num_groups, G, PAD, GROUPS)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    low, high = tl.load(low_ptr), tl.load(high_ptr)
    scale, zero = _qparams(
        x, inside, group, num_groups, scale_ptr, zero_ptr, low, high, PER_TENSOR, RULE, ZERO, TINY, STORED
    )
    wide = scale + tl.zeros_like(x)  # div_rn takes equal shapes
    if ZERO == 2:
        level = _clamp(tl.div_rn(x - zero, wide), low, high)
        product = scale * _nearest(level, mantissa_ptr, exponent_ptr, levels_ptr, KIND, HALF, LEVELS)
        y = tl.where(inside, product, 0.0) + zero  # a choice in between: the compiler would fuse them otherwise
    else:
        if ZERO == 1:
            low, high = low - zero, high - zero
        level = _clamp(tl.div_rn(x, wide), low, high)
        y = scale * _nearest(level, mantissa_ptr, exponent_ptr, levels_ptr, KIND, HALF, LEVELS)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, of_x_ptr, of_scale_ptr, of_zero_ptr, scale_ptr, zero_ptr, low_ptr, high_ptr, mantissa_ptr,
    exponent_ptr, levels_ptr, num_groups, G: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr,
    PER_TENSOR: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, LEVELS: tl.constexpr, ZERO: tl.constexpr,
    RULE: tl.constexpr, STORED: tl.constexpr, TINY: tl.constexpr, STE: tl.constexpr, WEIGHT: tl.constexpr,
    LEARNS: tl.constexpr,
):  # fmt: skip
    """`functional.fake_quantize_backward`, summed over each group; the range is found again if it was live."""
    group, offset, inside = _tile(num_groups, G, PAD, GROUPS)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    low, high = tl.load(low_ptr), tl.load(high_ptr)
    scale, zero = _qparams(
        x, inside, group, num_groups, scale_ptr, zero_ptr, low, high, PER_TENSOR, RULE, ZERO, TINY, STORED
    )
    wide = scale + tl.zeros_like(x)
    steps = tl.div_rn(x - zero, wide) if ZERO == 2 else tl.div_rn(x, wide)
    if ZERO == 1:
        low, high = low - zero, high - zero
    clipped = _clamp(steps, low, high)
    level = _nearest(clipped, mantissa_ptr, exponent_ptr, levels_ptr, KIND, HALF, LEVELS)
    through, of_bounds = grad, tl.zeros_like(grad)
    if STE == 1:
        through, of_bounds = tl.where(steps == clipped, grad, 0.0), tl.where(steps == clipped, 0.0, grad)
    if STE >= 2:
        gap = _float_step(clipped, mantissa_ptr, exponent_ptr) * 0.5 if KIND == 1 else tl.full(x.shape, 0.5, tl.float32)
        distance = tl.abs(level - steps)
        if STE == 2:
            through = tl.where(distance <= gap, grad, 0.0)
        else:
            share = tl.minimum(tl.maximum(tl.div_rn(gap - distance, 0.25 * gap), 0.0), 1.0)
            of_bounds = tl.where(steps == clipped, 0.0, grad * share)
            through = tl.where(steps == clipped, grad * share, 0.0)
    if WEIGHT:
        tl.store(of_x_ptr + offset, through.to(of_x_ptr.dtype.element_ty), mask=inside)
    if LEARNS:
        of_scale = tl.sum(grad * level - through * steps, axis=1, keep_dims=True)
        tl.store(of_scale_ptr + group, of_scale, mask=group < num_groups)
        if ZERO == 2:
            tl.store(of_zero_ptr + group, tl.sum(grad - through, axis=1, keep_dims=True), mask=group < num_groups)
        if ZERO == 1:
            of_zero = -scale * tl.sum(of_bounds, axis=1, keep_dims=True)
            tl.store(of_zero_ptr + group, of_zero, mask=group < num_groups)
