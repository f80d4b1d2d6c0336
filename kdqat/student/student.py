"""The student: a model with a plan in it, what it takes on disk, and the same model as the RTN baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdqat.models import ModelSource, SplitModel, plannable_refs
from kdqat.quant import Coverage, FakeQuantizer, LoraAdapter, MinMax, QuantizedLayer, fake_quant_layers
from kdqat.spec import QuantPlan
from kdqat.types import LayerRef


@dataclass
class Student:
    """A fake-quantized model and what belongs to it."""

    split: SplitModel
    tokenizer: Any
    source: ModelSource
    plan: QuantPlan
    coverage: Coverage

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self.split.model

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """Its fake-quantized layers, by name."""
        return fake_quant_layers(self.model)

    @property
    def refs(self) -> list[LayerRef]:
        """What its fake-quantized layers are for and where, input embeddings last."""
        layers = self.layers
        return [ref for ref in plannable_refs(self.model) if ref.name in layers]

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """The adapters of its layers, by the layer's name; empty for a student that is nothing but its layers."""
        return {name: layer.adapter for name, layer in self.layers.items() if layer.adapter is not None}

    def summary(self) -> dict[str, Any]:
        """Bits and coverage, as plain data for the log, the run directory and the tables."""
        refs = plannable_refs(self.model)
        return {
            "layers": len(self.plan),
            "ignored": list(self.coverage.ignored),
            "average_bits": round(self.plan.average_bits(refs), 4),
            "nominal_bits": round(self.plan.nominal_bits(refs), 4),
            "share_full_precision": round(self.coverage.share_full_precision, 6),
        }


@contextmanager
def as_rtn(student: Student) -> Iterator[Student]:
    """The student as the plain RTN baseline: absmax scales of its latent weights, same formats and groups.

    Formats with a rule of their own (MX: powers of two; binary and ternary: mean magnitude) keep it; activations too.

    It is the baseline only while the latent weights are still the source's, that is before training.
    """
    before = {name: layer.weight_fake_quantizer for name, layer in student.layers.items()}
    for layer in student.layers.values():
        if layer.weight_fake_quantizer is not None:
            spec = layer.weight_fake_quantizer.spec
            if spec.scale_rule in ("absmax_half", "signed_max", "gaussian"):
                spec = replace(spec, scale_rule="absmax")
            layer.replace_quantizers(weight=MinMax(spec, layer.matrix_shape).to(layer.weight.device))
    try:
        yield student
    finally:
        for name, layer in student.layers.items():
            quantizer = before[name]  # the model may have gone to an accelerator without it
            layer.replace_quantizers(weight=None if quantizer is None else quantizer.to(layer.weight.device))


def plain_state(student: Student) -> dict[str, torch.Tensor]:
    """The model's tensors under their Hugging Face names, those of quantizers and adapters left out; latent weights."""
    ours = ("_fake_quantizer.", ".adapter.lora_")
    return {k: v for k, v in student.model.state_dict().items() if not any(part in k for part in ours)}


def stored_bytes(student: Student) -> dict[str, int]:
    """Size as it will be stored: planned weights by their spec, everything else in 16 bits, tied tensors once.

    An adapter outside is part of the student; one inside will be merged.

    Returns:
        {"student": bytes, "teacher": bytes of the same model wholly in 16 bits}.
    """
    planned = {
        id(layer.weight): layer.weight_fake_quantizer.spec.storage_bits(layer.matrix_shape)
        for layer in student.layers.values()
        if layer.weight_fake_quantizer is not None
    }
    modules = [module for module in student.model.modules() if isinstance(module, (FakeQuantizer, LoraAdapter))]
    ours = {id(p) for module in modules for p in module.parameters()}
    outside = [adapter for adapter in student.adapters.values() if adapter.placement == "outside"]
    bits, full = 16.0 * sum(p.numel() for adapter in outside for p in adapter.parameters()), 0.0
    for parameter in student.model.parameters():  # names a tied tensor once
        if id(parameter) in ours:
            continue
        full += parameter.numel() * 16
        bits += planned.get(id(parameter), parameter.numel() * 16)
    return {"student": math.ceil(bits / 8), "teacher": math.ceil(full / 8)}
