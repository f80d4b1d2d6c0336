"""MemoryPlan: the bytes of a run by part and by moment, before a weight is loaded.

The pieces are counted by their own files: student, teacher, trace and activations, loss, optimizer; `moments.py` adds
up what exists together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdqat.data import TextData
from kdqat.losses.logits import LogitLoss
from kdqat.training.module import KDQATModule
from kdqat.training.planner import hardware
from kdqat.training.planner.activations import count_kept
from kdqat.training.planner.loss import flat, loss_cost
from kdqat.training.planner.moments import PARTS, moments_of
from kdqat.training.planner.optimizer import optimizer_cost
from kdqat.training.planner.setup import read_setup, rows_of
from kdqat.training.planner.student import count, matmul_parameters, meta_student, nbytes
from kdqat.training.planner.teacher import TeacherCost, teacher_cost
from kdqat.training.planner.time import seconds, step_work
from kdqat.training.planner.trace import trace_forward
from kdqat.types import Batch, Outputs


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        moments: of each moment of a step, bytes by part.
        available: free memory of the device; None if it is not in this machine.
        counts: elements: parameters, trainable, scales, quantized, full_precision.
        seconds_per_step, steps: the run's time without evaluation; None where it cannot be said.
        notes: what was assumed.
    """

    moments: Mapping[str, Mapping[str, int]]
    device: str
    world_size: int
    available: int | None
    counts: Mapping[str, int]
    seconds_per_step: float | None
    steps: int | None
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> str:
        """The moment with the largest sum."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.moments[self.peak].values())

    @property
    def parts(self) -> dict[str, int]:
        """The most that each part ever takes; they need not exist together."""
        return {part: max(moment.get(part, 0) for moment in self.moments.values()) for part in PARTS}

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within what is there; None if nobody knows what is there."""
        return None if self.available is None else self.total <= self.available

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        derived = {"peak": self.peak, "total": self.total, "parts": self.parts, "fits": self.fits}
        return {**asdict(self), "notes": list(self.notes), **derived}


def plan_memory(module: KDQATModule, data: TextData, trainer_args: Mapping[str, Any]) -> MemoryPlan:
    """What training `module` on `data` will take; loads no weights and changes nothing.

    Args:
        trainer_args: Trainer arguments, as in a recipe.

    Raises:
        ValueError: for what training would refuse as well, or what cannot be planned.
    """
    module.require_training()
    assert module.loss is not None and module.optimizer_factory is not None
    setup, rows, notes = read_setup(trainer_args), rows_of(data), []
    here = setup.device if hardware.has(setup.device) else "cpu"
    if here != setup.device:
        notes.append("no CUDA device here: counted with the CPU's kernels, time and free memory unknown")
    split, parallel = meta_student(module, setup.callbacks), module.parallel
    teacher = teacher_cost(module, split, rows, here)
    trace = trace_forward(
        split, rows, wants=module.loss.wants, autocast=setup.autocast, device=here, judge=_judge(module, teacher)
    )
    compiled = bool(parallel.compile_blocks)
    kept, again = count_kept(trace, checkpoint=parallel.checkpoint_blocks, compiled=compiled)
    loss = loss_cost(
        module.loss, split, rows, autocast=setup.autocast, teacher_dtype=teacher.dtype, compiled=compiled,
        device=setup.device,
    )  # fmt: skip
    trainable = [p for p in {id(p): p for p in split.parameters()}.values() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen")
    fp16 = setup.autocast == torch.float16
    optimizer = optimizer_cost(module.optimizer_factory, trainable, device=setup.device, fp16=fp16)
    notes += [note for note in (teacher.note, optimizer.note) if note]
    moments = moments_of(split, setup, parallel.shard, trace, kept, again, loss, optimizer, teacher)
    state = nbytes(split) + nbytes(split, trainable_only=True) + optimizer.state
    work = step_work(
        split.model.config, matmul_parameters(split), teacher, rows, made=trace.made, loss_made=loss.made, state=state,
        recompute=parallel.checkpoint_blocks is True, accumulate=setup.accumulate,
    )  # fmt: skip
    speed = hardware.probe(here, setup.autocast or torch.float32) if here == setup.device else None
    return MemoryPlan(
        moments=moments, device=setup.device, world_size=setup.world_size,
        available=hardware.available_bytes(setup.device, setup.on_machine), counts=vars(count(split)),
        seconds_per_step=None if speed is None else seconds(work, speed, device=here, compiled=compiled),
        steps=setup.steps, notes=tuple(notes),
    )  # fmt: skip


def _judge(module: KDQATModule, teacher: TeacherCost) -> Any:
    """Runs the losses that are not on logits, for what they save; the teacher answers in the student's shapes."""
    assert module.loss is not None
    terms = [term for term in flat(module.loss) if not isinstance(term, LogitLoss)]
    if not terms:
        return None

    def judge(student: Outputs, batch: Batch) -> None:
        dtype = teacher.dtype or student.hidden.dtype
        extras = {want: tuple(t.detach().to(dtype) for t in tensors) for want, tensors in student.extras.items()}
        theirs = Outputs(student.hidden.detach().to(dtype), student.head, extras)
        for term in terms:
            term(student, theirs, batch)

    return judge
