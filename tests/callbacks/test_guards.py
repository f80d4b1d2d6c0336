"""Guards speak when something is wrong, keep silent when nothing is, and change no bit unless they are asked to."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from kdqat import api
from kdqat.callbacks import BlockProgressive, Divergence, FreezeWindow, NothingMoved, ZeroGradients
from kdqat.callbacks.guards import GUARDS
from kdqat.training import Steer
from tests.callbacks.runs import Louder, fit
from tests.training.toy import make_module


class Zeroed(Steer):
    """Zeroes gradients, or takes them away, before anybody looks."""

    def __init__(self, part: str, *, missing: bool = False) -> None:
        self.part, self.missing = part, missing

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        for name, parameter in module.split.named_parameters():
            if self.part in name and parameter.grad is not None:
                parameter.grad = None if self.missing else parameter.grad.zero_()


def test_all_gradients_of_a_role_at_zero_are_named_once_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    fit([Zeroed("down_proj.weight_fake"), ZeroGradients(every_n_steps=2)], steps=5)
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("ZeroGradients")]
    assert "step 1:" in said and "missing for scales of down;" in said


def test_a_role_with_one_live_layer_is_no_finding(caplog: pytest.LogCaptureFixture) -> None:
    fit([Zeroed("layers.0.mlp.down_proj"), ZeroGradients()], steps=1)
    assert "ZeroGradients" not in caplog.text


def test_missing_gradients_count_as_zero(caplog: pytest.LogCaptureFixture) -> None:
    fit([Zeroed("down_proj.weight", missing=True), ZeroGradients()], steps=1)
    assert "missing for weights of down, scales of down;" in caplog.text


def test_a_freeze_window_is_no_zero_gradient(caplog: pytest.LogCaptureFixture) -> None:
    fit([FreezeWindow(roles=["o"]), ZeroGradients(every_n_steps=1)], steps=3)
    assert "ZeroGradients" not in caplog.text


@pytest.mark.parametrize(
    ("optimizer", "speaks"),
    [
        (partial(torch.optim.SGD, lr=1e-20), True),
        (partial(torch.optim.AdamW, lr=1e-3), False),
    ],
    ids=["too small", "fine"],
)
def test_weights_that_stay_where_they_are_are_noticed(
    optimizer: Any, speaks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fit([NothingMoved(every_n_steps=3)], steps=6, module=make_module(optimizer=optimizer))
    assert caplog.text.count("NothingMoved: step 3: 100 %") == int(speaks)
    assert ("the learning rate is too small" in caplog.text) == speaks


def test_bf16_weights_without_stochastic_rounding_are_told_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    class Deaf(torch.optim.AdamW):
        bf16_stochastic_round = True  # says so, and does not

    module = make_module(optimizer=partial(Deaf, lr=1e-9))
    module.source = type(module.source)("toy:llama", "bfloat16")
    fit([NothingMoved(every_n_steps=2)], steps=2, module=module)
    assert "bf16 weights lose updates" in caplog.text


def test_warm_up_at_zero_and_freeze_windows_are_no_finding(caplog: pytest.LogCaptureFixture) -> None:
    late = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: float(step >= 4))
    fit([NothingMoved(every_n_steps=2)], steps=4, module=make_module(scheduler=late))
    fit([NothingMoved(every_n_steps=2), BlockProgressive(steps_per_block=3)], steps=4)
    assert "NothingMoved" not in caplog.text


def test_guards_write_what_they_find(tmp_path: Path) -> None:
    guards = [Divergence(window=4, patience=2, every_n_steps=2), ZeroGradients(), NothingMoved(every_n_steps=3)]
    module = make_module(optimizer=partial(torch.optim.SGD, lr=1e-20))
    fit([Zeroed("down_proj.weight_fake"), Louder(4), *guards], tmp_path, steps=6, module=module)
    rows = pyarrow.parquet.read_table(tmp_path / "signals.parquet").to_pylist()
    assert {(row["step"], row["source"], row["metric"], row["role"]) for row in rows} == {
        (0, "guard", "zero_gradients", ""), (3, "guard", "nothing_moved", ""), (6, "guard", "divergence_loss", ""),
    }  # fmt: skip


def test_two_of_a_kind_that_a_checkpoint_could_not_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="there are two Divergence with the same settings"):
        api.make_trainer({}, None, [Divergence(), Divergence(action="stop")])


def test_every_run_has_its_guards_and_a_listed_one_replaces_its_own() -> None:
    def guards(*callbacks: Any) -> list[Any]:
        return [c for c in api.make_trainer({}, None, callbacks).callbacks if isinstance(c, GUARDS)]  # type: ignore[attr-defined]

    assert sorted(type(g).__name__ for g in guards()) == ["Divergence", "NothingMoved", "ZeroGradients"]
    own = Divergence(action="stop")
    assert own in guards(own) and len(guards(own)) == 3


def test_the_guards_read_the_device_in_few_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, counted(original, read))
    steps = itertools.count()
    monkeypatch.setattr("kdqat.training.module.require_finite", lambda *_: next(steps))
    per_step = []
    for guards in ([], [guard() for guard in GUARDS]):
        read.clear()
        monkeypatch.setattr("kdqat.api.missing_guards", lambda _: [])
        fit(guards, steps=20)
        per_step.append(len(read))
    assert 0 < per_step[1] - per_step[0] <= 3  # step 1's gradients, and twice ten losses


def counted(original: Any, read: list[int]) -> Any:
    def call(self: Any, *args: Any) -> Any:
        read.append(1)
        return original(self, *args)

    return call


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ZeroGradients(every_n_steps=0), "every_n_steps must be at least 1"),
        (lambda: NothingMoved(share=1.0), "0 < share < 1"),
    ],
)
def test_arguments_are_checked(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
