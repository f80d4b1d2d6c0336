"""One pass of teacher and student over a small batch, and the energies of gradients in it.

The pass runs under the trainer's autocast, draws no random number and touches no `.grad`: gradients are taken with
respect to outputs, by `autograd.grad`. It is collective under FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch

from kdqat.losses import CrossEntropy, DistillLoss
from kdqat.models import CachedTeacher, SplitModel, Teacher
from kdqat.quant import FakeQuantConv1D, FakeQuantLinear, full_precision
from kdqat.training.probe.capture import Seen, watched
from kdqat.training.probe.energy import gradient_energies
from kdqat.training.probe.plain import constant_weights, plainly
from kdqat.training.probe.stacks import Values
from kdqat.types import EMBEDDING, Batch, LayerRef, Outputs

FP16_SCALE = 1024.0  # times the sum over tokens: gradients of activations are in autocast's dtype

Context = Callable[[], AbstractContextManager[Any]]  # the autocast of the student's pass


class Answered(NamedTuple):
    """What a teacher and its layers answered."""

    outputs: Any  # as `Teacher.outputs`
    seen: Seen


class ProbePass(NamedTuple):
    """What one pass saw; `loss` and `cross_entropy` hold energies where gradients were wanted."""

    student: Seen
    answered: Answered | None
    loss: Values
    cross_entropy: Values

    @property
    def teacher(self) -> Seen | None:
        return None if self.answered is None else self.answered.seen


def require_live(teacher: Teacher | None, who: str) -> None:
    """
    Raises:
        ValueError: if there is no teacher, or only answers of one; asked before anything is loaded.
    """
    if teacher is None or isinstance(teacher, CachedTeacher):
        name = "none" if teacher is None else f"a {type(teacher).__name__}"
        raise ValueError(
            f"{who} asks a live teacher about a probe batch, and model.teacher is {name}: use a FrozenTeacher, leave "
            f"{who} out of trainer.callbacks (GradientLog works without its probe: probe_every_n_steps: null), or run "
            "`kdqat signals` on the run afterwards"
        )


def live_split(teacher: Teacher | None, who: str) -> SplitModel:
    """The model of a teacher that computes its answers.

    Raises:
        ValueError: if there is none.
    """
    require_live(teacher, who)
    split = getattr(teacher, "split", None)
    if not isinstance(split, SplitModel):
        raise ValueError(f"{who}: a {type(teacher).__name__} has no model (`split`) to look into; use a FrozenTeacher")
    return split


def probed_layers(model: SplitModel, refs: Sequence[LayerRef], layers: dict[str, Any]) -> list[LayerRef]:
    """Those of `refs` that a forward pass of the body calls as modules with outputs [B, T, O]: not the head (its
    training gradient says more), embeddings or experts."""
    head = model.family.head
    kinds = (FakeQuantLinear, FakeQuantConv1D)
    return [
        ref
        for ref in refs
        if isinstance(layers.get(ref.name), kinds)
        and ref.role != EMBEDDING
        and not (head and f"{ref.name}.".startswith(f"{head}."))
    ]


def probe_pass(
    student: SplitModel,
    batch: Batch,
    names: Sequence[str],
    *,
    teacher: Teacher | None,
    loss: DistillLoss | None,
    context: Context,
    attention: bool = False,
    gradients: bool = False,
    cross_entropy: bool = False,
    answered: Answered | None = None,
) -> ProbePass:
    """Run teacher and student once.

    Args:
        names: layers to look at.
        loss: what gradients are of.
        context: the trainer's autocast.
        attention: look at attention too.
        gradients: energies of the loss's gradient.
        cross_entropy: with them, those of the cross-entropy's.
        answered: what the teacher said when it was asked the same; then it is not asked again.
    """
    wants = loss.wants if loss is not None else frozenset()
    eager = attention or "attentions" in wants
    with ExitStack() as until_all_is_known:  # a teacher's head is called by the loss
        until_all_is_known.enter_context(context())
        if teacher is not None and answered is None:
            split = live_split(teacher, "the probe")
            renamed = {_plain_name(name): name for name in names}
            until_all_is_known.enter_context(plainly(split, eager_attention=eager))
            with watched(split.model, renamed, attention=attention) as seen:
                answer = teacher.outputs(batch, wants)
            outputs = {renamed.get(name, name): output for name, output in seen.outputs.items()}
            answered = Answered(answer, seen._replace(outputs=outputs))
        until_all_is_known.enter_context(plainly(student, eager_attention=eager))
        until_all_is_known.enter_context(torch.set_grad_enabled(gradients))
        until_all_is_known.enter_context(constant_weights(map(student.model.get_submodule, names)))
        with watched(student.model, names, attention=attention, differentiable=gradients) as ours:
            outputs_of_student = student(batch, wants)
        of_loss: Values = {}
        of_labels: Values = {}
        theirs: Any = None if answered is None else answered.outputs
        if gradients and loss is not None:
            of_loss = energies_of(loss, outputs_of_student, theirs, batch, ours, keep_graph=cross_entropy)
        if gradients and cross_entropy:
            of_labels = energies_of(CrossEntropy(), outputs_of_student, None, batch, ours)
    return ProbePass(ours, answered, of_loss, of_labels)


def full_precision_energies(split: SplitModel, batch: Batch, names: Sequence[str], context: Context) -> Values:
    """Energies of the cross-entropy's gradient in the full-precision model, the teacher's."""
    with context(), plainly(split), full_precision(split), torch.enable_grad():
        with watched(split.model, names, differentiable=True) as seen:
            outputs = split(batch)
        return energies_of(CrossEntropy(), outputs, None, batch, seen)


def energies_of(
    loss: DistillLoss, student: Outputs, teacher: Any, batch: Batch, seen: Seen, *, keep_graph: bool = False
) -> Values:
    """Energies of the gradient of `loss`, a mean over what it counts."""
    # the head by a call: as one matmul its gradient would be made too, as large as its weight
    parts = loss(student._replace(projection=None), teacher, batch)
    factor = FP16_SCALE if student.hidden.dtype == torch.float16 else 1.0
    scale = parts.num.clamp(min=1) * factor
    return gradient_energies(parts.sum * factor, scale, seen, keep_graph=keep_graph)


def _plain_name(name: str) -> str:
    """A layer's name before an adapter was put around it: the teacher was copied then."""
    return name.removesuffix(".base_layer")
