"""What exists together in each moment of an optimizer step after the first.

Not everything exists at once. Gradients are dropped before the forward pass (`on_train_batch_start` of the module),
unless several micro-batches add up; activations go while the backward pass makes gradients anew; the optimizer's
temporaries come when both are settled. Each moment is added up by itself and the largest one decides (docs/memory.md).
"""

from __future__ import annotations

from kdqat.models import SplitModel, blocks_of
from kdqat.training.planner import hardware
from kdqat.training.planner.activations import Kept
from kdqat.training.planner.loss import LossCost
from kdqat.training.planner.optimizer import OptimizerCost
from kdqat.training.planner.setup import Setup
from kdqat.training.planner.student import block_bytes, nbytes
from kdqat.training.planner.teacher import TeacherCost
from kdqat.training.planner.trace import Trace

WEIGHTS, GRADIENTS, OPTIMIZER, TEACHER = "student weights", "gradients", "optimizer state", "teacher"
ACTIVATIONS, COPIES, QUANTIZATION = "activations", "weight copies", "fake quantization"
BLOCK, LOSS, ANSWER, SPREAD, OTHER = "one block's backward", "loss", "teacher's pass", "sharding, buckets", "other"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, TEACHER, ACTIVATIONS, COPIES, QUANTIZATION, BLOCK, LOSS, ANSWER, SPREAD, OTHER)


def moments_of(
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
    embedding = split.model.get_input_embeddings().weight  # type: ignore[operator]
    looked_up = embedding.numel() * 4 if embedding.requires_grad else 0  # a table's gradient, before it is added
    made = {GRADIENTS: gradients // ranks}
    held = gradients // ranks if setup.accumulate > 1 else 0  # of earlier micro-batches
    moments: dict[str, dict[str, int]] = {
        "teacher's forward pass": {
            **always, GRADIENTS: held, ANSWER: teacher.working, SPREAD: teacher_gathered + buckets,
        },
        "loss": {
            **always, GRADIENTS: held + loss.head_gradient, **saved,
            ACTIVATIONS: kept.activations - judged,
            LOSS: max(loss.temporaries, judged), ANSWER: teacher.answer, SPREAD: gathered + buckets,
        },
        "start of backward": {
            **always, GRADIENTS: held + loss.head_gradient, **saved, BLOCK: block,
            SPREAD: gathered + buckets,
        },
        "end of backward": {
            **always, **made, **{part: size // max(len(blocks), 1) for part, size in saved.items()},
            BLOCK: max(block, looked_up),
            SPREAD: gathered + buckets,
        },
        "optimizer step": {**always, **made, BLOCK: optimizer.temporaries // ranks, SPREAD: buckets},
    }  # fmt: skip
    fixed = hardware.CUDA_CONTEXT + hardware.CUDA_WORKSPACE if setup.device == "cuda" else hardware.CPU_PROCESS
    for moment in moments.values():
        moment[OTHER] = fixed + round(hardware.FRAGMENTATION * sum(moment.values()))
    return moments


def _backward_temporaries(trace: Trace, split: SplitModel) -> int:
    """Gradients on their way through one block: of its two largest activations, and of its largest weight in fp32
    while that passes a fake quantizer."""
    sizes = [trace.nbytes[n] for n in set().union(*trace.saved.values()) - trace.static - trace.quantizing]
    blocks = (parameter for block in blocks_of(split.model) for parameter in block.parameters())
    weight = max((p.numel() for p in blocks if p.requires_grad), default=0)
    return 2 * max(sizes, default=0) + 2 * 4 * weight
