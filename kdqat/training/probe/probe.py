"""The probe of a run: one small batch, and a pass of teacher and student over it whenever somebody wants to look.

The batch is a corner of the first batch of the process of rank 0 (`batch.py`), the same on every rank and after a
resume (whoever asked for the probe keeps it in its state), so that every rank computes the same numbers and nothing is
reduced. The pass runs under the trainer's autocast, draws no random number and touches no `.grad`: gradients are taken
with respect to outputs, by `autograd.grad`. It is collective under FSDP2.

Memory, until the pass is let go: outputs of all layers and blocks of both models, in the dtype they have
(Llama-2-7B: 24 MB a block in 16 bits at 256 tokens, 1.5 GB for both), with gradients the inputs as well, the
fake-quantized weight of every layer in the dtype of the forward pass (as a training step without checkpointing holds
them), and a few fp32 tensors [tokens, vocabulary]. A teacher that repeats itself is asked once, and its half of the
outputs stays.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kdqat.losses import CrossEntropy, DistillLoss
from kdqat.losses.select import remember_positions
from kdqat.models import CachedTeacher, SplitModel, Teacher
from kdqat.quant import FakeQuantConv1D, FakeQuantLinear, full_precision
from kdqat.training.probe.batch import cut
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


class Probe:
    """Teacher and student on one batch.

    Args:
        num_rows, num_tokens: of the batch, at most.

    Attributes:
        batch: None until `offer`.
        attention: somebody wants attention weights, which takes eager attention.
        gradient_steps: at multiples of these steps gradients are wanted.
    """

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self.batch: Batch | None = None
        self.attention = False
        self.cross_entropy = False
        self.gradient_steps: set[int] = set()
        self._pass: tuple[int, ProbePass] | None = None
        self._paused = False  # the garbage collector, by this probe
        self._names: list[str] | None = None
        self._answered: tuple[Any, Answered] | None = None  # the teacher, and what it says each time

    def offer(self, batch: Batch, share: Callable[[Any], Any]) -> None:
        """Cut the probe's batch from a training batch, unless there is one.

        Args:
            share: gives every rank what rank 0 has; collective.
        """
        if self.batch is None:
            self.take(share(_on_cpu(cut(batch, self.num_rows, self.num_tokens))))
            assert self.batch is not None
        if self.batch.input_ids.device != batch.input_ids.device:
            self._keep(move_data_to_device(self.batch, batch.input_ids.device))

    def take(self, state: list[Tensor | None]) -> None:
        """Take over a batch as `state` gave it."""
        tensors: Any = state
        self._keep(Batch(*tensors))

    def _keep(self, batch: Batch) -> None:
        self.batch, self._answered = batch, None
        remember_positions(batch)  # while the device has nothing to do

    def state(self) -> list[Tensor | None] | None:
        """The batch, for a checkpoint."""
        return None if self.batch is None else _on_cpu(self.batch)

    def at(
        self,
        step: int,
        student: SplitModel,
        layers: Callable[[], Sequence[LayerRef]],
        *,
        teacher: Teacher | None,
        loss: DistillLoss | None,
        context: Context,
    ) -> ProbePass:
        """The pass of `step`: made once, whoever asks; arguments as `probe_pass`. `layers` are asked for once, and so
        is a teacher that repeats itself."""
        if self._pass is None or self._pass[0] != step:
            assert self.batch is not None
            # thousands of tensors that all go at once, by `forget`: counted as new objects they would have Python look
            # for garbage among all that there are, for 0.1 s and more
            self._paused = self._paused or gc.isenabled()
            gc.disable()
            self._names = [ref.name for ref in layers()] if self._names is None else self._names
            asked = teacher, loss, self.attention
            known = self._answered[1] if self._answered is not None and self._answered[0] == asked else None
            found = probe_pass(
                student,
                self.batch,
                self._names,
                teacher=teacher,
                loss=loss,
                context=context,
                attention=self.attention,
                gradients=any(step % every == 0 for every in self.gradient_steps),
                cross_entropy=self.cross_entropy,
                answered=known,
            )
            self._pass = step, found
            if found.answered is not None and _repeats_itself(teacher):
                self._answered = asked, found.answered
        return self._pass[1]

    def forget(self) -> None:
        """Let the last pass go."""
        self._pass = None
        if self._paused:
            gc.enable()
        self._paused = False


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


def _repeats_itself(teacher: Teacher | None) -> bool:
    """Not where FSDP2 shards it: the loss calls its head, whose weight only a forward pass gathers."""
    return teacher is not None and teacher.repeats_itself and not isinstance(live_split(teacher, ""), FSDPModule)


def _on_cpu(batch: Batch) -> list[Tensor | None]:
    """Its tensors; row keys are a cached teacher's affair."""
    return [None if tensor is None else tensor.cpu() for tensor in batch[:5]]


def _plain_name(name: str) -> str:
    """A layer's name before an adapter was put around it: the teacher was copied then."""
    return name.removesuffix(".base_layer")
