"""MemoryPlan: the bytes of a run by part and by moment, before a weight is loaded.

Not everything exists at once. Lightning sets gradients to zero between forward and backward, so those of the last step
are there in the forward pass; activations go while the backward pass makes gradients anew; the optimizer's temporaries
come when both are settled. Each moment is added up by itself and the largest one decides (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdqat.data import TextData
from kdqat.losses.logits import LogitLoss
from kdqat.models import SplitModel
from kdqat.training.module import KDQATModule
from kdqat.training.planner import hardware
from kdqat.training.planner.activations import Kept, count_kept
from kdqat.training.planner.loss import LossCost, flat, loss_cost
from kdqat.training.planner.optimizer import OptimizerCost, optimizer_cost
from kdqat.training.planner.setup import Setup, read_setup, rows_of
from kdqat.training.planner.student import block_bytes, count, matmul_parameters, meta_student, nbytes
from kdqat.training.planner.teacher import TeacherCost, teacher_cost
from kdqat.training.planner.time import seconds, step_work
from kdqat.training.planner.trace import Rows, Trace, trace_forward
from kdqat.types import Batch, Outputs

WEIGHTS, GRADIENTS, OPTIMIZER, TEACHER = "student weights", "gradients", "optimizer state", "teacher"
ACTIVATIONS, COPIES, QUANTIZATION = "activations", "weight copies", "fake quantization"
BLOCK, LOSS, ANSWER, SPREAD, OTHER = "one block's backward", "loss", "teacher's pass", "sharding, buckets", "other"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, TEACHER, ACTIVATIONS, COPIES, QUANTIZATION, BLOCK, LOSS, ANSWER, SPREAD, OTHER)


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
    split, parallel = meta_student(module), module.parallel
    teacher = teacher_cost(module, split, rows, here)
    trace = trace_forward(
        split, rows, wants=module.loss.wants, autocast=setup.autocast, device=here, judge=_judge(module, teacher)
    )
    compiled = bool(parallel.compile_blocks)
    kept, again = count_kept(trace, checkpoint=parallel.checkpoint_blocks, compiled=compiled)
    loss = loss_cost(module.loss, split, rows, autocast=setup.autocast, teacher_dtype=teacher.dtype, compiled=compiled)
    trainable = [p for p in {id(p): p for p in split.parameters()}.values() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen")
    fp16 = setup.autocast == torch.float16
    optimizer = optimizer_cost(module.optimizer_factory, trainable, device=setup.device, fp16=fp16)
    notes += [note for note in (teacher.note, optimizer.note) if note]
    moments = _moments(split, setup, parallel.shard, trace, kept, again, loss, optimizer, teacher)
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


def _moments(
    split: SplitModel, setup: Setup, shard: bool, trace: Trace, kept: Kept, again: Kept, loss: LossCost,
    optimizer: OptimizerCost, teacher: TeacherCost,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """What exists in each moment of a step after the first."""
    ranks = setup.world_size if shard else 1
    blocks, gradients = block_bytes(split), nbytes(split, trainable_only=True)
    weights = nbytes(split)
    always = {
        WEIGHTS: weights // ranks,
        OPTIMIZER: optimizer.state // ranks,
        TEACHER: teacher.weights // ranks,
    }
    gathered = teacher_gathered = buckets = 0
    if shard and ranks > 1:  # the block that computes, the next one, and the root with the head
        gathered = 2 * max(blocks) + weights - sum(blocks)
        teacher_gathered = 2 * teacher.largest_block
    elif setup.world_size > 1:
        buckets = gradients  # DDP's
    saved = {ACTIVATIONS: kept.activations, COPIES: kept.weight_copies, QUANTIZATION: kept.fake_quantization}
    judged = trace.size(trace.judged)  # losses on hidden states follow those on logits
    block = again.total + _backward_temporaries(trace, split)
    has_old = setup.accumulate > 1
    old = {GRADIENTS: gradients // ranks}
    moments: dict[str, dict[str, int]] = {
        "teacher's forward pass": {**always, **old, ANSWER: teacher.working, SPREAD: teacher_gathered + buckets},
        "loss": {
            **always, GRADIENTS: gradients // ranks + loss.head_gradient, **saved,
            ACTIVATIONS: kept.activations - judged, LOSS: max(loss.temporaries, judged), ANSWER: teacher.answer, SPREAD: gathered + buckets,
        },
        "start of backward": {
            **always, GRADIENTS: (gradients // ranks if has_old else 0) + loss.head_gradient, **saved, BLOCK: block,
            SPREAD: gathered + buckets,
        },
        "end of backward": {
            **always, **old, **{part: size // max(len(blocks), 1) for part, size in saved.items()}, BLOCK: block,
            SPREAD: gathered + buckets,
        },
        "optimizer step": {**always, **old, BLOCK: optimizer.temporaries // ranks, SPREAD: buckets},
    }  # fmt: skip
    fixed = hardware.CUDA_CONTEXT + hardware.CUDA_WORKSPACE if setup.device == "cuda" else hardware.CPU_PROCESS
    for moment in moments.values():
        moment[OTHER] = fixed + round(hardware.FRAGMENTATION * sum(moment.values()))
    return moments


def _backward_temporaries(trace: Trace, split: SplitModel) -> int:
    """Gradients on their way through one block: of its two largest activations, and of its largest weight in fp32
    while that passes a fake quantizer."""
    sizes = [trace.nbytes[n] for n in set().union(*trace.saved.values()) - trace.static - trace.quantizing]
    weight = max((p.numel() for p in split.parameters() if p.requires_grad), default=0)
    return 2 * max(sizes, default=0) + 2 * 4 * weight


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


__all__ = ["PARTS", "MemoryPlan", "Rows", "plan_memory"]
