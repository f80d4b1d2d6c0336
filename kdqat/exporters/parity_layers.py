"""What a reader read of every layer against what the student has: codes and scales bit for bit, weights rounded once.

A reader whose format has codes answers with codes and scales (and zero points, where there are any) and usually with
weights as it will multiply by them; a format of plain floats has weights only. Every planned layer must be answered,
and every other tensor of the model as the format holds it (of tied ones one), and no tensor that the student has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kdqat.quant import FakeQuantizer
from kdqat.quant.kv import kv_caches
from kdqat.quant.swap import QuantizedLayer
from kdqat.student import Student, plain_state

Stored = Callable[[str, Tensor], Tensor]
KINDS = ("codes", "scales", "zero_points", "weights")


@dataclass
class LayerFindings:
    """How many numbers were compared and how many differ, of each kind; a line for every layer that differs."""

    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {k: {"compared": 0, "changed": 0} for k in KINDS})
    faults: list[str] = field(default_factory=list)

    def compare(self, kind: str, name: str, read: Tensor, ours: Tensor) -> None:
        """Count where `read` differs from `ours` as numbers; shapes may differ by ones."""
        if read.numel() != ours.numel():
            self.faults.append(f"{name}: {kind} of shape {tuple(read.shape)} read, {tuple(ours.shape)} expected")
            return
        read = read.reshape(ours.shape)
        differs = read.double() != ours.double()  # no number of any format is rounded by it; NaN differs from all
        changed = int(differs.sum())
        counts = self.counts.setdefault(kind, {"compared": 0, "changed": 0})
        counts["compared"] += ours.numel()
        counts["changed"] += changed
        if changed:
            where = tuple(differs.nonzero()[0].tolist())
            self.faults.append(
                f"{name}: {changed} of {ours.numel()} {kind.replace('_', ' ')} differ, the first at {list(where)}: "
                f"{read[where].item():.9g} read, {ours[where].item():.9g} trained"
            )


@torch.no_grad()
def compare_layers(
    student: Student, answer: Path, compute_dtype: str, *, stored: Stored | None = None, kv_cache: bool = False
) -> LayerFindings:
    """Compare every tensor of `answer` with the student's; layers in the model's order, then all others.

    Args:
        student: on the CPU.
        answer: safetensors file with KIND/NAME tensors, KIND one of `KINDS`. Codes in uint8 count from 0 whatever the
            grid, as do their zero points.
        compute_dtype: in which the reader holds weights.
        stored: key and tensor -> what the format holds of it where the plan leaves it alone, an exporter's `stored`;
            None: its rounding to `compute_dtype`.
        kv_cache: whether the reader must answer with the scales of the KV cache, `scales/ATTENTION.key` and `.value`.
    """
    findings, dtype, layers = LayerFindings(), getattr(torch, compute_dtype), student.layers
    stored = stored or (lambda _, value: value.to(dtype) if value.is_floating_point() else value)
    with safe_open(answer, framework="pt") as tensors:
        read: dict[str, set[str]] = {}
        for key in tensors.keys():  # noqa: SIM118 - no mapping
            kind, _, name = key.partition("/")
            if kind in KINDS:
                read.setdefault(name, set()).add(kind)
        state = {key.removesuffix(".weight"): value for key, value in plain_state(student).items()}
        tied = {_place(value) for name, value in state.items() if name in read}
        for name, layer in layers.items():
            kinds = read.pop(name, set())
            if not kinds and _place(layer.weight) in tied:
                continue  # the other name of what was answered
            if not ({"codes", "scales"} <= kinds or "weights" in kinds):
                findings.faults.append(f"{name}: the reader answered with neither codes and scales nor weights")
            answered = {kind: tensors.get_tensor(f"{kind}/{name}") for kind in KINDS if kind in kinds}
            if layer.weight_fake_quantizer is None:
                expected = {"weights": layer.as_matrix(stored(f"{name}.weight", layer.dequantized_weight()))}
            else:
                expected = expected_of(layer, dtype, of_codes="codes" in kinds)
                if "codes" in kinds and answered["codes"].dtype == torch.uint8:
                    expected |= _from_zero(layer, expected)
            for kind, given in answered.items():
                if kind == "weights" and given.shape == layer.weight.shape:
                    given = layer.as_matrix(given)
                if kind not in expected:
                    findings.faults.append(f"{name}: {kind} read, where the plan quantizes no weight")
                    continue
                findings.compare(kind, name, given, expected[kind])
        for name, quantizer in _cache_quantizers(student).items() if kv_cache else ():
            if "scales" in read.pop(name, set()):
                scale = quantizer.stored_qparams(quantizer.scale.new_zeros(quantizer.shape)).scale
                findings.compare("scales", name, tensors.get_tensor(f"scales/{name}"), scale)
            else:
                findings.faults.append(f"{name}: the reader answered without the scale of this cache")
        for name, value in state.items():
            if name in layers:
                continue
            if read.pop(name, set()) == {"weights"}:
                key = name if name.endswith(".bias") else f"{name}.weight"
                findings.compare("weights", name, tensors.get_tensor(f"weights/{name}"), stored(key, value))
            elif _place(value) not in tied:
                findings.faults.append(f"{name}: the reader answered without this tensor")
        findings.faults += [f"{name}: the student has no such tensor" for name in sorted(read)]
    return findings


def _place(value: Tensor) -> tuple[Any, ...]:
    """The same of tensors that are tied."""
    return value.data_ptr(), tuple(value.shape)


def _from_zero(layer: QuantizedLayer, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes and zero points of a signed grid as formats without signs count them; {} of other grids."""
    assert layer.weight_fake_quantizer is not None
    spec = layer.weight_fake_quantizer.spec
    if not spec.symmetric or spec.number.kind != "integer":
        return {}
    return {kind: expected[kind] + 2 ** (int(spec.bits) - 1) for kind in ("codes", "zero_points")}


def _cache_quantizers(student: Student) -> dict[str, FakeQuantizer]:
    """Fake quantizers of keys and values by their attention module's name and "key" or "value"."""
    caches = kv_caches(student.model).items()
    return {f"{owner}.{part}": quantizer for owner, cache in caches for part, quantizer in cache.quantizers().items()}


def expected_of(layer: QuantizedLayer, dtype: torch.dtype, *, of_codes: bool = True) -> dict[str, Tensor]:
    """What a lossless format holds of the quantized `layer`: KIND -> tensor, weights [O, I] as read in `dtype`.

    Args:
        of_codes: the format holds codes, of which a reader makes weights whatever the latent ones' dtype is; else it
            holds what the student multiplies by, which latent weights of 16 bits round to these.
    """
    quantizer, matrix = layer.weight_fake_quantizer, layer.latent_matrix()
    assert quantizer is not None
    stored, codes = quantizer.stored_qparams(matrix), quantizer.codes(matrix)
    outside = layer.adapter is not None and layer.adapter.placement == "outside"  # it is added to plain weights
    exact = (of_codes or layer.weight.dtype == torch.float32) and not outside
    weights = quantizer.values(codes, stored) if exact else layer.as_matrix(layer.dequantized_weight())
    return {"codes": codes, "scales": stored.scale, "zero_points": stored.zero_point, "weights": weights.to(dtype)}
