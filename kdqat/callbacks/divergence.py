"""Notices a run that diverges: the loss, or the gradient, leaves a band above its own running median."""

from __future__ import annotations

import logging
import math
import statistics
import zlib
from collections import deque
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor

from kdqat.callbacks.schedule_scale import require_scalable, scale_schedule
from kdqat.training import Checkpoints, Steer
from kdqat.training.checkpoint import checkpoint_steps
from kdqat.training.signals import note

log = logging.getLogger(__name__)

Action = Literal["warn", "stop", "reduce_lr"]


class DivergenceError(ValueError):
    """The run was stopped because it diverged; it says which checkpoint is from before."""


class Divergence(Steer):
    """Watches the loss of every step and, where `gradient_clip_val` has it measured, the norm before clipping.

    What counts is `patience` steps on end above `band` times the median of the steps before (`gradient_band` times, for
    the norm; its square is the gradient's energy). Numbers stay on the device until `every_n_steps` of them are read at
    once, so an action comes up to so many steps late, and at the same step in a resumed run. After an action the median
    begins anew; that of the norm also does when other parameters train, as a freeze window opens or closes. What is
    found is noted in signals.parquet.

    Args:
        action: "warn"; "stop" ends the run with an error that names the step at which the band was left, and the
            newest checkpoint from before it, if there is one still: runs are saved while nobody knows yet, so later
            ones may be there, and `keep_last` of Checkpoints says how many stay; "reduce_lr" multiplies the learning
            rate, and the rest of its schedule, by `factor`.
        band, gradient_band: times the median.
        window: steps in the median; nothing is judged before half of them.
        patience: steps on end.
        factor: of "reduce_lr".
        every_n_steps: between readings.

    Raises:
        ValueError: for numbers outside of their range, or another word; at the start of training, for "reduce_lr" with
            a schedule of which the rest cannot be scaled.
    """

    def __init__(
        self,
        *,
        action: Action = "warn",
        band: float = 3.0,
        gradient_band: float = 10.0,
        window: int = 50,
        patience: int = 3,
        factor: float = 0.5,
        every_n_steps: int = 10,
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(f"Divergence: action {action!r} is unknown: use {', '.join(get_args(Action))}")
        if band <= 1 or gradient_band <= 1 or not 0 < factor < 1:
            raise ValueError("Divergence: band and gradient_band lie above 1, and 0 < factor < 1")
        if min(patience, every_n_steps) < 1 or window < 2:
            raise ValueError("Divergence: patience >= 1, every_n_steps >= 1 and window >= 2 are needed")
        self.action, self.factor, self.every_n_steps = action, factor, every_n_steps
        self.bands = {"loss": Band(band, window, patience), "grad_norm": Band(gradient_band, window, patience)}
        self._unread: list[tuple[int, int, dict[str, Tensor | float]]] = []  # step, who has a gradient, values
        self._trained: int | None = None

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self._unread, self._trained = [], None
        for band in self.bands.values():
            band.reset()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if self.action == "reduce_lr":
            for config in trainer.lr_scheduler_configs:
                require_scalable(config.scheduler)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        metrics = trainer.callback_metrics
        values: dict[str, Tensor | float] = {n: metrics[f"train/{n}"] for n in self.bands if f"train/{n}" in metrics}
        groups = trainer.optimizers[0].param_groups
        trained = zlib.crc32(bytes(p.grad is not None for group in groups for p in group["params"]))
        self._unread.append((trainer.global_step, trained, values))
        if trainer.global_step % self.every_n_steps == 0:
            self._judge(trainer)

    def _judge(self, trainer: L.Trainer) -> None:
        found, since = "", 0
        for step, trained, values in self._read():
            if trained != self._trained:
                self.bands["grad_norm"].reset()
            self._trained = trained
            for name, value in values.items():
                if self.bands[name].leaves(value):
                    found = f"step {step}: {name} {value:.4g} is not within {self.bands[name]}"
                    left = step - self.bands[name].patience + 1
                    since = min(since or left, left)
                    note(trainer, step, f"divergence_{name}", value)
        act = bool(found)
        if trainer.world_size > 1 and self.action != "warn":
            act = trainer.strategy.reduce_boolean_decision(act, all=False)
        if not act:
            return
        for band in self.bands.values():
            band.reset()
        if self.action == "stop":
            raise DivergenceError(f"Divergence: {found}; stopped. {_left(trainer, since)}")
        if self.action == "reduce_lr":
            self._reduce(trainer)
        if trainer.is_global_zero:
            done = "the run goes on" if self.action == "warn" else f"learning rates multiplied by {self.factor}"
            log.warning("Divergence: %s; %s. A lower learning rate or clipping may hold it", found, done)

    def _read(self) -> list[tuple[int, int, dict[str, float]]]:
        """The steps not judged yet, with one reading of the device."""
        tensors = [v.float() for _, _, values in self._unread for v in values.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())
        read = [
            (step, trained, {n: next(numbers) if isinstance(v, Tensor) else v for n, v in values.items()})
            for step, trained, values in self._unread
        ]
        self._unread = []
        return read

    def _reduce(self, trainer: L.Trainer) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are OneCycleLR's
                    if key in group:
                        group[key] = group[key] * self.factor  # not in place: of some optimizers it is a tensor
        for config in trainer.lr_scheduler_configs:
            scale_schedule(config.scheduler, self.factor)

    def state_dict(self) -> dict[str, Any]:
        self._unread = list(self._read())  # type: ignore[arg-type]
        bands = {name: {"values": list(band.values), "outside": band.outside} for name, band in self.bands.items()}
        return {"bands": bands, "unread": [list(entry) for entry in self._unread], "trained": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, state in state_dict["bands"].items():
            self.bands[name].values.extend(state["values"])
            self.bands[name].outside = state["outside"]
        self._unread = [tuple(entry) for entry in state_dict["unread"]]
        self._trained = state_dict["trained"]


class Band:
    """Everything below `factor` times the median of the last `window` values."""

    def __init__(self, factor: float, window: int, patience: int) -> None:
        self.factor, self.patience = factor, patience
        self.values: deque[float] = deque(maxlen=window)
        self.outside = 0

    def leaves(self, value: float) -> bool:
        """Take the next value; True if it is the last of `patience` on end outside of the band; NaN is outside."""
        assert self.values.maxlen is not None
        known = len(self.values) >= (self.values.maxlen + 1) // 2
        inside = not known or value <= self.factor * statistics.median(self.values)  # NaN is not
        self.outside = 0 if inside else self.outside + 1
        if inside and math.isfinite(value):
            self.values.append(value)
        return self.outside == self.patience

    def reset(self) -> None:
        """Forget all values."""
        self.values.clear()
        self.outside = 0

    def __str__(self) -> str:
        return f"{self.factor:g} times its median {statistics.median(self.values):.4g}"


def _left(trainer: L.Trainer, since: int) -> str:
    """What is on the disk, for the error.

    Args:
        since: the step that left the band; its loss is of the weights of the step before.
    """
    kept = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints)]
    steps = checkpoint_steps(kept[0].folder(trainer)) if kept else {}
    if not steps:
        return "No checkpoint was saved before; lower the learning rate, clip gradients, or start with fewer layers"
    before = [step for step in steps if step < since - 1]
    if not before:
        return (
            f"It left its band at step {since}, and no checkpoint from before is left: start again, with a lower "
            "learning rate or clipped gradients, and more of Checkpoints' keep_last"
        )
    text = f"It left its band at step {since}; the newest checkpoint from before is {steps[before[-1]]}"
    later = [path.name for step, path in steps.items() if step > before[-1]]
    later_text = f", and to --resume from it, delete {', '.join(later)}" if later else ""
    return f"{text}{later_text}; lower the learning rate or clip gradients"
