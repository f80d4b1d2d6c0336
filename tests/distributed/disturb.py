"""Callbacks that make a run, or one rank of it, harder than it would be."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from kdqat.types import IGNORE_INDEX, Batch


class BlankRows(L.Callback):
    """Takes the labels from every row whose tokens have an even sum: whole micro-batches then weigh nothing."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        blank(batch)


def blank(batch: Batch) -> None:
    """What BlankRows does to a batch, in place."""
    batch.labels[batch.input_ids.sum(dim=1) % 2 == 0] = IGNORE_INDEX


class SlowRankOne(Checkpoint):
    """Rank 1 comes to every checkpoint when rank 0 has long written it.

    Lightning puts callbacks of this base last, behind those that bring the ranks in step; a recipe must name it
    before `Checkpoints`.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(0.1)


class StopRankZero(L.Callback):
    """SIGTERM to rank 0, and to no other, as micro-batch `at` begins."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class BreakRankOne(L.Callback):
    """From micro-batch `at` on, the last block of rank 1, and of no other, answers NaN."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == self.at:
            last = [m for name, m in module.split.named_modules() if name.endswith("mlp.down_proj")][-1]
            last.register_forward_hook(lambda module, inputs, output: output * float("nan"))


class KillRankZero(L.Callback):
    """SIGKILL to rank 0 as micro-batch `at` begins, once only: leaves the file `flag` and nothing tidied up."""

    def __init__(self, at: int, flag: str) -> None:
        self.at, self.flag = at, flag

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and batch_idx == self.at and not os.path.exists(self.flag):
            open(self.flag, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
