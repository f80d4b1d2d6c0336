"""What a schedule holds in a step does not move in it, everything else does, and a resumed run repeats it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.callbacks import BlockProgressive, FreezeWindow, LoraAdapters, ScalesFirst
from kdqat.quant import MinMax
from kdqat.training import Observer
from tests.callbacks.runs import fit, resumed_ends_the_same
from tests.training.toy import make_module

DECAYING = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)  # decay alone would move a weight


class Movements(Observer):
    """Notes which parameters each step moved, and the optimizer steps that each one's moments count."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.moved: list[set[str]] = []
        self.before = {name: p.detach().clone() for name, p in module.split.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        now = dict(module.split.named_parameters())
        self.moved.append({name for name in now if not torch.equal(now[name], self.before[name])})
        self.before = {name: p.detach().clone() for name, p in now.items()}
        state = trainer.optimizers[0].state
        self.counted = {name: int(state[p]["step"]) if state.get(p) else 0 for name, p in now.items()}


def movements(callback: Any, steps: int = 6, **changes: Any) -> Movements:
    notes = Movements()
    fit([callback, notes], steps=steps, module=make_module(**{"optimizer": DECAYING, **changes}))
    return notes


def outside(name: str) -> bool:
    return ".layers." not in name


def test_a_window_holds_weights_scales_and_moments_inside_and_nothing_outside() -> None:
    notes = movements(FreezeWindow(roles=["o", "v"], start=2, stop=4))
    everything = set(notes.before)
    chosen = {name for name in everything if "o_proj" in name or "v_proj" in name}
    assert len(chosen) == 8  # weights and scales of two layers in two blocks
    assert notes.moved == [everything - chosen if step in (2, 3) else everything for step in range(6)]
    assert {name: 4 if name in chosen else 6 for name in everything} == notes.counted


@pytest.mark.parametrize(("part", "ending"), [("weights", "proj.weight"), ("scales", "quantizer.scale")])
def test_a_window_may_hold_weights_or_scales_only(part: Any, ending: str) -> None:
    notes = movements(FreezeWindow(blocks=[-1], part=part, start=1), steps=3)
    held = {name for name in notes.before if ".layers.1." in name and name.endswith(ending)}
    assert len(held) == 7
    assert [set(notes.before) - moved for moved in notes.moved] == [set(), held, held]


@pytest.mark.parametrize("part", ["all", "weights"])
def test_a_window_holds_the_adapters_of_its_layers(part: Any) -> None:
    notes = Movements()
    window = FreezeWindow(roles=["o"], part=part, start=1, stop=2)
    fit([LoraAdapters(rank=4), window, notes], steps=3, module=make_module(optimizer=DECAYING))
    adapters = {name for name in notes.before if "o_proj.adapter" in name}
    assert len(adapters) == 4 and any("q_proj.adapter" in name for name in notes.moved[1])
    assert [bool(adapters & moved) for moved in notes.moved] == [True, False, True]


@pytest.mark.parametrize("order", ["first_to_last", "last_to_first"])
@pytest.mark.parametrize("keep_trained", [True, False])
def test_blocks_train_one_after_another_and_the_outside_with_the_end(order: Any, keep_trained: bool) -> None:
    notes = movements(BlockProgressive(steps_per_block=2, order=order, keep_trained=keep_trained), steps=5)
    first, second = (".layers.0.", ".layers.1.") if order == "first_to_last" else (".layers.1.", ".layers.0.")
    everything = set(notes.before)
    one, two = ({name for name in everything if block in name} for block in (first, second))
    assert any("norm" in name for name in one) and any(name.endswith("scale") for name in one)
    assert everything - one - two == {name for name in everything if outside(name)}
    then = one | two if keep_trained else two
    assert notes.moved == [one, one, then, then, everything]


@pytest.mark.parametrize("then", ["all", "weights"])
def test_scales_train_first(then: Any) -> None:
    notes = movements(ScalesFirst(steps=2, then=then), steps=4)
    everything = set(notes.before)
    scales = {name for name in everything if name.endswith("quantizer.scale")}
    later = everything if then == "all" else everything - scales
    assert notes.moved == [scales, scales, later, later]


SCHEDULES = {
    "window": lambda: FreezeWindow(roles=["o"], start=1, stop=4),
    "blocks": lambda: BlockProgressive(steps_per_block=2, keep_trained=False),
    "scales": lambda: ScalesFirst(steps=4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_resumed_within_a_schedule_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    assert resumed_ends_the_same(SCHEDULES[name], tmp_path)


def test_steps_are_optimizer_steps_not_micro_batches() -> None:
    notes = Movements()
    window = FreezeWindow(roles=["o"], start=1, stop=2)
    fit([window, notes], steps=3, module=make_module(optimizer=DECAYING), accumulate_grad_batches=2)
    held = [any("o_proj.weight" in name for name in moved) for moved in notes.moved]
    assert held == [False, True, False, False, False, True]


def test_requires_grad_is_never_touched() -> None:
    _, module = fit([FreezeWindow(roles=["o"])], steps=1)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FreezeWindow(roles=["o"], start=3, stop=3), "0 <= start < stop"),
        (lambda: FreezeWindow(roles=["o"], start=-1), "0 <= start < stop"),
        (lambda: FreezeWindow(part="bias"), "part 'bias' is unknown"),  # type: ignore[arg-type]
        (lambda: BlockProgressive(steps_per_block=0), "steps_per_block must be at least 1"),
        (lambda: BlockProgressive(steps_per_block=1, order="random"), "order 'random'"),  # type: ignore[arg-type]
        (lambda: ScalesFirst(steps=0), "steps must be at least 1"),
        (lambda: ScalesFirst(steps=1, then="none"), "then 'none' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_checked(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (FreezeWindow(roles=["out"]), "FreezeWindow: roles 'out' matches no layer"),
        (FreezeWindow(roles=["o"], part="scales"), "nothing of it is trained"),
        (ScalesFirst(steps=2), "no fake quantizer has scales to train"),
    ],
)
def test_what_would_freeze_nothing_is_an_error_before_the_first_step(callback: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit([callback], module=make_module(quantizer=MinMax, plan=Uniform("W4A16_G32"), initializer=None))


def test_a_change_beyond_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    fit([FreezeWindow(roles=["o"], start=1, stop=9)], steps=2)
    assert "FreezeWindow: what is to change at step 9 lies beyond the run's 2 steps" in caplog.text
    caplog.clear()
    fit([FreezeWindow(roles=["o"], start=1, stop=2)], steps=2)
    assert "lies beyond" not in caplog.text
    caplog.clear()
    fit([FreezeWindow(roles=["o"], start=2)], steps=2)  # the last step is step 1
    assert "FreezeWindow: what is to change at step 2 lies beyond the run's 2 steps" in caplog.text
