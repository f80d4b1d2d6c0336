"""Checkpointing, compiling and sharding of blocks: the last steps of `configure_model`, in this order.

Blocks, not the whole model: torch.compile of one block is reused for all of them, and a block is what FSDP2 gathers
at a time (torchtitan does it in the same order).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kdqat.models import SplitModel, blocks_of

# What "selective" keeps: what took a matmul or attention to compute. Everything else is a pass over memory.
_aten = torch.ops.aten
KEPT = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the student's blocks are run.

    Args:
        checkpoint_blocks: recompute activations in the backward pass. True: a block's input is all that is kept, the
            block runs again. "selective": results of matmuls and attention are kept; norms, activation functions and
            the fake-quantized weights are computed again, which costs little where blocks are compiled (eager
            execution pays for watching every operation).
        compile_blocks: torch.compile each block, and the loss of a chunk of logits.
        shard: FSDP2; needs trainer.strategy ModelParallelStrategy.

    Raises:
        ValueError: for another word than "selective".
    """

    checkpoint_blocks: bool | Literal["selective"] = False
    compile_blocks: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint_blocks not in (True, False, "selective"):
            raise ValueError(f"checkpoint_blocks is true, false or selective, not {self.checkpoint_blocks!r}")

    def apply(self, student: SplitModel, device_mesh: Any | None) -> Callable[[nn.Module], None] | None:
        """Prepare the student; returns what shards the teacher the same way, or None.

        Raises:
            ValueError: if `shard` and the trainer's strategy do not go together.
        """
        if self.shard != (device_mesh is not None):
            raise ValueError(
                "model.parallel.shard: true and trainer.strategy: ModelParallelStrategy go together; set both or none"
            )
        if self.checkpoint_blocks == "selective":
            for block in blocks_of(student.model):
                _keep_matmuls(block)
        elif self.checkpoint_blocks:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if self.compile_blocks:
            for block in blocks_of(student.model):
                block.compile()
        if device_mesh is None:
            return None
        if device_mesh["tensor_parallel"].size() > 1:
            raise ValueError("trainer.strategy: tensor_parallel_size must be 1; kdqat shards data-parallel only")

        def shard(split: nn.Module) -> None:
            from torch.distributed.fsdp import fully_shard

            mesh = device_mesh["data_parallel"]
            for block in blocks_of(split.model):  # type: ignore[arg-type]
                fully_shard(block, mesh=mesh)
            fully_shard(split, mesh=mesh)

        shard(student)
        return shard

    def undo(self, student: SplitModel) -> None:
        """Leave the blocks as they came, but for sharding: what comes after training has other shapes and dtypes, and
        would be compiled anew for a few batches."""
        if self.checkpoint_blocks is True:
            student.model.gradient_checkpointing_disable()  # type: ignore[operator]
        for block in blocks_of(student.model):
            block._compiled_call_impl = None
            if self.checkpoint_blocks == "selective":
                block.__dict__.pop("forward", None)


def _keep_matmuls(block: nn.Module) -> None:
    """Checkpoint the block's forward by `_policy`, in the instance: transformers may checkpoint the call around it,
    which is outside of what is compiled, and then the compiler does not see what to keep."""
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(inner, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = forward


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
