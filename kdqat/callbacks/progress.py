"""The progress line of a run: step, loss, KL to the teacher, tokens a second, time left.

A live bar on a terminal; elsewhere (log files, CI) one plain line every few seconds.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdqat.types import Batch


class ProgressLine(L.Callback):
    """Shows where a run is. Reads one number a refresh from the device, not one a step.

    Args:
        seconds_between_lines: where there is no terminal.
    """

    def __init__(self, *, seconds_between_lines: float = 10.0) -> None:
        self.seconds_between_lines = seconds_between_lines
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._tokens = 0
        self._started = self._shown = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._started = self._shown = time.monotonic()
        self._first_step, self._tokens = trainer.global_step, 0
        if trainer.is_global_zero and self.console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            total = int(trainer.estimated_stepping_batches)
            self._task = self._bar.add_task("fit", total=total, completed=trainer.global_step, text="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += batch.input_ids.numel() * trainer.world_size
        if not trainer.is_global_zero or trainer.fit_loop._should_accumulate():
            return
        now = time.monotonic()
        last = trainer.global_step >= int(trainer.estimated_stepping_batches)
        wait = 0.5 if self._bar else self.seconds_between_lines
        if now - self._shown < wait and not last:
            return
        self._shown = now
        text = self._text(trainer, now - self._started)
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, text=text)
        else:
            self._print_line(trainer, text, now - self._started)

    def _text(self, trainer: L.Trainer, seconds: float) -> str:
        metrics = trainer.callback_metrics
        parts = [f"{n} {float(metrics[f'train/{n}']):.4f}" for n in ("loss", "kl") if f"train/{n}" in metrics]
        if "val/kl" in metrics:
            parts.append(f"val kl {float(metrics['val/kl']):.4f}")
        return "  ".join([*parts, f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s"])

    def _print_line(self, trainer: L.Trainer, text: str, seconds: float) -> None:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        left = seconds / max(step - self._first_step, 1) * (total - step)
        self.console.print(f"step {step}/{total}  {text}  {left / 60:.1f} min left", highlight=False)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
