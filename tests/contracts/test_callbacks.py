"""What each kind of callback must do, for every callback in `kdqat.callbacks`; a new file is found and imported.

An observer changes no bit of losses, weights or gradients. A steering callback does in a resumed run what it does in a
whole one. An edit leaves the keys of the state as they are when training begins.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import kdqat.callbacks
from kdqat.training import Observer, Phase, Steer, StudentEdit
from tests.callbacks.runs import fit, resumed_ends_the_same, same, state

# What a class is made with, by its name: so that it does something within six steps of toy:llama.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "BitSchedule": {"milestones": {0: 8, 2: 6, 3: 5, 4: None}},
    "BlockProgressive": {"steps_per_block": 2, "keep_trained": False},
    "Divergence": {"action": "reduce_lr", "band": 1.0001, "window": 2, "patience": 1, "every_n_steps": 4},
    "Freeze": {"roles": ["o", "v"]},
    "FreezeWindow": {"roles": ["o", "v"], "start": 1, "stop": 4},
    "GradientLog": {"every_n_steps": 2, "probe_every_n_steps": 2, "num_tokens": 8},
    "LoraAdapters": {"roles": ["q", "down"], "rank": 2},
    "NothingMoved": {"every_n_steps": 2},
    "OscillationLog": {"every_n_steps": 2},
    "ScalesFirst": {"steps": 4},
    "SignalLog": {"every_n_steps": 2, "num_tokens": 8},
    "ZeroGradients": {"every_n_steps": 2},
}
STEPS, MIDDLE = 6, 3


def found(kind: type) -> list[Any]:
    classes: set[type] = set()
    for module in pkgutil.walk_packages(kdqat.callbacks.__path__, "kdqat.callbacks."):
        for value in vars(importlib.import_module(module.name)).values():
            ours = inspect.isclass(value) and value.__module__.startswith("kdqat.callbacks")
            if ours and issubclass(value, kind) and not inspect.isabstract(value):
                classes.add(value)
    return sorted(classes, key=lambda cls: cls.__name__)


def every(kind: type) -> Any:
    return pytest.mark.parametrize("cls", found(kind), ids=lambda cls: cls.__name__)


def maker(cls: type[L.Callback]) -> Callable[[], L.Callback]:
    if cls.__name__ not in ARGUMENTS:
        pytest.fail(f"{cls.__module__}.{cls.__name__}: name its arguments in ARGUMENTS of {__file__}")
    return lambda: cls(**ARGUMENTS[cls.__name__])


class Gradients(L.Callback):
    """Keeps the gradients of every step as the optimizer gets them; it comes after observers."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]


def curve(run: Path) -> list[str]:
    with (run / "metrics.csv").open(newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file)]


def test_classes_of_every_kind_are_found() -> None:
    names = [{cls.__name__ for cls in found(kind)} for kind in (Observer, Steer, StudentEdit)]
    expected = [{"NothingMoved", "SignalLog"}, {"Divergence", "FreezeWindow"}, {"Freeze", "LoraAdapters"}]
    assert all(some <= there for some, there in zip(expected, names, strict=True))
    assert set(ARGUMENTS) >= set().union(*names), f"{set().union(*names) - set(ARGUMENTS)} are missing in ARGUMENTS"


@pytest.mark.parametrize("cls", [*found(Observer), *found(Steer), *found(StudentEdit)], ids=lambda cls: cls.__name__)
def test_a_callback_has_one_kind_is_exported_and_takes_keywords_only(cls: type) -> None:
    assert sum(issubclass(cls, kind) for kind in (Observer, Steer, StudentEdit)) == 1
    assert getattr(kdqat.callbacks, cls.__name__, None) is cls, "a recipe finds it by its short name only there"
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters)
    assert maker(cls)()


@every(Observer)
def test_a_run_is_bit_identical_with_and_without_an_observer(cls: Any, tmp_path: Path) -> None:
    ends, curves, grads = [], [], []
    for name, observers in (("without", []), ("with", [maker(cls)()])):
        gradients = Gradients()
        _, module = fit([*observers, gradients], tmp_path / name, accumulate_grad_batches=2, log_every_n_steps=1)
        ends.append(state(module))
        curves.append(curve(tmp_path / name))
        grads.append(gradients.seen)
        assert all(p.requires_grad for p in module.parameters())
    assert curves[0] == curves[1] and len(curves[0]) >= STEPS
    assert same(*ends)
    assert len(grads[0]) == len(grads[1])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@every(Steer)
def test_a_steered_run_that_is_resumed_midway_ends_with_the_same_weights(cls: Any, tmp_path: Path) -> None:
    assert resumed_ends_the_same(maker(cls), tmp_path, steps=STEPS, at=MIDDLE)
    _, steered = fit([maker(cls)()])
    _, alone = fit([])
    assert not same(state(steered), state(alone)), "with these arguments it does nothing"


@every(StudentEdit)
def test_the_keys_of_an_edited_student_are_those_it_is_trained_with(cls: Any) -> None:
    keys: list[list[str]] = []

    class Keys(L.Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            keys.append(list(module.split.state_dict()))

    edit = maker(cls)()
    assert isinstance(edit, StudentEdit) and isinstance(edit.phase, Phase)
    _, module = fit([edit, Keys()], steps=2)
    assert module.split is not None and list(module.split.state_dict()) == keys[0]


@every(StudentEdit)
def test_editing_twice_is_editing_once_and_a_resumed_run_ends_with_the_same_bits(cls: Any, tmp_path: Path) -> None:
    _, module = fit([edit := maker(cls)()], steps=1)
    assert isinstance(edit, StudentEdit) and module.student is not None
    before, trains = state(module), [p.requires_grad for p in module.parameters()]
    edit.edit(module.student)
    assert same(state(module), before) and [p.requires_grad for p in module.parameters()] == trains
    assert resumed_ends_the_same(maker(cls), tmp_path)
