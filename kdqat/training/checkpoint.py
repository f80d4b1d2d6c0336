"""Checkpoints that resume exactly: whole files only, everything but the teacher in them, RNG state included.

A save is written under a temporary name, synced and renamed, so a SIGKILL or a full disk leaves the one before it.
Files are read with weights_only=True: loading one runs no code.
"""

from __future__ import annotations

import logging
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from kdqat.files import whole_file

log = logging.getLogger(__name__)

_NAME = re.compile(r"step=(\d+)\.ckpt")


class WholeFileIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all, and read to the CPU.

    Raises:
        ValueError: if the disk is full or not writable; names the folder and what is still intact.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        try:
            with whole_file(path) as part:
                torch.save(checkpoint, part)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise ValueError(
                f"{path}: the checkpoint could not be written ({str(error).splitlines()[0]}); earlier ones are "
                "intact: make room and run `kdqat fit RECIPE --resume`"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        # "cpu" says what Lightning's own function says, in the one form that torchao's 8-bit moments can be loaded with
        return super().load_checkpoint(path, map_location or "cpu", weights_only)  # type: ignore[arg-type]


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The resumable checkpoints in `folder` by step, ascending."""
    found = {int(m[1]): p for p in folder.glob("step=*.ckpt") if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items()))


def newest_complete(folder: Path) -> Path:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over.

    Raises:
        ValueError: if there is none.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoint_steps(folder).values()):
        if zipfile.is_zipfile(path):  # a torch file ends with its directory: cut short, it has none
            for bad in damaged:
                log.warning("%s is incomplete; resuming from %s instead", bad, path.name)
            return path
        damaged.append(path)
    if damaged:
        raise ValueError(f"{damaged[0]} is incomplete and there is no older one; start again with --overwrite")
    raise ValueError(f"{folder}: no checkpoint to resume from; run `kdqat fit` without --resume")


class Checkpoints(Checkpoint):
    """Saves the run: at intervals, at the end, and the best by `val/kl`.

    Args:
        every_n_steps: optimizer steps between saves; None: only at the end, and on SIGTERM.
        keep_last: how many of them to keep.
        select: which weights become `student/`: the "last", or those with the "best" val/kl.

    Raises:
        ValueError: for numbers below 1 or an unknown select.
    """

    def __init__(self, *, every_n_steps: int | None = 500, keep_last: int = 1, select: str = "last") -> None:
        if keep_last < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError("Checkpoints: every_n_steps and keep_last must be at least 1")
        if select not in ("last", "best"):
            raise ValueError(f"Checkpoints: select {select!r} is unknown: use last or best")
        self.every_n_steps, self.keep_last, self.select = every_n_steps, keep_last, select
        self.best_kl, self.best_step = float("inf"), -1
        self._saved_step = -1
        self._owes_validation = False
        self._rng: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise ValueError(
                "trainer.strategy: set save_distributed_checkpoint: false; a checkpoint is one file here, which is "
                "there whole or not at all, and a folder of shards is not"
            )

    def folder(self, trainer: L.Trainer) -> Path:
        """Where checkpoints lie: RUN/checkpoints."""
        return Path(trainer.default_root_dir) / "checkpoints"

    def best_path(self, trainer: L.Trainer) -> Path | None:
        """The checkpoint with the best val/kl; None if none was saved."""
        path = self.folder(trainer) / "best.ckpt"
        return path if path.exists() else None

    def save(self, trainer: L.Trainer, *, at_end: bool = False) -> None:
        """Save the run at its present step and drop the oldest beyond keep_last.

        Args:
            at_end: this step's validation, if there is one, has been run.
        """
        folder, loop = self.folder(trainer), trainer.fit_loop
        if trainer.global_step == self._saved_step:  # remembered, not looked up: a slower rank would find the file
            return
        self._owes_validation = not at_end and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        trainer.save_checkpoint(folder / f"step={trainer.global_step:08d}.ckpt", weights_only=False)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for old in list(checkpoint_steps(folder).values())[: -self.keep_last]:
                trainer.strategy.remove_checkpoint(old)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        at_step_end = not trainer.fit_loop._should_accumulate()
        last = trainer.global_step >= trainer.estimated_stepping_batches  # saved at the end, after its validation
        if self.every_n_steps and at_step_end and not last and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        kl = trainer.callback_metrics.get("val/kl")
        if trainer.sanity_checking or trainer.state.fn != "fit" or kl is None or not float(kl) < self.best_kl:
            return
        self.best_kl, self.best_step = float(kl), trainer.global_step
        trainer.save_checkpoint(self.folder(trainer) / "best.ckpt", weights_only=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.save(trainer, at_end=True)
        if self.select == "best" and self.best_step < 0:
            log.warning("Checkpoints: select is best, but no validation gave a val/kl; student/ gets the last weights")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._rng is not None:  # after everything that draws numbers on the way here
            random.setstate(_tuples(self._rng["python"]))
            np.random.set_state(_tuples(self._rng["numpy"]))
            torch.set_rng_state(self._rng["torch"])
            if torch.cuda.is_available() and self._rng["cuda"]:
                torch.cuda.set_rng_state_all(self._rng["cuda"])
            self._rng = None
        if self._owes_validation:  # the checkpoint is older than its step's validation, which Lightning would skip
            self._owes_validation = False
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()
        return {
            "best_kl": self.best_kl,
            "best_step": self.best_step,
            "owes_validation": self._owes_validation,
            "rng": {
                "python": random.getstate(),
                "numpy": (kind, [int(k) for k in keys], *rest),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_kl, self.best_step = state_dict["best_kl"], state_dict["best_step"]
        self._owes_validation, self._rng = state_dict["owes_validation"], state_dict["rng"]


def _tuples(value: Any) -> Any:
    """Lists back to tuples, which is what the RNGs take."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
