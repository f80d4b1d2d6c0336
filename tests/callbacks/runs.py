"""Runs of a toy with callbacks: whole, and interrupted and resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from kdqat import api
from kdqat.training import Checkpoints, KDQATModule, Steer
from tests.training.toy import Loader, batch, make_module

SAME = batch(2, seed=0)  # every step's batch: the toy's loader does not know where it was


def fit(
    callbacks: Sequence[L.Callback], run: Path | None = None, *, steps: int = 6, module: KDQATModule | None = None,
    resume: Path | None = None, **trainer_args: Any,
) -> tuple[L.Trainer, KDQATModule]:  # fmt: skip
    """Train toy:llama for `steps`, with every step's checkpoint kept in `run`."""
    torch.manual_seed(0)
    module = make_module() if module is None else module
    args = {"accelerator": "cpu", "max_steps": steps, "enable_progress_bar": False, **trainer_args}
    kept = [Checkpoints(every_n_steps=1, keep_last=99)] if run else []
    trainer = api.make_trainer(args, run, [*callbacks, *kept])
    trainer.fit(module, Loader([SAME] * 99), ckpt_path=resume, weights_only=True)
    return trainer, module


def state(module: KDQATModule) -> dict[str, torch.Tensor]:
    """Weights and scales."""
    assert module.split is not None
    return {name: tensor.detach().clone() for name, tensor in module.split.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resumed_ends_the_same(make: Callable[[], L.Callback], folder: Path, *, steps: int = 6, at: int = 3) -> bool:
    """Whether a run that is taken up again from step `at` ends with the bits of the whole one."""
    _, whole = fit([make()], folder / "whole", steps=steps)
    saved = folder / "whole" / "checkpoints" / f"step={at:08d}.ckpt"
    _, again = fit([make()], folder / "again", steps=steps, resume=saved)
    return same(state(whole), state(again))


class Louder(Steer):
    """Multiplies the logged loss from a step on (the module makes it after the callbacks' on_after_backward)."""

    def __init__(self, start: int, by: float = 100.0) -> None:
        self.start, self.by = start, by

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step >= self.start:
            module._to_log["loss"] = module._to_log["loss"] * self.by
