"""How far a reader's logits may be from the student's: the tolerances, and the comparison.

Codes and scales are compared bit for bit; logits are what is left to engines, which add in another order and hold
weights in their own dtype. So they are judged by the coarser of the student's and the reader's dtype. A wrong layout
(swapped nibbles, rows not permuted) is off by orders of magnitude more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdqat.metrics import token_kl, top1_agreement
from kdqat.quant.kv import kv_caches
from kdqat.student import Student


@dataclass(frozen=True)
class Tolerance:
    """What may differ.

    Args:
        max_difference: between two logits, as a share of the largest magnitude among the student's.
        kl_mean, kl_p95: of KL(student; reader) per token, in nats.
    Top-1 is reported and not judged: where it differs, two logits were closer than `max_difference` allows.
    """

    max_difference: float
    kl_mean: float
    kl_p95: float


TOLERANCES = {
    "float32": Tolerance(max_difference=1e-4, kl_mean=1e-6, kl_p95=1e-5),
    "float16": Tolerance(max_difference=2e-2, kl_mean=1e-3, kl_p95=5e-3),
    "bfloat16": Tolerance(max_difference=1e-1, kl_mean=1e-2, kl_p95=5e-2),
}


def tolerance_for(*dtypes: str) -> tuple[str, Tolerance]:
    """The coarsest of `dtypes`, and its tolerance."""
    coarsest = max(dtypes, key=list(TOLERANCES).index)
    return coarsest, TOLERANCES[coarsest]


@torch.no_grad()
def answers_of(student: Student, input_ids: Tensor, *, activations: bool, kv_cache: bool = False) -> tuple[str, Tensor]:
    """("logits", [B, T, V]) of the student in float32; ("hidden", [B, T, H]) where it has no head.

    Args:
        student: on the CPU.
        activations: whether inputs and outputs of layers are quantized as the plan says.
        kv_cache: whether the KV cache is.
    """
    training = student.split.training
    student.split.eval()
    try:
        with _without(student, activations=not activations, kv_cache=not kv_cache):
            output = student.model(input_ids=input_ids, output_hidden_states=True)
    finally:
        student.split.train(training)
    if "logits" in output:
        return "logits", output.logits.float()
    return "hidden", output.hidden_states[-1].float()


def compare_answers(kind: str, ours: Tensor, read: Tensor) -> dict[str, float]:
    """{"max_difference", "largest"}, of logits also {"kl_mean", "kl_p95", "top1"}; `ours` and `read` [B, T, V]."""
    numbers = {"max_difference": float((ours - read).abs().max()), "largest": float(ours.abs().max())}
    if kind == "logits":
        a, b = ours.flatten(0, 1), read.flatten(0, 1)
        kl = token_kl(a, b).clamp_min(0)  # rounding makes tiny ones negative
        numbers |= {"kl_mean": float(kl.mean()), "kl_p95": float(kl.quantile(0.95))}
        numbers["top1"] = float(top1_agreement(a, b).float().mean())
    return numbers


def fault_of(kind: str, numbers: dict[str, float], tolerance: Tolerance) -> str | None:
    """The first number that is beyond the tolerance (NaN is), in words."""
    limits = {"max_difference": tolerance.max_difference * numbers["largest"]}
    limits |= {"kl_mean": tolerance.kl_mean, "kl_p95": tolerance.kl_p95} if kind == "logits" else {}
    for name, limit in limits.items():
        if not numbers[name] <= limit:
            return f"{kind}: {name} {numbers[name]:.3g} is above {limit:.3g}"
    return None


@contextmanager
def _without(student: Student, *, activations: bool, kv_cache: bool) -> Iterator[None]:
    """Leave inputs and outputs of layers, and KV caches, in full precision inside the block, as wanted."""
    layers = student.layers if activations else {}
    caches = list(kv_caches(student.model).values()) if kv_cache else []
    before: list[tuple[Any, dict[str, Any]]] = []
    for layer in layers.values():
        kinds = {"activation": layer.activation_fake_quantizer, "output": layer.output_fake_quantizer}
        before.append((layer, {kind: quantizer for kind, quantizer in kinds.items() if quantizer is not None}))
    states = [cache.fake_quantize for cache in caches]
    try:
        for layer, kinds in before:
            layer.replace_quantizers(**dict.fromkeys(kinds))
        for cache in caches:
            cache.fake_quantize = False
        yield
    finally:
        for layer, kinds in before:
            layer.replace_quantizers(**kinds)
        for cache, state in zip(caches, states, strict=True):
            cache.fake_quantize = state
