"""Losses whose value and gradient one kernel computes on CUDA: weighted sums of forward KL and cross-entropy.

What `projected.value_and_grad` does for them with autograd, but in five passes over the chunk's logits instead of seven
(inductor) or fifteen (eager), and in the memory of the logits themselves. Other losses, other devices, heads with a
soft-cap, a logit scale or a cut vocabulary take the general way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdqat.losses.chunk import ClosedForm, TeacherChunk, Terms
from kdqat.quant.kernels import triton_runs_on

_BLOCK, _WARPS = 2048, 4  # what was fastest on an H200 of 1024 ... 16384 and 4 ... 32


class Factors(NamedTuple):
    """What each term weighs, and the one temperature beside 1."""

    tempered: float
    kl: float
    nll: float
    temperature: float


def factors_of(
    terms: Terms, transform: Callable[[Tensor], Tensor] | None, logits: Tensor, teacher: TeacherChunk
) -> Factors | None:
    """What the kernel needs to know of `terms`; None where it does not fit."""
    if not triton_runs_on(logits.device) or transform is not None or logits.dtype == torch.float64:
        return None
    if not (teacher is None or isinstance(teacher, Tensor)) or not terms.closed:
        return None
    sums = {"tempered": 0.0, "kl": 0.0, "nll": 0.0}
    temperatures = {form.temperature for form in terms.closed if form is not None} - {1.0}
    if None in terms.closed or len(temperatures) > 1:
        return None
    for form, weight in zip(terms.closed, terms.weights, strict=False):
        assert form is not None
        sums[_column(form)] += weight * form.temperature**2
    return Factors(**sums, temperature=temperatures.pop() if temperatures else 1.0)


def value_and_grad(
    terms: Terms, factors: Factors, logits: Tensor, teacher: Tensor | None, labels: Tensor, scale: float | None
) -> tuple[list[Tensor], Tensor | None]:
    """As `projected.value_and_grad`; the gradient lies where the logits were."""
    from kdqat.losses.kernels.triton_kernels import kl_nll_kernel  # triton takes a second to import

    out = torch.zeros(len(logits), 3, dtype=torch.float32, device=logits.device)
    temperature, factor = factors.temperature, 0.0 if scale is None else scale
    with torch.cuda.device_of(logits):  # Triton launches on the current device, whatever holds the tensor
        kl_nll_kernel[(len(logits),)](
            logits, logits if teacher is None else teacher, labels, out, logits.stride(0),
            0 if teacher is None else teacher.stride(0), 1 / temperature, factor * factors.tempered / temperature,
            factor * factors.kl, factor * factors.nll, TEACHER=teacher is not None, TEMPERED=temperature != 1.0,
            GRADIENT=scale is not None, VOCABULARY=logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    sums = dict(zip(("tempered", "kl", "nll"), out.sum(0), strict=True))
    values = [sums[_column(form)] * form.temperature**2 for form in terms.closed if form is not None]
    return values, None if scale is None else logits


def _column(form: ClosedForm) -> str:
    return "nll" if form.kind == "nll" else "kl" if form.temperature == 1.0 else "tempered"
