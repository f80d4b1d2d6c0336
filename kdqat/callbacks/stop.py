"""SIGTERM and Ctrl-C save at the next step's end and stop; nothing of a finished step is lost."""

from __future__ import annotations

import signal
from typing import Any

import lightning as L

from kdqat.training import Checkpoints


class StopOnSignal(L.Callback):
    """Turns SIGTERM (schedulers, `kill`) and SIGINT into a checkpoint and an orderly end.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # before Lightning puts in a SIGTERM handler of its own: put back after training, that one would swallow the
        # signal, and with several ranks hang in a broadcast
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt  # the second one means it
        self.received = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        stop = bool(self.received)
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            self.received = self.received or signal.SIGTERM  # another rank got it
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoints):
                    callback.save(trainer)
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate first, and whoever sent the signal waits

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
