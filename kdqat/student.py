"""The student: a model with a plan in it. Prepared from a source, saved to a folder, loaded from one.

A saved student is a plain Hugging Face folder of latent weights (transformers loads it as it is) with three files of
ours beside them: `quant_plan.json`, `quantizers.safetensors` (scales and zero points as stored) and `student.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kdqat.allocate import BitAllocator
from kdqat.files import write_text
from kdqat.initializers import Initializer
from kdqat.models import ModelSource, SplitModel, block_prefix, layer_refs
from kdqat.quant import (
    Coverage,
    FakeQuantLinear,
    Fixed,
    MinMax,
    QuantizerFactory,
    apply_plan,
    fake_quant_layers,
    measure_coverage,
    require_coverage,
)
from kdqat.spec import PLAN_FILE, QuantPlan
from kdqat.types import BlockView, QParams

log = logging.getLogger(__name__)

QPARAMS_FILE, STUDENT_FILE = "quantizers.safetensors", "student.json"


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
    def layers(self) -> dict[str, FakeQuantLinear]:
        """Its fake-quantized layers, by name."""
        return fake_quant_layers(self.model)

    def summary(self) -> dict[str, Any]:
        """Bits and coverage, as plain data for the log, the run directory and the tables."""
        refs = layer_refs(self.model)
        return {
            "layers": len(self.plan),
            "ignored": list(self.coverage.ignored),
            "average_bits": round(self.plan.average_bits(refs), 4),
            "nominal_bits": round(self.plan.nominal_bits(refs), 4),
            "share_full_precision": round(self.coverage.share_full_precision, 6),
        }


def prepare_student(
    source: ModelSource,
    allocator: BitAllocator,
    quantizer: QuantizerFactory,
    initializer: Initializer,
    *,
    split: SplitModel | None = None,
    tokenizer: Any = None,
) -> Student:
    """Load, plan, swap, initialize.

    Args:
        split, tokenizer: the model and tokenizer of `source`, where they are loaded already; the model is changed.

    Raises:
        ValueError: if the model cannot be had, the plan does not fit, or matmul weights would be left out unasked.
    """
    split = split if split is not None else SplitModel(source.load_model())
    tokenizer = tokenizer if tokenizer is not None else source.load_tokenizer()
    plan = allocator.allocate(layer_refs(split.model))
    apply_plan(split.model, plan, quantizer)
    coverage = measure_coverage(split.model, set(plan.ignored).__contains__)
    require_coverage(coverage)
    for block in block_views(split.model):
        initializer.initialize(block)
    student = Student(split, tokenizer, source, plan, coverage)
    log.info("plan: %d layers, %.3f bits a weight counted with scales; %s", len(plan), _bits(student), coverage)
    return student


def block_views(model: nn.Module) -> Iterator[BlockView]:
    """The fake-quantized layers of `model` block by block; those outside the blocks (lm_head) come last."""
    prefix = block_prefix(model)
    views: dict[int | None, dict[str, FakeQuantLinear]] = {}
    outside: dict[str, FakeQuantLinear] = {}
    for name, layer in fake_quant_layers(model).items():
        if name.startswith(prefix):
            views.setdefault(int(name.removeprefix(prefix).split(".")[0]), {})[name] = layer
        else:
            outside[name] = layer
    for index, layers in views.items():
        yield BlockView(index, layers)
    if outside:
        yield BlockView(None, outside)


@contextmanager
def as_rtn(student: Student) -> Iterator[Student]:
    """The student as the plain RTN baseline: absmax scales of its latent weights, same formats and groups.

    It is the baseline only while the latent weights are still the source's, that is before training.
    """
    before = {name: layer.weight_fake_quantizer for name, layer in student.layers.items()}
    for layer in student.layers.values():
        if layer.weight_fake_quantizer is not None:
            spec = replace(layer.weight_fake_quantizer.spec, scale_rule="absmax")
            layer.weight_fake_quantizer = MinMax(spec, layer.weight.shape).to(layer.weight.device)
    try:
        yield student
    finally:
        for name, layer in student.layers.items():
            layer.weight_fake_quantizer = before[name]


def stored_bytes(student: Student) -> dict[str, int]:
    """Size as it will be stored: planned weights by their spec, everything else in 16 bits, tied tensors once.

    Returns:
        {"student": bytes, "teacher": bytes of the same model wholly in 16 bits}.
    """
    planned = {id(layer.weight): layer.weight_fake_quantizer.spec for layer in student.layers.values()
               if layer.weight_fake_quantizer is not None}  # fmt: skip
    ours = {id(p) for layer in student.layers.values() if layer.weight_fake_quantizer is not None
            for p in layer.weight_fake_quantizer.parameters()}  # fmt: skip
    bits = full = 0
    for parameter in student.model.parameters():  # names a tied tensor once
        if id(parameter) in ours:
            continue
        full += parameter.numel() * 16
        spec = planned.get(id(parameter))
        bits += parameter.numel() * 16 if spec is None else spec.storage_bits(parameter.shape)
    return {"student": (bits + 7) // 8, "teacher": full // 8}


def plain_state(student: Student) -> dict[str, torch.Tensor]:
    """The model's tensors under their Hugging Face names, the quantizers' own left out; latent weights."""
    return {k: v for k, v in student.model.state_dict().items() if "_fake_quantizer." not in k}


def save_student(student: Student, folder: Path) -> None:
    """Write the student into the empty `folder`: latent weights, scales as stored, plan, tokenizer."""
    student.model.save_pretrained(folder, state_dict=plain_state(student))
    student.tokenizer.save_pretrained(folder)
    student.plan.save(folder)
    qparams: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, layer in student.layers.items():
            if layer.weight_fake_quantizer is not None:
                stored = layer.weight_fake_quantizer.stored_qparams(layer.weight)
                qparams[f"{name}.scale"] = stored.scale.contiguous().cpu()
                qparams[f"{name}.zero_point"] = stored.zero_point.contiguous().cpu()
    save_file(qparams, folder / QPARAMS_FILE)
    about = {"source": asdict(student.source), "coverage": asdict(student.coverage), **student.summary()}
    write_text(folder / STUDENT_FILE, json.dumps(about, indent=1))


def load_student(folder: Path, quantizer: QuantizerFactory = Fixed) -> Student:
    """Read what `save_student` wrote.

    Args:
        quantizer: Fixed computes with the scales as stored; another factory takes them as its start.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    for file in (PLAN_FILE, QPARAMS_FILE, STUDENT_FILE, "config.json"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: {file} is missing, so this is no saved student; `kdqat quantize` writes one")
    try:
        about = json.loads((folder / STUDENT_FILE).read_text())
        qparams = load_file(folder / QPARAMS_FILE)
        origin, coverage = ModelSource(**about["source"]), Coverage(**about["coverage"])
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: {QPARAMS_FILE} or {STUDENT_FILE} is damaged ({error}); write it anew") from error
    here = ModelSource(str(folder), origin.dtype, trust_remote_code=origin.trust_remote_code)
    split = SplitModel(here.load_model())
    plan = QuantPlan.load(folder)
    apply_plan(split.model, plan, quantizer)
    for name, layer in fake_quant_layers(split.model).items():
        if layer.weight_fake_quantizer is not None and layer.weight_fake_quantizer.uses_stored_qparams:
            try:
                stored = QParams(qparams[f"{name}.scale"], qparams[f"{name}.zero_point"])
                layer.weight_fake_quantizer.load_qparams(stored)
            except (KeyError, ValueError) as error:
                raise ValueError(f"{folder}: {QPARAMS_FILE} does not fit {PLAN_FILE}: layer {name}: {error}") from error
    return Student(split, here.load_tokenizer(), origin, plan, coverage)


def _bits(student: Student) -> float:
    return student.plan.average_bits(layer_refs(student.model))
