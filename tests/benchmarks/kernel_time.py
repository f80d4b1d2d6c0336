"""What fake quantization alone costs on a GPU, beside the cast of autocast that it takes the place of: microseconds.

    python tests/benchmarks/kernel_time.py [PRESET ...]

A weight of 8192 x 8192, fp32 to bf16, learned scales; medians of `triton.testing.do_bench`. The backward pass is what a
layer runs: gradients of the weight and of its scales.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import triton

from kdqat.quant import LSQ, kernels
from kdqat.quant.lean import way_of
from kdqat.spec import preset
from kdqat.types import QParams

PRESETS = ("W4A16", "W4A16_G128", "W4A16_ASYM_G128", "MXFP4", "NVFP4_A16", "NF4")


def main(*presets: str) -> None:
    weight = torch.randn(8192, 8192, device="cuda")
    grad = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    casts = time(lambda: weight.bfloat16()), time(lambda: grad.float())
    print(f"{'plain cast':20s} forward {casts[0]:6.0f} backward {casts[1]:6.0f}")
    for name in presets or PRESETS:
        spec = preset(name).weight
        assert spec is not None
        quantizer = LSQ(spec, weight.shape).cuda()
        quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(weight)))
        assert way_of(quantizer, weight.device) == "fused"
        stored = QParams(quantizer.scale.detach(), quantizer.zero_point.detach())
        forward = time(partial(kernels.fake_quantize, weight, stored, quantizer, torch.bfloat16))
        backward = time(partial(kernels.fake_quantize_backward, grad, weight, stored, quantizer, True, True))
        print(f"{name:20s} forward {forward:6.0f} backward {backward:6.0f}", flush=True)


def time(work: Callable[[], object]) -> float:
    """Microseconds, the median."""
    return 1000 * triton.testing.do_bench(work, return_mode="median")


if __name__ == "__main__":
    main(*sys.argv[1:])
