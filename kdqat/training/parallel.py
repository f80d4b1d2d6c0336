"""Checkpointing, compiling and sharding of blocks: the last steps of `configure_model`, in this order.

Blocks, not the whole model: torch.compile of one block is reused for all of them, and a block is what FSDP2 gathers
at a time (torchtitan does it in the same order).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdqat.models import SplitModel, blocks_of


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the student's blocks are run.

    Args:
        checkpoint_blocks: recompute each block's activations in the backward pass (non-reentrant).
        compile_blocks: torch.compile each block.
        shard: FSDP2; needs trainer.strategy ModelParallelStrategy.
    """

    checkpoint_blocks: bool = False
    compile_blocks: bool = False
    shard: bool = False

    def apply(self, student: SplitModel, device_mesh: Any | None) -> Callable[[nn.Module], None] | None:
        """Prepare the student; returns what shards the teacher the same way, or None.

        Raises:
            ValueError: if `shard` and the trainer's strategy do not go together.
        """
        if self.shard != (device_mesh is not None):
            raise ValueError(
                "model.parallel.shard: true and trainer.strategy: ModelParallelStrategy go together; set both or none"
            )
        if self.checkpoint_blocks:
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
