"""The student and the teacher as shapes: built on the meta device, planned and swapped as the real ones are."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from kdqat.models import FrozenTeacher, SplitModel, blocks_of, layer_refs, plannable_refs
from kdqat.quant import FakeQuantExperts, FakeQuantizer, MinMax, measure_coverage
from kdqat.student import Student
from kdqat.student.prepare import install_plan
from kdqat.training.edits import Observer, Steer, edits_among
from kdqat.training.module import KDQATModule
from kdqat.training.trainable import freeze_all_but_scales, require_weights_at_rest
from kdqat.types import EMBEDDING


@dataclass(frozen=True)
class Counts:
    """Numbers of elements; tied tensors once."""

    parameters: int  # the model's own
    trainable: int  # of all parameters
    scales: int  # trainable ones of fake quantizers, zero points among them
    quantized: int  # weights with a fake quantizer
    full_precision: int  # the model's own parameters without one


def meta_student(module: KDQATModule, callbacks: Sequence[L.Callback] = ()) -> SplitModel:
    """The module's student in training mode on the meta device, with its plan; nothing is calibrated or initialized.

    Args:
        callbacks: of the run. The student is edited by copies of the edits, which keep nothing of it; the others are
            asked whether the layers they choose are there.

    Raises:
        ValueError: as preparing the real one would.
    """
    split = SplitModel(module.source.load_meta())
    if not split.family.causal:
        raise ValueError(f"model {module.source.path}: only causal language models can be trained, not encoders")
    plan = module.student.plan if module.student else module.allocator.allocate(plannable_refs(split.model))
    install_plan(split.model, plan, module.quantizer, module.activation_quantizer)
    _looped_experts(split.model)
    if module.trainable == "scales":
        freeze_all_but_scales(split)
    student = Student(split, None, module.source, plan, measure_coverage(split.model, set(plan.ignored).__contains__))
    for edit in edits_among(callbacks):
        copy.copy(edit).edit(student)
    for callback in callbacks:
        if isinstance(callback, Observer | Steer):
            callback.require_matches(student)
    require_weights_at_rest(module.teacher, split)
    if module.loss is not None and "attentions" in module.loss.wants:
        split.use_eager_attention()
    return split.train()


def meta_teacher(module: KDQATModule, teacher: FrozenTeacher) -> SplitModel:
    """A live teacher on the meta device, frozen."""
    split = SplitModel(_looped_experts(teacher.own_source(module.source).load_meta()))
    if module.loss is not None and "attentions" in module.loss.wants:
        split.use_eager_attention()
    split.eval().requires_grad_(False)
    return split


def count(split: SplitModel) -> Counts:
    """How many parameters there are of which kind."""
    scales = {id(p): p for q in _quantizers(split) for p in q.parameters()}
    own = {id(p): p for p in split.parameters() if id(p) not in scales}
    quantized = {id(p) for name, p in split.named_parameters() if id(p) in own and _has_quantizer(split, name)}
    trainable = [p for p in (*own.values(), *scales.values()) if p.requires_grad]
    return Counts(
        parameters=sum(p.numel() for p in own.values()),
        trainable=sum(p.numel() for p in trainable),
        scales=sum(p.numel() for p in scales.values() if p.requires_grad),
        quantized=sum(own[key].numel() for key in quantized),
        full_precision=sum(p.numel() for key, p in own.items() if key not in quantized),
    )


def nbytes(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Bytes of a module's parameters (and buffers), shared ones once."""
    tensors: list[Tensor] = list(module.parameters())
    tensors = [t for t in tensors if t.requires_grad] if trainable_only else [*tensors, *module.buffers()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def block_bytes(split: SplitModel) -> list[int]:
    """Bytes of each block."""
    return [nbytes(block) for block in blocks_of(split.model)]


def matmul_parameters(split: SplitModel) -> tuple[int, int]:
    """(weights a token is multiplied with inside the blocks, and in the head); of experts those that are chosen."""
    config = split.model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    inside = outside = 0.0
    for ref in layer_refs(split.model):
        numel = math.prod(ref.shape) * (share if ".experts." in ref.name else 1.0)
        if ref.role == "lm_head":
            outside += numel
        elif ref.role != EMBEDDING:
            inside += numel
    return round(inside), round(outside)


def dtype_bytes(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype, device="meta").element_size()


def _looped_experts(model: nn.Module) -> nn.Module:
    """Plain experts as kdqat's, one after the other: the kernels of transformers look at how tokens were routed."""
    for name, part in list(model.named_modules()):
        if FakeQuantExperts.wraps(part) and not isinstance(part, FakeQuantExperts):
            model.set_submodule(name, FakeQuantExperts.wrap(part, {}, MinMax))
    return model


def _quantizers(split: SplitModel) -> list[FakeQuantizer]:
    return [module for module in split.modules() if isinstance(module, FakeQuantizer)]


def _has_quantizer(split: SplitModel, name: str) -> bool:
    owner, _, own = name.rpartition(".")
    module = split.get_submodule(owner)
    label = "weight_fake_quantizer" if own == "weight" else f"{own}_fake_quantizer"
    return own != "bias" and getattr(module, label, None) is not None
