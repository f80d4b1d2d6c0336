"""How well an approximated tensor keeps the signal of its reference: the signal-to-quantization-noise ratio.

SQNR = 10 log10(|x|^2 / |x - x_hat|^2) in dB. As a rule 6.02 dB are worth one bit of a uniform quantizer
(Bennett 1948), which makes layers of different scale comparable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, approximation: Tensor) -> Tensor:
    """SQNR of `approximation` to `reference` (same shape, any) in dB, 0-D, fp32 (float64 for float64 input).

    It stays on the device. Equal tensors give +inf, a zero reference that is not met gives -inf.

    Raises:
        ValueError: if the shapes differ; broadcasting would give a plausible wrong number.
    """
    if reference.shape != approximation.shape:
        raise ValueError(
            f"sqnr_db compares tensors of one shape, not {tuple(reference.shape)} and "
            f"{tuple(approximation.shape)}: reshape them first"
        )
    dtype = torch.promote_types(reference.dtype, torch.float32)
    reference, approximation = reference.to(dtype), approximation.to(dtype)
    signal = torch.linalg.vector_norm(reference)
    noise = torch.linalg.vector_norm(reference - approximation)
    # a zero reference met exactly would be log10(0 / 0)
    return torch.where(noise == 0, torch.inf, 20 * (signal.log10() - noise.log10()))
