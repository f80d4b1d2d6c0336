"""The progress line shows a run and leaves it alone."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from kdqat.callbacks import ProgressLine, StopOnSignal
from tests.training.toy import batch, make_module, train

BATCHES = [batch(2, seed=n) for n in range(6)]


def weights_after(*callbacks: Any) -> dict[str, torch.Tensor]:
    module = make_module()
    train(module, BATCHES, callbacks=list(callbacks), accumulate_grad_batches=2)
    assert module.split is not None
    return module.split.state_dict()


def line(**arguments: float) -> ProgressLine:
    callback = ProgressLine(**arguments)
    callback.console = Console(file=io.StringIO(), width=200)
    return callback


def test_a_run_is_bit_identical_with_and_without_it() -> None:
    without, with_it = weights_after(), weights_after(line(seconds_between_lines=0.0))
    assert all(torch.equal(without[name], with_it[name]) for name in without)


def test_it_reads_the_metrics_only_when_it_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    text = ProgressLine._text
    monkeypatch.setattr(ProgressLine, "_text", lambda self, *a: shown.append(1) or text(self, *a))  # type: ignore[func-returns-value]
    weights_after(line(seconds_between_lines=1e9))
    assert len(shown) == 1  # the last step


def test_a_line_says_step_loss_kl_speed_and_time_left() -> None:
    callback = line(seconds_between_lines=0.0)
    weights_after(callback)
    lines = callback.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3
    for number, text in enumerate(lines, start=1):
        assert re.fullmatch(rf"step {number}/3  loss [\d.]+  kl [\d.]+  [\d,]+ tokens/s  [\d.]+ min left", text), text


def test_a_terminal_gets_a_bar_that_is_taken_down() -> None:
    callback = line()
    callback.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    weights_after(callback)
    assert callback._bar is None and "step" in callback.console.file.getvalue()  # type: ignore[attr-defined]


def test_signal_handlers_are_as_before_after_a_run() -> None:
    import signal

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    weights_after()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_signal_interrupts_at_once() -> None:
    callback = StopOnSignal()
    callback._note(2, None)
    assert callback.received == 2
    with pytest.raises(KeyboardInterrupt):
        callback._note(2, None)
