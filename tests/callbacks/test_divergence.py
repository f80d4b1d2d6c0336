"""Divergence: the band around the running median, what is done when it is left, and when it begins anew."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdqat import api
from kdqat.callbacks import BlockProgressive, Divergence, DivergenceError, FreezeWindow
from kdqat.callbacks.divergence import Band
from kdqat.callbacks.schedule_scale import require_scalable
from kdqat.training import Checkpoints, Steer, WarmupCosine
from tests.callbacks.runs import SAME, Louder, fit, resumed_ends_the_same, same, state
from tests.training.toy import Loader, make_module

SGD = partial(torch.optim.SGD, lr=1e-3)
DIVERGENT: dict[str, Any] = {"window": 4, "patience": 2, "every_n_steps": 2}

S = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Any] = {
    "one cycle": lambda o: S.OneCycleLR(o, max_lr=1.0, total_steps=20),
    "cyclic": lambda o: S.CyclicLR(o, base_lr=0.1, max_lr=1.0, step_size_up=4),
    "cosine": lambda o: S.CosineAnnealingLR(o, T_max=20, eta_min=0.01),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, T_0=5, eta_min=0.01),
    "step": lambda o: S.StepLR(o, 4),
    "sequential": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.5, total_iters=4), S.LambdaLR(o, lambda n: 0.9**n)], [5]
    ),
    "chained": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, total_iters=5), S.ExponentialLR(o, 0.9)]),
}


class Grown(Steer):
    def __init__(self, start: int) -> None:
        self.start = start

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step >= self.start:
            for parameter in module.parameters():
                parameter.grad.mul_(100)


class Rates(Steer):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_band_counts_values_on_end_above_a_multiple_of_the_median() -> None:
    def at(values: list[float], **kwargs: Any) -> list[int]:
        band = Band(**{"factor": 3.0, "window": 4, "patience": 2, **kwargs})
        return [n for n, value in enumerate(values) if band.leaves(value)]

    assert at([1, 1, 1, 1, 4, 4, 4]) == [5]
    assert at([1, 1, 1, 1, 4, 1, 4, 1]) == []
    assert at([1, 9, 1, 9, 1, 9]) == []
    assert at([1, 4, 4, 4]) == []  # nothing is known yet
    assert at([1, 2, 4, 8, 16, 32, 64]) == [4]  # what grows is measured by what was before it
    assert at([8, 4, 2, 1, 0.5, 0.25, 0.1, 2], patience=1) == [7]


def test_nan_is_outside_of_a_band_and_does_not_move_it() -> None:
    band = Band(3.0, 4, 2)
    assert [band.leaves(value) for value in (1, math.nan, 1, 1, math.nan, math.nan)] == [False] * 5 + [True]
    assert list(band.values) == [1, 1, 1]
    band = Band(3.0, 4, 1)
    assert not any(band.leaves(value) for value in (math.nan, math.inf, math.nan))  # fp16 begins so; nothing is known


def test_divergence_is_said_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = fit([Louder(4), Divergence(**DIVERGENT)], steps=8)
    assert trainer.global_step == 8
    assert caplog.text.count("Divergence: step 6: loss") == 1 and "the run goes on" in caplog.text


def test_a_growing_gradient_is_noticed_where_it_is_clipped(caplog: pytest.LogCaptureFixture) -> None:
    guard = Divergence(**DIVERGENT)
    fit([Grown(4), guard], steps=8, gradient_clip_val=1.0)
    assert "Divergence: step 6: grad_norm" in caplog.text


def test_a_freeze_window_that_closes_begins_the_norms_median_anew(caplog: pytest.LogCaptureFixture) -> None:
    guard = Divergence(**{**DIVERGENT, "gradient_band": 1.01})
    most = ["q", "k", "v", "o", "gate", "up", "down"]
    fit([FreezeWindow(roles=most, stop=4), guard], steps=6, gradient_clip_val=1.0)
    assert "grad_norm" not in caplog.text


def test_blocks_that_take_turns_begin_the_norms_median_anew() -> None:
    guard, resets = Divergence(every_n_steps=1), []
    guard.bands["grad_norm"].reset = lambda: resets.append(1)  # type: ignore[method-assign]
    fit([BlockProgressive(steps_per_block=2, keep_trained=False), guard], steps=5, gradient_clip_val=1.0)
    assert len(resets) == 4  # at the start, and for the first block, the second and all


def test_stop_ends_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    guard = Divergence(action="stop", **DIVERGENT)
    says = r"step 6: loss .* stopped\. It left its band at step 5; .* is .*step=00000003.ckpt, .* delete step=00000004"
    with pytest.raises(DivergenceError, match=says):  # the loss of step 5 is of the weights after step 4
        fit([Louder(4), guard], tmp_path, steps=8)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*"))[-1] == "step=00000005.ckpt"
    with pytest.raises(DivergenceError, match="No checkpoint was saved"):
        fit([Louder(4), Divergence(action="stop", **DIVERGENT)], steps=8)


def test_stop_does_not_call_a_checkpoint_good_that_was_saved_meanwhile(tmp_path: Path) -> None:
    guard = Divergence(action="stop", **DIVERGENT)
    args = {"accelerator": "cpu", "max_steps": 8, "enable_progress_bar": False}
    trainer = api.make_trainer(args, tmp_path, [Louder(4), guard, Checkpoints(every_n_steps=5)])
    with pytest.raises(DivergenceError, match="left its band at step 5, and no checkpoint from before is left"):
        trainer.fit(make_module(), Loader([SAME] * 99))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_reduce_lr_scales_the_rest_of_every_schedule_that_it_takes(name: str) -> None:
    rates: list[list[float]] = []
    for reduced in (False, True):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        schedule, seen = SCHEDULERS[name](optimizer), []
        for step in range(12):
            if reduced and step == 3:
                trainer = SimpleNamespace(
                    optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)]
                )
                require_scalable(schedule)
                Divergence(action="reduce_lr", factor=0.25)._reduce(trainer)
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        rates.append(seen)
    for step, (before, after) in enumerate(zip(*rates, strict=True)):
        assert after == pytest.approx(before * (0.25 if step >= 3 else 1.0)), step


def test_reduce_lr_scales_the_rest_of_the_schedule() -> None:
    rates: list[list[float]] = []
    for guard in ([], [Divergence(action="reduce_lr", factor=0.25, **DIVERGENT)]):
        module = make_module(scheduler=WarmupCosine, optimizer=SGD)
        seen = Rates()
        fit([Louder(4), *guard, seen], steps=8, module=module)
        rates.append(seen.seen)
    for step, (before, after) in enumerate(zip(*rates, strict=True)):
        assert after == pytest.approx(before * (0.25 if step >= 6 else 1.0)), step


def test_reduce_lr_refuses_a_schedule_that_it_does_not_know() -> None:
    class Own(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            return [1e-3 for _ in self.optimizer.param_groups]

    with pytest.raises(ValueError, match="reduce_lr cannot scale the rest of a Own"):
        fit([Divergence(action="reduce_lr")], steps=1, module=make_module(scheduler=Own))
    fit([Divergence(action="warn")], steps=1, module=make_module(scheduler=Own))


def test_a_run_resumed_among_unread_losses_reduces_at_the_same_step(tmp_path: Path) -> None:
    class Both(Louder, Divergence):
        def __init__(self) -> None:
            Louder.__init__(self, 4)
            Divergence.__init__(self, action="reduce_lr", window=4, patience=3, every_n_steps=4)

    def make() -> Any:
        return Both()

    assert resumed_ends_the_same(make, tmp_path, steps=10, at=6)
    _, never = fit([Louder(4)], steps=10)
    _, reduced = fit([make()], steps=10)
    assert not same(state(never), state(reduced))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"action": "explode"}, "action 'explode' is unknown"),
        ({"band": 1.0}, "lie above 1"),
        ({"factor": 1.0}, "factor < 1"),
        ({"window": 1}, "window >= 2"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Divergence(**arguments)
